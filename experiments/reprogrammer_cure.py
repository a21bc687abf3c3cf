"""Show whether adapters fed by an untrained reprogrammer fail to converge, and what helps.

    python experiments/reprogrammer_cure.py             # writes experiments/results/reprogrammer_cure.{json,md,png}

The talk that this suite follows found that they see noise and do not converge. Here a caption reprogrammer that is
learned from nothing feeds token replay adapters (both ours) in the frozen mini encoder; the objective is token_replay's
own. Each arm switches some of the measures on; all else is the same, seed by seed: weights, batches, masks, steps.

As token replay adapters are drawn, they are weak even with open gates: what they add is small against what is there.
So that there is a harm to cure, their up-projections are scaled until what each block gets added is as large as what
it has (root mean square); the arm "none, weak adapters" leaves them as they are drawn.

Hardware: CPU; one thread. Time: the JSON file has the seconds of each run; runs = arms x seeds. A run that is in the
JSON file with the same settings is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from wlsup.approaches.token_replay import TokenReplayApproach
from wlsup.data.datamodule import CaptionDataModule
from wlsup.errors import WlsupError
from wlsup.optim import OptimizerSpec, build_optimizer, build_schedule
from wlsup.reprogramming.conditioner import ReprogrammerSpec

RESULTS = Path(__file__).parent / "results"
OPEN_GATE = 1.0  # g of a gate that is open from the start: tanh(1) = 0.76
WEAK = "none, weak adapters"
ON_TOP = "all three, warm-up on top"  # of the steps, instead of a quarter of them

# name -> (gates shut at the start, statistics matched, warmed up first); None: the text encoder's tokens instead
ARMS: dict[str, tuple[bool, bool, bool] | None] = {
    "none": (False, False, False),
    "shut gates": (True, False, False),
    "matched statistics": (False, True, False),
    "warm-up": (False, False, True),
    "all three": (True, True, True),
    ON_TOP: (True, True, True),
    WEAK: (False, False, False),
    "text encoder's tokens, none": None,
}
COLOURS = ("#c0392b", "#2471a3", "#d68910", "#7d3c98", "#1e8449", "#17202a", "#e59866", "#7f8c8d")


def build(arm: str, steps: int, lr: float) -> TokenReplayApproach:
    """Build one arm's approach, with or without matched statistics and warm-up."""
    measures = ARMS[arm]
    _, match, warm = measures or (False, False, False)
    spec = ReprogrammerSpec(
        match="statistics" if match else "none", warmup_batches=steps // 4 if warm else 0, skip_nonfinite=10
    )
    return TokenReplayApproach(lr=lr, source="caption", reprogrammer=None if measures is None else spec)


@torch.no_grad()
def start(approach: TokenReplayApproach, arm: str, batch: Any) -> None:
    """Calibrate the statistics, scale the adapters block after block, and open or shut their gates."""
    approach.eval()
    condition = approach.text(batch.captions)
    if approach.reprogrammer is not None:
        approach.reprogrammer.calibrate(approach.encoder, batch.images)
        condition = approach.reprogrammer(batch.captions, condition)
    ratios: dict[int, float] = {}
    sites = list(approach.adapter.replay_sites)
    for index, site in enumerate(sites):
        torch.nn.init.constant_(site.g, OPEN_GATE)
        site.register_forward_hook(
            lambda module, inputs, output, index=index: ratios.update(
                {index: float((output - inputs[0]).square().mean().sqrt() / inputs[0].square().mean().sqrt())}
            )
        )
    for index, site in enumerate(sites if arm != WEAK else []):
        approach.encoder(batch.images, condition)
        site.up.weight.div_(ratios[index])
    for site in sites:
        site._forward_hooks.clear()
        if ARMS[arm] is not None and ARMS[arm][0]:
            torch.nn.init.zeros_(site.g)


def run(arm: str, seed: int, steps: int, batch_size: int, lr: float, every: int) -> dict[str, Any]:
    """Train one arm; return its curves: held-out losses, by step."""
    torch.manual_seed(seed)
    approach = build(arm, steps, lr)
    data = CaptionDataModule(pairs=512, validation_pairs=64, batch_size=64, seed=seed, eval_sets=["mini_shapes"])
    data.image_spec = approach.image_spec
    data.setup()
    held_out = next(iter(data.val_dataloader()))  # all 64 at once
    data.batch_size = batch_size
    approach.setup("fit")
    spec = OptimizerSpec(warmup_fraction=0.1)
    optimizer = build_optimizer(spec, approach.plan.parameter_groups(approach))
    extra = approach.reprogrammer.spec.warmup_batches if arm == ON_TOP else 0
    schedule = build_schedule(spec, optimizer, max(steps + extra, 1))
    loader, epoch, curve, began = data.train_dataloader(), 0, [], time.perf_counter()
    batches = iter(loader)
    failed = ""
    for step in range(-extra, steps + 1):
        batch = next(batches, None)
        if batch is None:
            epoch += 1
            loader.sampler.set_epoch(epoch)
            batches = iter(loader)
            batch = next(batches)
        if step == -extra:
            start(approach, arm, batch)
        if step >= 0 and step % every == 0:
            curve.append({"step": step, **evaluate(approach, held_out)})
        if step == steps:
            break
        torch.manual_seed(seed * 100_003 + step + extra)
        approach.train()
        optimizer.zero_grad()
        try:
            loss = approach.losses(batch)["loss"]
        except WlsupError as error:
            failed = str(error)
            break
        if not torch.isfinite(loss.detach()):
            continue
        loss.backward()
        torch.nn.utils.clip_grad_norm_(approach.parameters(), 1.0)
        optimizer.step()
        approach.after_step()
        schedule.step()
    guard = None if approach.reprogrammer is None else approach.reprogrammer.guard.skipped
    seconds = round(time.perf_counter() - began, 1)
    return {"arm": arm, "seed": seed, "curve": curve, "skipped": guard, "failed": failed, "seconds": seconds}


@torch.no_grad()
def evaluate(approach: TokenReplayApproach, batch: Any) -> dict[str, float]:
    """Return the losses of the held-out pairs, with the same masks every time."""
    approach.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: float(value) for name, value in approach.losses(batch).items()}


def pretrained_loss(seed: int = 0) -> float:
    """Return the held-out reconstruction loss of the pretrained encoder: shut gates, before step 1."""
    return run("shut gates", seed, 0, 16, 1e-3, 1)["curve"][0]["reconstruction"]


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by arm: means and 95 % intervals (t, over seeds) of the last held-out losses."""
    rows: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        mine = [r for r in runs if r["arm"] == arm]
        if not mine:
            continue
        rows[arm] = {"seeds": len(mine), "skipped": sum(r["skipped"] or 0 for r in mine)}
        rows[arm]["failed"] = sum(bool(r["failed"]) for r in mine)
        for part in ("loss", "reconstruction", "contrastive"):
            for place, index in (("first", 0), ("last", -1)):
                rows[arm][f"{part}_{place}"] = interval([r["curve"][index][part] for r in mine])
        none = {r["seed"]: r["curve"][-1]["loss"] for r in runs if r["arm"] == "none"}
        paired = [r["curve"][-1]["loss"] - none[r["seed"]] for r in mine if r["seed"] in none]
        rows[arm]["against_none"] = interval(paired) if arm != "none" and paired else None
    return rows


def interval(values: Sequence[float]) -> list[float]:
    """Return the mean and the half width of its 95 % interval by Student's t."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    n = len(values)
    half = t.get(n, 1.96) * statistics.stdev(values) / math.sqrt(n) if n > 1 else float("nan")
    return [statistics.fmean(values), half]


def markdown(record: dict[str, Any]) -> str:
    """Return the result as a table, with what it shows."""
    settings, rows = record["settings"], record["summary"]
    lines = [
        "# Adapters fed by an untrained reprogrammer: what helps",
        "",
        f"{record['command']}; {settings['steps']} steps of {settings['batch_size']} pairs, lr {settings['lr']:g}, one "
        "CPU thread, mini preset. Token replay adapters and the reprogrammer are ours. Losses of 64 held-out pairs; "
        "mean and 95 % interval (Student's t) over seeds; differences are paired by seed. Warm-up takes a quarter of "
        "the steps, so the adapters train for fewer, but for the arm that has it on top. Adapters are scaled until "
        "each adds as much as its block has, but for the weak ones, which are as token_replay draws them, with open "
        "gates. The pretrained encoder's reconstruction loss is "
        f"{record['pretrained_reconstruction']:.3f}; contrast at chance is {math.log(64):.3f}.",
        "",
        "| measures | seeds | reconstruction, step 0 | reconstruction, end | contrastive, end | loss, end | "
        "loss against none | batches skipped | runs stopped |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm, row in rows.items():
        cells = [row[key] for key in ("reconstruction_first", "reconstruction_last", "contrastive_last", "loss_last")]
        cells.append(row["against_none"])
        shown = [f"{c[0]:.3f} ± {c[1]:.3f}" if c else "-" for c in cells]
        lines.append(f"| {arm} | {row['seeds']} | {' | '.join(shown)} | {row['skipped']} | {row['failed']} |")
    lines += ["", *(f"* {finding}" for finding in findings(rows)), "", "![loss curves](reprogrammer_cure.png)", ""]
    return "\n".join(lines)


def findings(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Say of each arm whether its last loss differs from that without any measure."""
    said = []
    for arm, row in rows.items():
        if row["against_none"] is None:
            continue
        mean, half = row["against_none"]
        verdict = "lower" if mean + half < 0 else "higher" if mean - half > 0 else "not distinguishable"
        said.append(f"{arm}: the final loss is {verdict} against none ({mean:+.3f} ± {half:.3f}).")
    return said


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the held-out loss by step: the mean over seeds, and each seed thinly."""
    width, height, left, top, right, bottom = 1000, 520, 70, 40, 250, 50
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    runs = record["runs"]
    values = [p["loss"] for r in runs for p in r["curve"] if math.isfinite(p["loss"])]
    steps, low, high = record["settings"]["steps"], min(values), max(values)

    def at(step: float, value: float) -> tuple[float, float]:
        x = left + (width - left - right) * step / steps
        return x, top + (height - top - bottom) * (high - value) / max(high - low, 1e-9)

    for tick in range(6):
        value, step = low + (high - low) * tick / 5, steps * tick / 5
        pen.line([at(0, value), at(steps, value)], fill="#dddddd")
        pen.text((8, at(0, value)[1] - 6), f"{value:.2f}", fill="black")
        pen.text((at(step, low)[0] - 8, height - bottom + 8), f"{step:.0f}", fill="black")
    pen.text((left, 12), "held-out loss by step: mean over seeds (thick), each seed (thin)", fill="black")
    for colour, arm in zip(COLOURS, ARMS, strict=True):
        mine = [r["curve"] for r in runs if r["arm"] == arm]
        if not mine:
            continue
        for curve in mine:
            pen.line([at(p["step"], p["loss"]) for p in curve], fill=faint(colour), width=1)
        length = min(map(len, mine))
        mean = [(mine[0][i]["step"], statistics.fmean(c[i]["loss"] for c in mine)) for i in range(length)]
        pen.line([at(*point) for point in mean], fill=colour, width=3)
        y = top + 24 * list(ARMS).index(arm)
        pen.line([(width - right + 15, y + 6), (width - right + 40, y + 6)], fill=colour, width=3)
        pen.text((width - right + 48, y), arm, fill="black")
    image.save(path)


def faint(colour: str) -> tuple[int, int, int]:
    """Return a colour mixed with white."""
    return tuple((int(colour[i : i + 2], 16) + 2 * 255) // 3 for i in (1, 3, 5))  # type: ignore[return-value]


def main() -> None:
    """Run what is lacking and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=RESULTS / "reprogrammer_cure")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"steps": given.steps, "batch_size": given.batch_size, "lr": given.lr}
    path = given.out.with_suffix(".json")
    before = json.loads(path.read_text()) if path.is_file() else {}
    record: dict[str, Any] = {
        "command": "python experiments/reprogrammer_cure.py",
        "settings": settings,
        "pretrained_reconstruction": before.get("pretrained_reconstruction") or pretrained_loss(),
        "runs": before.get("runs", []) if before.get("settings") == settings else [],
    }
    for seed in range(given.seeds):
        for arm in ARMS:
            if any(r["arm"] == arm and r["seed"] == seed for r in record["runs"]):
                continue
            record["runs"].append(run(arm, seed, given.steps, given.batch_size, given.lr, max(given.steps // 8, 1)))
            record["summary"] = summary(record["runs"])
            path.write_text(json.dumps(record, indent=1) + "\n")
            done = record["runs"][-1]
            print(f"seed {seed} {arm}: {done['curve'][-1]} in {done['seconds']} s", flush=True)
    given.out.with_suffix(".md").write_text(markdown(record))
    draw(record, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
