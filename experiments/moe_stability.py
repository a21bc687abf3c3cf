"""Show where training a mixture of experts breaks, and which of the usual measures keep it from breaking, if any.

    python experiments/moe_stability.py [--jobs 2]            # writes experiments/results/moe_stability.{json,md,png}
    python experiments/moe_stability.py --mixture ffn         # of upcycled MLPs: moe_stability_ffn.{json,md,png}

magma_moe (ours) on the mini preset: mixtures of bottlenecks in the frozen mini language model, or of copies of its MLPs
in place of each of them; the encoder frozen too, whose features are computed once. Every cell is one router, one
initial scale of it, one learning rate; arms differ in the measures alone. All else is the same, seed by seed: data,
batches, steps, bfloat16 autocast.

A run has broken if its held-out captioning loss is not finite, or at the end is not below its value at step 0 (of
upcycled MLPs: below that of the dense model at step 0, from which all arms were made), or if more than half of all
experts are dead at the end: no held-out token goes to them.

The settings were settled with results in sight, so the figures are no independent test (`Study.chosen`, which the table
repeats).

Hardware: CPU, one process a core, one thread each. Time: the JSON file has the seconds of each run. A run that is in
the JSON file with the same settings is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from scipy.stats import t as student
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wlsup.approaches.magma_moe import MagmaMoE
from wlsup.batch import CaptionBatch, VisionOutput
from wlsup.callbacks.guards import spike_limit
from wlsup.data.datamodule import CaptionDataModule
from wlsup.files import write_json, write_text
from wlsup.models.prefix import PrefixSpec
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.moe import MoE, MoESpec
from wlsup.optim import OptimizerSpec, build_optimizer, build_schedule

RESULTS = Path(__file__).parent / "results"
ROUTERS = ("top_k", "noisy_top_k")
SCALES = (0.02, 0.5, 4.0)
EXPERTS, PAIRS, HELD_OUT, WINDOW = 8, 512, 64, 16


@dataclass(frozen=True)
class Study:
    """What is studied.

    Args:
        mixture: of magma_moe.
        what: of what the mixtures are.
        start: what the measure `Measures.start` is here, and what is there without it.
        rates: learning rates.
        harsh: router, scale and learning rate of the cell in which each measure is left out by itself.
        chosen: how that was settled.
        name: of its files.
    """

    mixture: str
    what: str
    start: tuple[str, str]
    rates: tuple[float, ...]
    harsh: tuple[str, float, float]
    chosen: str
    name: str


ADAPTERS = Study(
    "adapters",
    f"a mixture of {EXPERTS} bottlenecks, k = 1, in each of the mini language model's blocks",
    (
        "straight-through weights and experts that add nothing at first",
        "its probability as the weight and both maps of each expert drawn at random",
    ),
    (2e-3, 2e-2, 1e-1, 3e-1),
    ("top_k", 0.02, 1e-1),
    "How the settings were chosen, with results in sight. Tried on seed 0 at 60 steps: twelve cells of scale and "
    "learning rate (0.1 and below, then 0.3 to 1.0) with mixtures of adapters, six with upcycled MLPs, which were "
    "dropped as too dear. At a learning rate of 0.1, without measures 0 of 3 runs broke and with all of them 2 of "
    "3; from 0.3 on both broke. Steps were then lowered to 40 for cost: runs break there that recover by 60, so "
    "the number of steps decides part of what is seen. The harsh cell (top_k, 0.02, 0.1) replaced (top_k, 0.5, "
    "0.02) after both had been looked at, and seeds 0 and 1 of it were run before the study.",
    "moe_stability",
)
FFN = Study(
    "ffn",
    f"{EXPERTS} copies, k = 1, in place of the MLP of each of the mini language model's blocks, which are trained",
    ("straight-through weights, with which step 0 is the dense model", "its probability as the weight"),
    (2e-4, 2e-3, 2e-2),
    ("top_k", 0.02, 2e-4),
    "How the settings were chosen, with results in sight. This study came after that of mixtures of adapters, in which "
    "the measures did not hold what broke. Tried on seed 100, which is none of the study's: top_k at a scale of 0.02 "
    "and these three learning rates, all measures and none. At 2e-4 the loss ended at 1.86 with all measures and at "
    "2.47 without, at 2e-3 at 1.89 and 1.94, at 2e-2 at 2.42 and 2.46; the dense model had 2.34 at step 0. The harsh "
    "cell, and the rule that compares with the dense model, were settled by that.",
    "moe_stability_ffn",
)
STUDIES = {study.mixture: study for study in (ADAPTERS, FFN)}


@dataclass(frozen=True)
class Measures:
    """What is done against instability.

    Args:
        fp32: the router computes in fp32 under bfloat16 autocast.
        z_loss: weight 1e-3 or none.
        balance: Switch's loss of weight 1e-2 or none.
        start: straight-through weights and experts that add nothing at first; without, the router's probability as the
            weight, and both of a bottleneck's maps drawn as torch draws linear maps (copies of MLPs stay copies).
        jitter: on the router's input, 1e-2 or none.
        clip: of the gradient's norm, at 1, and steps without finite gradients skipped; or neither.
    """

    fp32: bool = True
    z_loss: bool = True
    balance: bool = True
    start: bool = True
    jitter: bool = True
    clip: bool = True


NONE = Measures(False, False, False, False, False, False)
ARMS: dict[str, Measures] = {"all measures": Measures(), "no measure": NONE}
_START = "without straight-through and zero-up"
SINGLE: dict[str, Measures] = {
    "without fp32 in the router": Measures(fp32=False),
    "without the z-loss": Measures(z_loss=False),
    "without the balance loss": Measures(balance=False),
    _START: Measures(start=False),
    "without jitter": Measures(jitter=False),
    "without clipping and skipping": Measures(clip=False),
}
NAMES = {**ARMS, **SINGLE}


def cells(study: Study) -> Iterator[tuple[str, str, float, float]]:
    """Yield arm, router, initial scale and learning rate of every cell."""
    for router, scale, rate in product(ROUTERS, SCALES, study.rates):
        for arm in ARMS:
            yield arm, router, scale, rate
    for arm in SINGLE:
        yield (arm, *study.harsh)


def _use_pairs(train: int, held_out: int) -> None:
    """Tell a process how many pairs there are."""
    global PAIRS, HELD_OUT
    PAIRS, HELD_OUT = train, held_out


class Bfloat16Products(TorchDispatchMode):
    """Multiply bfloat16 matrices in fp32 and round the result: what bfloat16 units do, up to the order of the sums.

    A CPU without such units takes eight times as long by torch's own kernels, and one with them other sums: with this,
    runs on either are the same study.
    """

    _OPS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        half = any(isinstance(arg, Tensor) and arg.dtype is torch.bfloat16 for arg in args)
        if func.overloadpacket not in self._OPS or not half:
            return func(*args, **given)
        return func(*(arg.float() if isinstance(arg, Tensor) else arg for arg in args), **given).bfloat16()


@cache
def pairs() -> tuple[list[CaptionBatch], CaptionBatch]:
    """Return the training pairs one by one, and the held-out ones, with what the encoder makes of their pictures."""
    encoder = build_vision(VisionSpec()).eval()
    data = CaptionDataModule(pairs=PAIRS, validation_pairs=HELD_OUT, batch_size=HELD_OUT, eval_sets=[])
    data.image_spec = encoder.image_spec
    data.setup()
    train = [_encoded(encoder, batch) for batch in data.train_dataloader()]
    return train, _encoded(encoder, next(iter(data.val_dataloader())))


@torch.no_grad()
def _encoded(encoder: nn.Module, batch: CaptionBatch) -> CaptionBatch:
    return CaptionBatch(batch.images[:, :, :0, :0], batch.captions, batch.keys, encoded=encoder(batch.images))


def draw_batch(generator: torch.Generator, size: int) -> CaptionBatch:
    """Draw training pairs."""
    train, _ = pairs()
    chosen = torch.randperm(PAIRS, generator=generator)[:size]
    per = len(train[0].captions)
    places = [(train[i // per], i % per) for i in chosen.tolist()]
    tokens = torch.stack([batch.encoded.tokens[i] for batch, i in places])
    pooled = torch.stack([batch.encoded.pooled[i] for batch, i in places])
    one = places[0][0]
    seen = VisionOutput(**{**vars(one.encoded), "tokens": tokens, "pooled": pooled})
    captions, keys = [batch.captions[i] for batch, i in places], [batch.keys[i] for batch, i in places]
    return CaptionBatch(one.images[:1].expand(size, -1, -1, -1), captions, keys, encoded=seen)


def build(mixture: str, measures: Measures, router: str, scale: float, lr: float) -> MagmaMoE:
    """Build one run's approach."""
    spec = MoESpec(
        experts=EXPERTS,
        router=router,  # type: ignore[arg-type]
        k=1,
        combine="straight_through" if measures.start or mixture == "ffn" else "raw",
        balance="loss" if measures.balance else "none",
        z_weight=1e-3 if measures.z_loss else 0.0,
        jitter=1e-2 if measures.jitter else 0.0,
        init_std=scale,
        router_dtype="float32" if measures.fp32 else "model",
    )
    approach = MagmaMoE(
        prefix=PrefixSpec(pool=4),
        mixture=mixture,  # type: ignore[arg-type]
        every=1 if mixture == "ffn" else 2,
        moe=spec,
        lr=lr,
        weight_decay=0.0,
        encoder_lr=0.0,
    )
    for layer in () if measures.start else moe_layers(approach):
        if mixture == "ffn":  # which refuses what does not keep the function
            layer.router.spec = replace(spec, combine="raw")
        else:
            for expert in layer.experts:
                expert.up.reset_parameters()
    approach.setup("fit")
    return approach


def moe_layers(approach: nn.Module) -> list[MoE]:
    """Return the mixtures."""
    return [module for module in approach.modules() if isinstance(module, MoE)]


def run(
    mixture: str, arm: str, router: str, scale: float, rate: float, seed: int, steps: int, batch_size: int
) -> dict[str, Any]:
    """Train one run; return its losses and how its tokens went."""
    torch.set_num_threads(1)
    began, measures = time.process_time(), NAMES[arm]
    torch.manual_seed(seed)
    approach = build(mixture, measures, router, scale, rate)
    optimizer = build_optimizer(approach.optimizer_spec, approach.plan.parameter_groups(approach))
    schedule = build_schedule(OptimizerSpec(warmup_fraction=0.1), optimizer, steps)
    parameters = [p for p in approach.parameters() if p.requires_grad]
    order = torch.Generator().manual_seed(seed)
    first, dense = evaluate(approach), {}
    if mixture == "ffn":
        with approach._without(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Bfloat16Products():
            dense = {"dense": _number(float(approach.eval().losses(pairs()[1])["captioning"]))}
    losses: list[float] = []
    skipped, told, recent, largest = 0, 0, deque(maxlen=WINDOW), first["max_logit"]
    for step in range(steps):
        torch.manual_seed(seed * 100_003 + step)
        approach.train()
        with torch.autocast("cpu", torch.bfloat16), Bfloat16Products():
            parts = approach.losses(draw_batch(order, batch_size))
        loss = float(parts["captioning"].detach())
        losses.append(loss)
        if math.isfinite(loss):
            told += len(recent) == WINDOW and loss > spike_limit(recent, 8.0)
            recent.append(loss)
        largest = max(largest, *(float(layer.routing.max_logit) for layer in moe_layers(approach)))
        optimizer.zero_grad()
        with Bfloat16Products():
            parts["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0 if measures.clip else math.inf)
        if measures.clip and not bool(norm.isfinite() & parts["loss"].isfinite()):
            skipped += 1
            optimizer.zero_grad()
        elif not measures.clip and not bool(norm.isfinite()):
            break  # every weight would be NaN from here on
        optimizer.step()
        schedule.step()
    broken_off = len(losses) < steps
    last = {"loss": math.nan, "dead": EXPERTS * len(moe_layers(approach)), "max_logit": math.nan}
    last = last if broken_off else evaluate(approach)
    return {
        "arm": arm, "router": router, "scale": scale, "rate": rate, "seed": seed,
        "first": _number(first["loss"]), "last": _number(last["loss"]), "dead": last["dead"],
        "experts": EXPERTS * len(moe_layers(approach)), "max_logit": _number(largest), "skipped": skipped,
        "spikes": told, "curve": [_number(loss) for loss in losses[:: max(steps // 20, 1)]],
        "seconds": round(time.process_time() - began, 2), **dense,
    }  # fmt: skip


@torch.no_grad()
def evaluate(approach: MagmaMoE) -> dict[str, Any]:
    """Return the held-out captioning loss, how many experts are dead, and the largest logit."""
    approach.eval()
    with torch.autocast("cpu", torch.bfloat16), Bfloat16Products():
        loss: Tensor = approach.losses(pairs()[1])["captioning"]
    routed = [layer.routing for layer in moe_layers(approach)]
    return {
        "loss": float(loss),
        "dead": int(sum(one.dead for one in routed)),
        "max_logit": max(float(one.max_logit) for one in routed),
    }


def _number(value: float) -> float | None:
    """JSON knows no NaN and no infinity."""
    return round(value, 6) if math.isfinite(value) else None


def broke(run: dict[str, Any]) -> str:
    """Say why a run counts as broken, or "" where it does not; see this file's text."""
    if run["last"] is None or run["first"] is None:
        return "not finite"
    if run["last"] >= run.get("dense", run["first"]):
        return "not below the dense model" if "dense" in run else "not below its start"
    return "dead experts" if 2 * run["dead"] > run["experts"] else ""


def interval(values: Sequence[float]) -> list[float | None] | None:
    """Return the mean and the half width of its 95 % interval by Student's t; None without values."""
    if not values:
        return None
    half = None
    if len(values) > 1:
        half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return [statistics.fmean(values), half]


def summary(study: Study, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each cell that has runs, in the order of `cells`.

    "loss" is over the runs whose last loss is finite. "difference" is paired by seed: the last loss of an arm that
    lacks measures less that with all of them.
    """
    rows = []
    for arm, router, scale, rate in cells(study):
        mine = _of(runs, arm, router, scale, rate)
        if not mine:
            continue
        every = {run["seed"]: run["last"] for run in _of(runs, "all measures", router, scale, rate)}
        both = [
            run["last"] - every[run["seed"]]
            for run in mine
            if run["last"] is not None and every.get(run["seed"]) is not None
        ]
        logits = [run["max_logit"] for run in mine if run["max_logit"] is not None]
        rows.append(
            {
                "arm": arm,
                "router": router,
                "scale": scale,
                "rate": rate,
                "seeds": len(mine),
                "broken": sum(bool(broke(run)) for run in mine),
                "why": sorted({broke(run) for run in mine} - {""}),
                "first": interval([run["first"] for run in mine if run["first"] is not None]),
                "loss": interval([run["last"] for run in mine if run["last"] is not None]),
                "difference": None if arm == "all measures" else interval(both),
                "dead": statistics.fmean(run["dead"] for run in mine),
                "max_logit": statistics.fmean(logits) if logits else None,
                "skipped": sum(run["skipped"] for run in mine),
                "spikes": sum(run["spikes"] for run in mine),
            }
        )
    return rows


def _of(runs: Sequence[dict[str, Any]], arm: str, router: str, scale: float, rate: float) -> list[dict[str, Any]]:
    key = (arm, router, scale, rate)
    return [run for run in runs if (run["arm"], run["router"], run["scale"], run["rate"]) == key]


def findings(study: Study, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say what the measures together changed, and what each did in the harsh cell: nothing is left out."""
    said = []
    grid = [row for row in rows if row["arm"] in ARMS]
    for arm in ARMS:
        mine = [row for row in grid if row["arm"] == arm]
        if mine:
            broken, number = sum(row["broken"] for row in mine), sum(row["seeds"] for row in mine)
            dead = statistics.fmean(row["dead"] for row in mine)
            said.append(f"{arm}: {broken} of {number} runs broke; {dead:.1f} experts dead at the end, on average.")
    verdicts = [_verdict(row["difference"]) for row in grid if row["arm"] == "no measure"]
    if verdicts:
        said.append(
            f"In {len(verdicts)} cells, without any measure the final loss is higher in {verdicts.count('higher')}, "
            f"lower in {verdicts.count('lower')}, and not distinguishable in {verdicts.count('not distinguishable')}."
        )
    for row in rows:
        if row["arm"] in SINGLE and row["difference"] is not None:
            mean, half = row["difference"]
            said.append(
                f"{_arm(row, study)}, in the harsh cell: the final loss is {_verdict(row['difference'])} "
                f"({mean:+.3f} ± {_shown(half)}), {row['dead']:.1f} experts dead."
            )
    return said


def _verdict(difference: list[float | None] | None) -> str:
    if difference is None or difference[1] is None:
        return "not distinguishable"
    mean, half = difference
    return "higher" if mean - half > 0 else "lower" if mean + half < 0 else "not distinguishable"


def markdown(record: dict[str, Any]) -> str:
    """Return the study as tables, with what they show."""
    settings, rows = record["settings"], record["summary"]
    study = STUDIES[settings["mixture"]]
    router, scale, rate = study.harsh
    experts = record["runs"][0]["experts"] if record["runs"] else 0
    lines = [
        "# Where a mixture of experts breaks, and what helps",
        "",
        f"{record['command']}; magma_moe (ours) with {study.what} ({experts} experts in all), frozen encoder; "
        f"{settings['steps']} steps of "
        f"{settings['batch_size']} pairs under bfloat16 autocast, AdamW, a tenth of the steps warm-up. "
        f"{settings['held_out']} held-out pairs, nats a token; mean and 95 % interval (Student's t) over seeds; "
        f"differences are paired by seed. {record['seconds'] / 60:.1f} core-minutes.",
        "",
        "**Broken** is a run whose held-out loss is not finite, or is at the end not below "
        f"{'that of the dense model, before training' if study is FFN else 'its value at step 0'}, or in "
        "which more than half of all experts are dead at the end (no held-out token goes to them). Scale is the "
        "standard deviation of the router's first weights.",
        "",
        f"All measures: the router in fp32; z-loss 1e-3; balance loss 1e-2; {study.start[0]}; jitter 1e-2; gradients "
        "clipped at norm 1 and steps without finite gradients skipped. No "
        f"measure: the router in bfloat16; {study.start[1]}; no clipping.",
        "",
        study.chosen,
        "",
        "| router | scale | learning rate | measures | broken | why | loss, step 0 | loss, end | against all measures "
        "| dead | largest logit | skipped | spikes |",
        "|---|---:|---:|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_line(row, study) for row in rows if row["arm"] in ARMS),
        "",
        f"One measure left out, in a harsh cell ({router}, scale {scale:g}, learning rate {rate:g}):",
        "",
        "| measures | broken | why | loss, end | against all measures | dead | largest logit | skipped | spikes |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
        *(_line(row, study, short=True) for row in rows if (row["router"], row["scale"], row["rate"]) == study.harsh),
        "",
        *(f"* {finding}" for finding in findings(study, rows)),
        "",
        f"![held-out loss by learning rate]({study.name}.png)",
        "",
    ]
    return "\n".join(lines)


def _arm(row: dict[str, Any], study: Study) -> str:
    """Return the arm's name: copies of MLPs are never zero-up."""
    return "without straight-through" if study.mixture == "ffn" and row["arm"] == _START else row["arm"]


def _line(row: dict[str, Any], study: Study, short: bool = False) -> str:
    cells = [f"{row['broken']}/{row['seeds']}", ", ".join(row["why"]) or "-"]
    cells += [] if short else [_pair(row["first"])]
    cells += [_pair(row["loss"]), _pair(row["difference"]), f"{row['dead']:.1f}", _shown(row["max_logit"], 1)]
    cells += [str(row["skipped"]), str(row["spikes"])]
    if not short:
        where = [row["router"], f"{row['scale']:g}", f"{row['rate']:g}"]
        return f"| {' | '.join([*where, row['arm'], *cells])} |"
    return f"| {' | '.join([_arm(row, study), *cells])} |"


def _pair(value: list[float | None] | None) -> str:
    return "-" if value is None else f"{value[0]:.3f} ± {_shown(value[1])}"


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the final loss by learning rate, a panel a router and scale: a dot a run, a line through the means.

    A cross is a broken run; one whose loss is not finite is at the top.
    """
    rates = STUDIES[record["settings"]["mixture"]].rates
    width, height, left, top = 330, 240, 60, 60
    image = Image.new("RGB", (left + width * len(SCALES) + 20, top + height * len(ROUTERS) + 20), "white")
    pen = ImageDraw.Draw(image)
    values = [run["last"] for run in record["runs"] if run["last"] is not None]
    low, high = min(values), max(values)
    colours = {"all measures": "#2471a3", "no measure": "#c0392b"}
    pen.text((left, 10), "held-out loss at the end by learning rate; x: broken", fill="black")
    for place, (arm, colour) in enumerate(colours.items()):
        pen.text((left + 380 + 140 * place, 10), arm, fill=colour)
    for (row, router), (column, scale) in product(enumerate(ROUTERS), enumerate(SCALES)):
        x0, y0 = left + width * column, top + height * row
        inner, tall = width - 60, height - 60

        def at(
            index: float, value: float | None, x0: int = x0, y0: int = y0, tall: int = tall, inner: int = inner
        ) -> tuple[float, float]:
            share = 1.0 if value is None else (value - low) / max(high - low, 1e-9)
            return x0 + inner * (index + 0.5) / len(rates), y0 + tall * (1 - share)

        pen.rectangle([x0, y0, x0 + inner, y0 + tall], outline="#999999")
        pen.text((x0, y0 - 16), f"{router}, scale {scale:g}", fill="black")
        for value in (low, high):
            pen.text((x0 - 34, at(0, value)[1] - 6), f"{value:.2f}", fill="black")
        for index, rate in enumerate(rates):
            pen.text((at(index, low)[0] - 14, y0 + tall + 6), f"{rate:g}", fill="black")
        for place, (arm, colour) in enumerate(colours.items()):
            means = []
            for index, rate in enumerate(rates):
                mine = _of(record["runs"], arm, router, scale, rate)
                shift = index + 0.12 * (2 * place - 1)
                for run in mine:
                    x, y = at(shift, run["last"])
                    if broke(run):
                        pen.line([x - 4, y - 4, x + 4, y + 4], fill=colour, width=2)
                        pen.line([x - 4, y + 4, x + 4, y - 4], fill=colour, width=2)
                    else:
                        pen.ellipse([x - 3, y - 3, x + 3, y + 3], outline=colour)
                finite = [run["last"] for run in mine if run["last"] is not None]
                means += [at(shift, statistics.fmean(finite))] if finite else []
            if len(means) > 1:
                pen.line(means, fill=colour, width=2)
    image.save(path)


def lacking(study: Study, runs: Sequence[dict[str, Any]], seeds: int) -> list[tuple[str, str, float, float, int]]:
    """Return what is to be run: seed after seed, so that a study broken off has whole seeds."""
    done = {(run["arm"], run["router"], run["scale"], run["rate"], run["seed"]) for run in runs}
    return [key for seed in range(seeds) for cell in cells(study) if (key := (*cell, seed)) not in done]


def write(record: dict[str, Any], out: Path) -> None:
    """Write the JSON file, whole or not at all."""
    study = STUDIES[record["settings"]["mixture"]]
    place = {cell: index for index, cell in enumerate(cells(study))}
    record["runs"].sort(key=lambda r: (r["seed"], place[r["arm"], r["router"], r["scale"], r["rate"]]))
    record["summary"] = summary(study, record["runs"])
    record["seconds"] = round(sum(run["seconds"] for run in record["runs"]), 1)
    write_json(out.with_suffix(".json"), record)


def main() -> None:
    """Run what is lacking and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixture", choices=STUDIES, default="adapters", help="of adapters, or of upcycled MLPs (ffn)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="to train on")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="pairs to measure the loss of")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, help="without suffix (experiments/results/...)")
    given = parser.parse_args()
    study = STUDIES[given.mixture]
    given.out = given.out or RESULTS / study.name
    settings = {name: getattr(given, name) for name in ("mixture", "steps", "batch_size", "pairs", "held_out")}
    path = given.out.with_suffix(".json")
    before = json.loads(path.read_text()) if path.is_file() else {}
    record: dict[str, Any] = {
        "command": f"python experiments/moe_stability.py{'' if study is ADAPTERS else f' --mixture {study.mixture}'}",
        "settings": settings,
        "runs": before.get("runs", []) if before.get("settings") == settings else [],
    }
    todo = lacking(study, record["runs"], given.seeds)
    print(f"{len(record['runs'])} runs done already, {len(todo)} to do", flush=True)
    context = get_context("spawn")
    with ProcessPoolExecutor(given.jobs, context, _use_pairs, (given.pairs, given.held_out)) as pool:
        work = [pool.submit(run, study.mixture, *key, given.steps, given.batch_size) for key in todo]
        for number, future in enumerate(as_completed(work), start=1):
            done = future.result()
            record["runs"].append(done)
            write(record, given.out)
            what = ", ".join(f"{name} {done[name]}" for name in ("arm", "router", "scale", "rate", "seed"))
            print(f"{number} of {len(todo)}: {what}: {done['first']} -> {done['last']} {broke(done)}", flush=True)
    write(record, given.out)
    write_text(given.out.with_suffix(".md"), markdown(record))
    draw(record, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
