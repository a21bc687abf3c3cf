"""Is there a setting that gains away from home and loses at most half a point there? Not run as a whole yet.

    python experiments/no_regret.py [--jobs 2]                     # over the mini sets
    python experiments/no_regret.py --world real --encoder DIR --text DIR     # over the pictures of ../shared/data

First every candidate (an approach and what holds it back) is trained with `SEARCH` seeds and scored along WiSE-FT's
line on **validation pictures only**: pictures of each set's bank, which ask the others of the bank. The setting, a
candidate and its alpha, is the one with the highest lower bound (mean less one standard error) of the gain out of
domain, among those whose change in domain has a lower bound of at least -0.5 points; if there is none, the one whose
lower bound in domain is the highest at an alpha of at least 0.1. It is then trained again with `CONFIRM` seeds that no
choice has seen, and only then, and only there, are test pictures looked at. The answer is yes if over those seeds the
interval of the change in domain lies above -0.5 points and that of the gain out of domain above 0.

Two caveats. The candidates are approaches whose figures on the same mini test sets are published (README), so which
ones are here was not chosen blindly. The choice's standard errors are over pictures, at two fixed seeds: they know
nothing of how seeds differ, and there are 16 candidates x 10 alphas to choose from; the confirming seeds count.

Hardware: two CPU cores, one thread a run. A run that has its files is not made again. Writes
experiments/results/no_regret_<world>.{json,md,png}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wlsup.batch import EvalSet
from wlsup.cli.configuration import load_run
from wlsup.errors import WlsupError
from wlsup.evaluation.features import Features
from wlsup.evaluation.scorers import KnnScorer
from wlsup.evaluation.statistics import over_seeds
from wlsup.evaluation.validation import picture_keys, take, validation_split
from wlsup.evaluation.wise_ft_curve import features_along
from wlsup.files import write_json, write_text

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared" / "data"
ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))
SEARCH, CONFIRM = (100, 101), (200, 201, 202, 203, 204)
MARGIN = -0.005
"""What may be lost in domain: half a point."""
FOLDS = 5


@dataclass(frozen=True)
class Candidate:
    """An approach, and options of `wlsup fit` that hold it back."""

    approach: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For folders and tables."""
        pairs = zip(self.options[::2], self.options[1::2], strict=True)
        told = [f"{key.rpartition('.')[2]} {value}" for key, value in pairs]
        return ", ".join([self.approach, *told])


def _held(approach: str, *options: str) -> Candidate:
    return Candidate(approach, options)


DISTILL, REPLAY, EMA = "--model.regularizer.distill", "--model.regularizer.replay", "--model.regularizer.ema"
CANDIDATES = [
    *(Candidate(name) for name in ("lst", "token_replay", "bottleneck", "film", "lora", "full", "mae_cl")),
    *(_held(name, DISTILL, weight) for name in ("film", "bottleneck", "lora", "full") for weight in ("1", "10")),
    *(_held(name, REPLAY, "10") for name in ("film", "full")),
    _held("full", EMA, "0.99"),
]


def fit(candidate: Candidate, seed: int, folder: Path, extra: Sequence[str]) -> None:
    """Train one run, unless it is there.

    Raises:
        WlsupError: it failed.
    """
    if (folder / "results.json").is_file() and (folder / "checkpoints" / "last.ckpt").is_file():
        return
    (folder / "results.json").unlink(missing_ok=True)  # a clone has the results, and not the weights
    recipes = ["-c", str(HERE / "base.yaml"), "-c", str(HERE / f"{candidate.approach}.yaml")]
    command = [sys.executable, "-m", "wlsup", "fit", *recipes, *extra, "--seed_everything", str(seed)]
    command += ["--run_dir", str(folder), "--data.eval_sets", "[]", *candidate.options]
    command += ["--resume", "auto"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if code or not (folder / "results.json").is_file():
        last = (folder / "output.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise WlsupError(f"{candidate.name}, seed {seed}: exit code {code}: {' '.join(last)}")


def folds(labels: Tensor, keys: Sequence[str]) -> Tensor:
    """Return (n,) the fold of each picture, by the hash of its key within its class."""
    order = sorted(range(len(keys)), key=lambda row: hashlib.sha256(f"no regret\0{keys[row]}".encode()).digest())
    fold, taken = torch.zeros(len(keys), dtype=torch.int64), {}
    for row in order:
        label = int(labels[row])
        fold[row] = taken.get(label, 0) % FOLDS
        taken[label] = taken.get(label, 0) + 1
    return fold


def bank_right(bank: Features, eval_set: EvalSet, whole: bool) -> Tensor:
    """Return which validation pictures are right, asking the rest of the bank.

    Args:
        bank: of one alpha.
        eval_set: whose bank it is.
        whole: every picture validates, fold by fold; False: a fifth of each class, whose captions nobody trained on.
    """
    scorer, classes = KnnScorer(), len(eval_set.class_names)
    keys = picture_keys(eval_set.train)
    keys = [keys[row] for row in bank.indices.tolist()]
    if not whole:
        split = validation_split(bank.labels, keys)
        return scorer(take(bank, split.bank), take(bank, split.validation), classes)
    right, fold = torch.zeros(len(keys), dtype=torch.bool), folds(bank.labels, keys)
    for number in range(FOLDS):
        mine, others = (fold == number).nonzero()[:, 0], (fold != number).nonzero()[:, 0]
        right[mine] = scorer(take(bank, others), take(bank, mine), classes)
    return right


def scored(folder: Path, sets: Sequence[Any], alphas: Sequence[float], part: str, captioned: Sequence[str]) -> dict:
    """Return by set its domain and which pictures are right at each alpha: (A, n) bool.

    Args:
        folder: of a finished run.
        sets: as ``data.eval_sets``.
        alphas: the places, the pretrained encoder's 0 first.
        part: "validation", pictures of the banks, or "test".
        captioned: sets of which some bank pictures were trained on.
    """
    path, names = folder / f"no_regret_{part}.pt", [getattr(one, "name", one) for one in sets]
    if path.is_file():
        found = torch.load(path, weights_only=True)
        if found["alphas"] == list(alphas) and list(found["sets"]) == names:
            return found["sets"]
    module, data = load_run(folder)
    data.image_spec, data.eval_sets = module.image_spec, list(sets)
    state, start = module.state_dict(), module.start.tensors
    end = {name: state[name].detach().clone() for name in start}
    module.start.check(module)
    results: dict[str, Any] = {}
    for eval_set in data.eval_datasets():
        banks = dict(features_along(module, start, end, eval_set.train, alphas, module.start.held))
        if part == "validation":
            right = [bank_right(banks[alpha], eval_set, eval_set.name not in captioned) for alpha in alphas]
        else:
            queries = dict(features_along(module, start, end, eval_set.test, alphas, module.start.held))
            right = [KnnScorer()(banks[a], queries[a], len(eval_set.class_names)) for a in alphas]
        results[eval_set.name] = {"domain": eval_set.domain, "right": torch.stack(right)}
    torch.save({"alphas": list(alphas), "sets": results}, path)
    return results


def changes(runs: Sequence[Mapping[str, Any]], domain: str, place: int) -> tuple[float, float]:
    """Return the mean change from alpha 0, and its standard error over pictures; means over seeds, then over sets.

    Args:
        runs: of `scored`, one a seed; the sets' pictures are the same ones.
        domain: "in" or "out".
        place: which alpha.
    """
    means, errors = [], []
    for name in (name for name, entry in runs[0].items() if entry["domain"] == domain):
        each = torch.stack([run[name]["right"][place].double() - run[name]["right"][0].double() for run in runs])
        by_picture = each.mean(0)
        means.append(float(by_picture.mean()))
        errors.append(float(by_picture.std()) / math.sqrt(len(by_picture)))
    return statistics.fmean(means), math.sqrt(sum(error**2 for error in errors)) / len(errors)


def choose(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, int, bool]:
    """Return the candidate, the place of its alpha, and whether it keeps the margin on validation pictures."""
    able, others = [], []
    for name, runs in curves.items():
        for place in range(1, len(ALPHAS)):
            (inside, inside_error), (outside, outside_error) = (changes(runs, d, place) for d in ("in", "out"))
            low_in, low_out = inside - inside_error, outside - outside_error
            (able if low_in >= MARGIN else others).append((low_out if low_in >= MARGIN else low_in, name, place))
    best = max(able or others, key=lambda entry: (entry[0], -entry[2]))
    return best[1], best[2], bool(able)


def confirmed(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the changes on test pictures: mean and interval over seeds, by domain and by set; of alphas (0, a)."""
    found: dict[str, Any] = {"sets": {}}
    for name, entry in runs[0].items():
        deltas = [float((run[name]["right"][1].double() - run[name]["right"][0].double()).mean()) for run in runs]
        pretrained = float(runs[0][name]["right"][0].double().mean())
        test = entry["right"].shape[1]
        found["sets"][name] = {"domain": entry["domain"], "pretrained": pretrained, "test": test} | over_seeds(deltas)
    for domain in ("in", "out"):
        names = [name for name, entry in runs[0].items() if entry["domain"] == domain]
        by_seed = [statistics.fmean(found["sets"][name]["values"][seed] for name in names) for seed in range(len(runs))]
        mean, error = changes(runs, domain, 1)
        pictures = {"pictures_ci95": [mean - 1.96 * error, mean + 1.96 * error]}
        found[domain] = over_seeds(by_seed) | pictures
    return found


def real_captions(folder: Path) -> list[str]:
    """Write Flickr8k's captions and DTD's training descriptions beside their pictures; return options that name them.

    Of DTD's training pictures a fifth, which validates, is left out, and all of its test pictures.

    Raises:
        WlsupError: ../shared/data is not there.
    """
    import csv
    import tarfile

    if not SHARED.is_dir():
        raise WlsupError(f"The real pictures are not here: {SHARED} is missing.")
    table = folder / "captions.csv"
    if not table.is_file():
        rows = list(csv.DictReader((SHARED / "dtd10" / "labels.csv").open(encoding="utf-8")))
        train = [row for row in rows if row["split"] == "train"]
        split = validation_split(torch.tensor([int(row["label"]) for row in train]), [row["file"] for row in train])
        kept = {train[row]["file"].removeprefix("images/") for row in split.bank.tolist()}
        described = json.loads((SHARED / "dtd10" / "image_descriptions.json").read_text(encoding="utf-8"))
        captions = [
            (f"dtd/images/{one['image_name']}", text)
            for one in described
            if one["image_name"] in kept
            for text in one["descriptions"]
        ]
        with (SHARED / "flickr8k_1k" / "captions.txt").open(encoding="utf-8") as file:
            captions += [(f"flickr/{row['image']}", row["caption"]) for row in csv.DictReader(file)]
        for name, tar in (("dtd", "dtd10/dtd10_128px.tar"), ("flickr", "flickr8k_1k/flickr8k_1k_160px.tar")):
            with tarfile.open(SHARED / tar) as archive:
                archive.extractall(folder / "pictures" / name, filter="data")
        there = {str(path.relative_to(folder / "pictures")) for path in (folder / "pictures").rglob("*.jpg")}
        places = {Path(name).name if name.startswith("flickr") else name: name for name in there}
        lines = [("image", "caption")]
        for name, text in captions:
            place = name if name in there else places.get(Path(name).name)
            if place is not None:
                lines.append((place, text))
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
    return ["--data.source", "table", "--data.captions", str(table), "--data.images", str(folder / "pictures")]


def world_options(world: str, folder: Path, encoder: str | None, text: str | None) -> tuple[list[str], list[Any]]:
    """Return options of every run, and the sets to score."""
    if world == "mini":
        return [], ["mini_shapes", "mini_digits", "mini_landcover", "mini_textures"]
    if not encoder or not text:
        raise WlsupError("--world real needs --encoder (experiments/pretrain_real.yaml makes it) and --text.")
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-c", str(HERE / "overlays" / "flickr8k.yaml"), *real_captions(folder)]
    options += ["--model.encoder.weights", encoder, "--model.text.weights", text, "--data.pairs", "1300"]
    options += ["--trainer.max_epochs", "15", "--data.replay", str(SHARED / "cifar10" / "cifar10_unlabelled_25k.tar")]
    sets = [
        {"name": name, "kind": "table", "images": f"{SHARED}/{name}/{tar}", "labels": f"{SHARED}/{name}/labels.csv"}
        | {"domain": domain}
        for name, tar, domain in (("cifar10", "cifar10.tar", "in"), ("dtd10", "dtd10_128px.tar", "out"))
    ]
    from wlsup.data.evalsets import EvalSetSpec

    return options, [*(EvalSetSpec(**entry) for entry in sets), "mini_digits"]


def markdown(record: Mapping[str, Any]) -> str:
    """Return the study as tables."""
    chosen, test = record["chosen"], record["test"]
    kept = "" if chosen["keeps_margin"] else " No setting kept the margin on validation pictures; this came nearest."
    test_in, test_out = (test[domain]["ci95"] for domain in ("in", "out"))
    yes = test_in[0] >= MARGIN and test_out[0] > 0
    answer = "Yes" if yes else "No" if test_in[1] < MARGIN or test_out[1] <= 0 else "Not shown"
    captioned = "; four fifths of dtd10's bank pictures were trained on with descriptions that name their texture"
    captioned = captioned if record["world"] == "real" else ""
    lines = [
        f"# No regret, {record['world']} world",
        "",
        f"{record['command']}; {len(record['candidates'])} candidates, seeds {record['search_seeds']} for the choice "
        f"and {record['confirm_seeds']} for the test.",
        "",
        f"**{answer}.** Chosen on validation pictures: {chosen['candidate']} at alpha {chosen['alpha']}.{kept}",
        "",
        "On test pictures, with seeds that no choice has seen; change in points, mean and 95 % interval over seeds "
        f"(Student's t), and over pictures{captioned}:",
        "",
        "| | change | over seeds | over pictures |",
        "|---|---:|---:|---:|",
    ]
    for domain in ("in", "out"):
        entry = test[domain]
        lines.append(
            f"| {domain} domain | {_points(entry['mean'])} | {_interval(entry['ci95'])} "
            f"| {_interval(entry['pictures_ci95'])} |"
        )
    for name, entry in test["sets"].items():
        lines.append(
            f"| {name} ({entry['domain']}, {entry['test']} pictures, {100 * entry['pretrained']:.1f} % before) "
            f"| {_points(entry['mean'])} | {_interval(entry['ci95'])} | |"
        )
    lines += [
        "",
        "Each candidate on validation pictures, at the alpha with its best lower bound out of domain inside the margin "
        "(or, where there is none, with its best in domain), and at alpha 1; mean ± one standard error over pictures:",
        "",
        "| candidate | alpha | in domain | out of domain | in domain, alpha 1 | out of domain, alpha 1 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["candidates"]:
        cells = [_pair(row[key]) for key in ("in", "out", "in_at_1", "out_at_1")]
        lines.append(f"| {row['name']} | {row['alpha']} | {' | '.join(cells)} |")
    lines += ["", f"![in domain against out of domain](no_regret_{record['world']}.png)", ""]
    return "\n".join(lines)


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _interval(limits: Sequence[float] | None) -> str:
    return "-" if limits is None else f"[{_points(limits[0])}, {_points(limits[1])}]"


def _pair(value: Sequence[float]) -> str:
    return f"{_points(value[0])} ± {100 * value[1]:.2f}"


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]], record: Mapping[str, Any], path: Path) -> None:
    """Draw each candidate's line on validation pictures, from alpha 0 to 1, and the test of the chosen one."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5))
    for number, (name, runs) in enumerate(curves.items()):
        line = [[100 * changes(runs, domain, place)[0] for domain in ("in", "out")] for place in range(len(ALPHAS))]
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axes.plot(*zip(*line, strict=True), style, marker=".", markersize=4, linewidth=1, label=name)
    test = record["test"]
    spread = [[100 * (test[d]["mean"] - test[d]["ci95"][0])] for d in ("in", "out")]
    axes.errorbar(
        100 * test["in"]["mean"], 100 * test["out"]["mean"], xerr=spread[0], yerr=spread[1], fmt="k*", markersize=12,
        capsize=3, label="chosen, on test pictures",
    )  # fmt: skip
    axes.axvline(100 * MARGIN, color="grey", linewidth=0.8)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("change in domain, points of k-NN accuracy")
    axes.set_ylabel("change out of domain, points")
    axes.set_title(f"WiSE-FT's lines from the pretrained encoder (0, 0), {record['world']} world, validation pictures")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _summary(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    _, place, _ = choose({name: runs})
    at = {"in": place, "out": place, "in_at_1": len(ALPHAS) - 1, "out_at_1": len(ALPHAS) - 1}
    return {"name": name, "alpha": ALPHAS[place]} | {
        key: list(changes(runs, key.partition("_")[0], where)) for key, where in at.items()
    }


def main() -> int:
    """Search, choose, confirm, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=["mini", "real"], default="mini")
    parser.add_argument("--encoder", help="folder of the real world's encoder")
    parser.add_argument("--text", help="folder of the real world's text encoder")
    parser.add_argument("--candidates", nargs="*", help="names, as in the table; all without")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    runs = options.out / "runs" / f"no_regret_{options.world}"
    extra, sets = world_options(options.world, runs, options.encoder, options.text)
    captioned = ("dtd10",) if options.world == "real" else ()
    chosen = [one for one in CANDIDATES if not options.candidates or one.name in options.candidates]

    def folder(candidate: Candidate, seed: int) -> Path:
        return runs / candidate.name.replace(", ", "-").replace(" ", "_") / f"seed{seed}"

    def fitted(pairs: Sequence[tuple[Candidate, int]]) -> None:
        with ThreadPoolExecutor(options.jobs) as pool:
            for _ in pool.map(lambda pair: fit(*pair, folder(*pair), extra), pairs):
                print(".", end="", flush=True)
        print()

    fitted([(candidate, seed) for candidate in chosen for seed in SEARCH])
    curves = {
        one.name: [scored(folder(one, seed), sets, ALPHAS, "validation", captioned) for seed in SEARCH]
        for one in chosen
    }
    name, place, able = choose(curves)
    winner = next(one for one in chosen if one.name == name)
    fitted([(winner, seed) for seed in CONFIRM])
    tested = [scored(folder(winner, seed), sets, (0.0, ALPHAS[place]), "test", captioned) for seed in CONFIRM]
    record = {
        "command": f"python experiments/no_regret.py --world {options.world}",
        "world": options.world,
        "search_seeds": list(SEARCH),
        "confirm_seeds": list(CONFIRM),
        "chosen": {"candidate": name, "alpha": ALPHAS[place], "keeps_margin": able, "options": list(winner.options)},
        "test": confirmed(tested),
        "candidates": [_summary(one, found) for one, found in curves.items()],
    }
    stem = options.out / f"no_regret_{options.world}"
    write_json(stem.with_suffix(".json"), record)
    write_text(stem.with_suffix(".md"), markdown(record))
    draw(curves, record, stem.with_suffix(".png"))
    print(markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
