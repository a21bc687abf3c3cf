"""Every approach over several seeds, and the table of what each did: `make results`.

    python experiments/run_results.py [--approaches NAME ...] [--seeds 0 1 2] [--jobs N] [--out DIR] [-- OPTIONS]

A run that has its results.json is not run again: the same call goes on with one that was broken off. OPTIONS go to
every `wlsup fit`. Runs lie in DIR/runs/mini/NAME/seedK; the table, written after every run, in DIR/mini.{json,md}: of
these approaches, and of those that have runs from before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from wlsup.approaches import APPROACHES
from wlsup.errors import WlsupError, choose
from wlsup.evaluation.knn import PROTOCOL
from wlsup.evaluation.statistics import Interval, mean_of_intervals, over_seeds, wilson
from wlsup.files import write_json, write_text

HERE = Path(__file__).parent
ROOT = HERE.parent
_SCORES = {
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "meteor": "METEOR (nltk)",
}
_DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
_TRAINED = " (trained)"


def run(approach: str, seed: int, folder: Path, preset: str, options: list[str]) -> str | None:
    """Make one run, in a process of its own; return what went wrong, None if nothing did."""
    if folder.exists():
        shutil.rmtree(folder)  # broken off before: it has no results.json
    folder.mkdir(parents=True)
    recipes = [HERE / "base.yaml", HERE / f"{approach}.yaml"]
    overlays = [HERE / "overlays" / f"{name}.yaml" for name in (f"{preset}_{approach}", preset)]
    if preset != "mini":
        recipes.append(next((overlay for overlay in overlays if overlay.is_file()), overlays[-1]))
        values = HERE / "overlays" / preset / f"{approach}.yaml"
        recipes += [values] if values.is_file() else []
    command = [sys.executable, "-m", "wlsup", "fit"]
    for recipe in recipes:
        command += ["-c", str(recipe)]
    command += ["--seed_everything", str(seed), "--run_dir", str(folder), *options]
    with (folder / "output.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if code == 0 and (folder / "results.json").is_file():
        return None
    lines = (folder / "output.log").read_text(errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1] if lines else 'no output'}"


def summarise(approach: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one approach's row out of its runs' results."""
    knn = {}
    for name, entry in results[0]["knn"].items():
        knn[name] = {
            "domain": entry["domain"],
            "pretrained": entry["pretrained"],
            "test": entry.get("test"),
            "finetuned": over_seeds([result["knn"][name]["finetuned"] for result in results]),
            "delta": over_seeds([result["knn"][name]["delta"] for result in results]),
        }
    row: dict[str, Any] = {"approach": approach, "seeds": [result["seed"] for result in results], "knn": knn}
    for name in ("in_domain_delta", "out_of_domain_delta"):
        values = [result["summary"][name] for result in results if result["summary"][name] is not None]
        row[name] = over_seeds(values) if len(values) == len(results) else None
        if row[name] and len(values) == 1:  # nothing over seeds: then over test pictures, and said so
            domain = "in" if name == "in_domain_delta" else "out"
            mine = [one for one in results[0]["knn"].values() if one["domain"] == domain]
            if all("ci95" in one for one in mine):
                sets = [Interval(one["delta"], *one["ci95"]) for one in mine]
                row[name]["pictures_ci95"] = list(mean_of_intervals(sets)[1:])
    memory = [result.get("peak_memory_mib", {}) for result in results]
    row |= {
        "parameters": results[0]["parameters"],
        "pairs": results[0]["captions"]["pairs"],
        "steps": results[0]["steps"],
        # The middle one: a run of two threads computes longer than one of one thread, and beside others longer still.
        "seconds": statistics.median(result["seconds"] for result in results),
        "processor_seconds": statistics.median(result["processor_seconds"] for result in results),
        "peak_resident_mib": max((one.get("resident") or 0 for one in memory), default=0),
        "peak_gpu_mib": max((one.get("gpu") or 0 for one in memory), default=0) or None,
        "retrieval": _retrieval(results),
        "task": _task(results),
        "captioning": _captioning(results),
    }
    return row


def _retrieval(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return recall@k of held-out pairs, {direction: {k: over seeds}}, None without a shared space."""
    found = [result.get("retrieval") for result in results]
    if not all(found):
        return None
    recalls = {
        direction: {k: over_seeds([one[direction][k] for one in found]) for k in found[0]["chance"]}
        for direction in _DIRECTIONS
    }
    return {"pairs": found[0]["pairs"], "chance": found[0]["chance"], **recalls}


def _task(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what the approach measured of itself, each figure over the seeds that have it."""
    tasks = [result["task"] for result in results if result.get("task")]
    if not tasks:
        return None
    found: dict[str, list[dict[str, Any]]] = {}
    for row in (row for task in tasks for row in task["rows"]):
        found.setdefault(row["what"].removesuffix(_TRAINED), []).append(row)
    rows = []
    for what, same in found.items():
        trained = sum(row["what"].endswith(_TRAINED) for row in same)  # seeds of selective_k may choose otherwise
        told = _TRAINED if trained == len(same) else f" (trained by {trained} of {len(same)} seeds)" if trained else ""
        less = f" ({len(same)} of {len(tasks)} seeds)" if len(same) < len(tasks) else ""
        value = over_seeds([row["value"] for row in same])
        rows.append({"what": what + told + less, "unit": same[0]["unit"], "chance": same[0]["chance"], "value": value})
    return {"title": tasks[0]["title"], "rows": rows}


def _captioning(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the scores of held-out pictures' captions over the seeds, None for an approach that does not caption."""
    found = [result["captioning"] for result in results if result.get("captioning")]
    if not found:
        return None
    names = [name for name in found[0]["scores"] if all(name in one["scores"] for one in found)]
    scores = {name: over_seeds([one["scores"][name]["value"] for one in found]) for name in names}
    told = {"pictures": found[0]["pictures"], "generation": found[0]["generation"]}
    return told | {"seeds": len(found), "scores": scores}


def markdown(
    rows: list[dict[str, Any]], failures: dict[str, str], preset: str, walls: dict[str, float] | None = None
) -> str:
    """Return the table for people; ``walls`` are seconds of `make train` by approach (train_time.py)."""
    wall = " wall s |" if walls else ""
    lines = [
        f"# {'Every approach' if len(rows) == len(APPROACHES) else 'Approaches'}, preset `{preset}`",
        "",
        "Change of k-NN accuracy against the pretrained encoder, in points: mean over seeds, and its 95 % interval",
        "over seeds (Student's t). In domain and out of domain are means over their sets. Bold: the interval excludes",
        "0. A dash: the encoder is not trained, so its k-NN accuracy cannot change. Core s: seconds of computing,",
        "added up over cores, of the middle seed. Steps: of 64 pairs each, unless a recipe says otherwise; fewer where",
        "each is dear. (pictures): of one seed, over its test pictures.",
        *(["Wall s: of `make train`, alone on two cores after set-up, seed 0."] if walls else []),
        f"Protocol: {PROTOCOL}.",
        "",
        "| approach | seeds | steps | in domain | out of domain | trained | core s |" + wall + " peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|" + ("---:|" if walls else "") + "---:|",
    ]
    for row in rows:
        share = 100 * row["parameters"]["trained"] / row["parameters"]["total"]
        lines.append(
            f"| `{row['approach']}` | {len(row['seeds'])} | {row['steps']} | {_points(row['in_domain_delta'])} "
            f"| {_points(row['out_of_domain_delta'])} | {row['parameters']['trained']:,} ({share:.1f} %) "
            f"| {row['processor_seconds']:.0f} |{_wall(walls, row['approach'])} {row['peak_resident_mib']:,.0f} |"
        )
    if rows and (sets := list(rows[0]["knn"])):
        lines += [
            "",
            "By set, accuracy in %, pretrained first (± half an interval; of one encoder over test pictures):",
            "",
            "| approach | " + " | ".join(sets) + " |",
        ]
        lines += ["|---|" + "---:|" * len(sets)]
        cells = [_alone(rows[0]["knn"][name]["pretrained"], rows[0]["knn"][name].get("test")) for name in sets]
        lines.append("| pretrained | " + " | ".join(cells) + " |")
        for row in rows:
            cells = [_finetuned(row["knn"][name]) if name in row["knn"] else "" for name in sets]
            lines.append(f"| `{row['approach']}` | " + " | ".join(cells) + " |")
    lines += _tasks_markdown(rows)
    for name, reason in failures.items():
        lines += ["", f"`{name}` failed: {reason}"]
    return "\n".join(lines) + "\n"


def _tasks_markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return what approaches measured beside k-NN, in lines."""
    lines = []
    if found := [row for row in rows if row["retrieval"]]:
        pairs, chance = found[0]["retrieval"]["pairs"], found[0]["retrieval"]["chance"]
        cells = [(direction, k) for direction in _DIRECTIONS for k in chance if k != "5"]
        by_chance = ", ".join(f"R@{k} {100 * value:.1f}" for k, value in chance.items() if k != "5")
        lines += ["", f"Retrieval over {pairs} held-out pairs, recall in % (chance: {by_chance}):", ""]
        lines += ["| approach | " + " | ".join(f"{_DIRECTIONS[direction]}, R@{k}" for direction, k in cells) + " |"]
        lines += ["|---|" + "---:|" * len(cells)]
        for row in found:
            recalls = [_accuracy(row["retrieval"][direction][k]) for direction, k in cells]
            lines.append(f"| `{row['approach']}` | " + " | ".join(recalls) + " |")
    if found := [row for row in rows if row["captioning"]]:
        pictures, names = (
            found[0]["captioning"]["pictures"],
            [n for n in _SCORES if n in found[0]["captioning"]["scores"]],
        )
        lines += ["", f"Captions of {pictures} held-out pictures, scored against people's (bigger is better):", ""]
        lines += ["| approach | " + " | ".join(_SCORES[name] for name in names) + " |", "|---|" + "---:|" * len(names)]
        for row in found:
            scores = [row["captioning"]["scores"].get(name) for name in names]
            cells = ["" if one is None else _figure({"unit": "", "value": one}) for one in scores]
            of = row["captioning"]["seeds"]
            less = "" if of == len(row["seeds"]) else f" ({of} of {len(row['seeds'])} seeds)"
            lines.append(f"| `{row['approach']}`{less} | " + " | ".join(cells) + " |")
    for row in rows:
        if row["task"]:
            lines += ["", f"{row['task']['title']} (`{row['approach']}`):", "", "| measured | value | chance |"]
            lines += ["|---|---:|---:|"]
            lines += [f"| {one['what']} | {_figure(one)} | {_chance(one)} |" for one in row["task"]["rows"]]
    return lines


def _figure(entry: dict[str, Any]) -> str:
    percent, value = entry["unit"] == "%", entry["value"]
    digits = 1 if percent else 3
    spread = "" if value["ci95"] is None else f" ± {(value['ci95'][1] - value['ci95'][0]) / 2:.{digits}f}"
    text = f"{value['mean']:.{digits}f}"
    if value["ci95"] is not None and value["ci95"][0] == value["ci95"][1]:
        return f"{text} {entry['unit']}".rstrip() + " (for every seed)"
    return f"{text}{spread} {entry['unit']}".rstrip()


def _chance(entry: dict[str, Any]) -> str:
    return "-" if entry["chance"] is None else f"{entry['chance']:.1f} {entry['unit']}"


def _wall(walls: dict[str, float] | None, approach: str) -> str:
    if not walls:
        return ""
    return f" {walls[approach]:.0f} |" if approach in walls else " - |"


def _points(delta: dict[str, Any] | None) -> str:
    if delta is None or not any(delta["values"]):
        return "-"
    text = f"{100 * delta['mean']:+.1f}"
    interval = delta["ci95"] or delta.get("pictures_ci95")
    if interval is None:
        return text
    low, high = interval
    text += f" [{100 * low:+.1f}, {100 * high:+.1f}]" + ("" if delta["ci95"] else " (pictures)")
    return f"**{text}**" if low > 0 or high < 0 else text


def _accuracy(share: dict[str, Any]) -> str:
    ci = share["ci95"]
    spread = "" if ci is None else f" ± {100 * (ci[1] - ci[0]) / 2:.1f}"
    return f"{100 * share['mean']:.1f}{spread}"


def _finetuned(entry: dict[str, Any]) -> str:
    """Return a set's accuracy over seeds; of a single seed over its test pictures."""
    share = entry["finetuned"]
    moved = any(entry["delta"]["values"])  # of an encoder that did not train seeds say nothing
    return _accuracy(share) if share["ci95"] and moved else _alone(share["mean"], entry.get("test"))


def _alone(share: float, n: int | None) -> str:
    """Return a share of n pictures with half of Wilson's 95 % interval."""
    if not n:
        return f"{100 * share:.1f}"
    _, low, high = wilson(round(share * n), n)
    return f"{100 * share:.1f} ± {50 * (high - low):.1f}"


def collect(out: Path, preset: str, approaches: list[str], seeds: list[int], failures: dict[str, str]) -> list[dict]:
    """Read what runs there are and write both tables; return the rows."""
    rows = []
    for approach in approaches:
        files = [_folder(out, preset, approach, seed) / "results.json" for seed in seeds]
        found = [_read(file) for file in files if file.is_file()]
        if len({(one["steps"], one["captions"]["pairs"]) for one in found}) > 1:
            told = ", ".join(f"seed {one['seed']}: {one['steps']} of {one['captions']['pairs']} pairs" for one in found)
            failures = failures | {approach: f"its runs differ in steps ({told}); remove those of another recipe"}
            continue
        rows += [summarise(approach, found)] if found else []
    table = {"preset": preset, "seeds": seeds, "rows": rows, "failures": failures}
    write_json(out / f"{preset}.json", table)
    timed = out / "train_seconds.json"
    walls = json.loads(timed.read_text())["seconds"] if preset == "mini" and timed.is_file() else None
    write_text(out / f"{preset}.md", markdown(rows, failures, preset, walls))
    return rows


def main() -> int:
    """Run what is missing, then show the table; exits with 1 if a run failed, 2 on wrong options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--approaches", nargs="+", default=list(APPROACHES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    own, _, options = _split(sys.argv[1:])
    asked = parser.parse_args(own)
    if asked.jobs < 1 or len(set(asked.seeds)) != len(asked.seeds):
        raise WlsupError("--jobs must be at least 1, and each of --seeds be given once.")
    for name in asked.approaches:
        choose("approach", name, APPROACHES)
    wanted = [(name, seed) for seed in asked.seeds for name in asked.approaches]
    folders = {key: _folder(asked.out, asked.preset, *key).absolute() for key in wanted}
    shown = [name for name in APPROACHES if name in asked.approaches or _has_runs(name, asked)]
    missing = [key for key in wanted if not (folders[key] / "results.json").is_file()]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done already", flush=True)
    failures = _failures_of_others(asked)
    threads = max(1, (os.cpu_count() or 1) // asked.jobs)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    started = time.perf_counter()
    with ThreadPoolExecutor(asked.jobs) as pool:
        work = {pool.submit(run, *key, folders[key], asked.preset, options): key for key in missing}
        for done, future in enumerate(as_completed(work), start=1):
            name, seed = work[future]
            if problem := future.result():
                failures[f"{name}, seed {seed}"] = problem
            elapsed = time.perf_counter() - started
            state = "failed: " + problem if problem else "done"
            remaining = elapsed / done * (len(missing) - done)
            print(f"{name}, seed {seed}: {state} ({done} of {len(missing)}, {remaining:.0f} s to go)", flush=True)
            collect(asked.out, asked.preset, shown, asked.seeds, failures)
    collect(asked.out, asked.preset, shown, asked.seeds, failures)
    print((asked.out / f"{asked.preset}.md").read_text())
    return 1 if any(name.partition(",")[0] in asked.approaches for name in failures) else 0


def _read(file: Path) -> dict[str, Any]:
    """Return results.json with what cost.json beside it says of memory."""
    cost = file.with_name("cost.json")
    return json.loads(file.read_text()) | (json.loads(cost.read_text()) if cost.is_file() else {})


def _failures_of_others(asked: argparse.Namespace) -> dict[str, str]:
    """Return what the last table says of runs that are not asked for now and have not been made since."""
    table = asked.out / f"{asked.preset}.json"
    before = json.loads(table.read_text())["failures"] if table.is_file() else {}
    kept = {}
    for run, why in before.items():
        approach, separator, seed = run.partition(", seed ")  # what has none is of the table, and found again
        if not separator or approach in asked.approaches:
            continue
        if not (_folder(asked.out, asked.preset, approach, int(seed)) / "results.json").is_file():
            kept[run] = why
    return kept


def _has_runs(approach: str, asked: argparse.Namespace) -> bool:
    folders = (_folder(asked.out, asked.preset, approach, seed) for seed in asked.seeds)
    return any((folder / "results.json").is_file() for folder in folders)


def _folder(out: Path, preset: str, approach: str, seed: int) -> Path:
    return out / "runs" / preset / approach / f"seed{seed}"


def _split(arguments: list[str]) -> tuple[list[str], str, list[str]]:
    """Part the options of this command from those of `wlsup fit`, which come after ``--``."""
    if "--" not in arguments:
        return arguments, "", []
    place = arguments.index("--")
    return arguments[:place], "--", arguments[place + 1 :]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WlsupError as error:
        print(f"run_results: error: {error}", file=sys.stderr)
        sys.exit(2)
