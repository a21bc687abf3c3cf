"""Make the models of the mini preset, which the package ships.

    make pretrain-mini                      # python experiments/pretrain_mini.py --out wlsup/assets/mini

Hardware: one CPU core, no network; about forty minutes. Expected: see RECIPE.json beside the models, which records
recipe, seed, losses, versions, k-NN accuracies and the SHA-256 of each file. The same seed, threads, machine and
library versions give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from pathlib import Path

import torch
from mini_pretraining.language import make_language_model
from mini_pretraining.text import make_text_encoder
from mini_pretraining.tokens import make_tokenizer
from mini_pretraining.vision import make_vision, measure

PARTS = ("tokenizer", "text", "lm", "vision")
STEPS = {"text": 900, "lm": 1500, "vision": 7000}
_LIMIT = 8_000_000


def versions() -> dict[str, str]:
    """Versions of what the files depend on."""
    import numpy
    import timm
    import tokenizers
    import transformers

    libraries = {module.__name__: module.__version__ for module in (numpy, timm, tokenizers, torch, transformers)}
    return {"python": platform.python_version(), **libraries}


def file_hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every file below ``out`` but the record itself."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "RECIPE.json")
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_record(out: Path, part: str, entry: dict[str, object]) -> None:
    """Put one part's entry into RECIPE.json and bring the file hashes up to date."""
    path = out / "RECIPE.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"parts": {}}
    record["command"] = "python experiments/pretrain_mini.py --out wlsup/assets/mini"
    record["parts"][part] = entry
    record["parts"] = {name: record["parts"][name] for name in PARTS if name in record["parts"]}
    record["sha256"] = file_hashes(out)
    record["bytes"] = sum((out / name).stat().st_size for name in record["sha256"])
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Make the parts asked for, in order; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("wlsup/assets/mini"), help="folder of the models")
    parser.add_argument("--only", choices=PARTS, action="append", help="make this part only; may be given repeatedly")
    parser.add_argument("--steps", type=int, help=f"training steps of each part made, in place of {STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the files depend on it")
    parser.add_argument("--measure", action="store_true", help="make nothing, measure the encoder's k-NN anew")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.measure:
        entry = json.loads((given.out / "RECIPE.json").read_text(encoding="utf-8"))["parts"]["vision"]
        write_record(given.out, "vision", entry | {"knn": measure(given.out / "vision", given.seed)})
        return 0
    tokenizer_folder = given.out / "tokenizer"
    for part in given.only or PARTS:
        steps = given.steps or STEPS.get(part, 0)
        begin = time.perf_counter()
        if part == "tokenizer":
            entry = make_tokenizer(tokenizer_folder)
        elif part == "vision":
            entry = make_vision(given.out / part, steps=steps, seed=given.seed)
        else:
            make = make_text_encoder if part == "text" else make_language_model
            entry = make(given.out / part, tokenizer_folder, steps=steps, seed=given.seed)
        entry |= {
            "seconds": round(time.perf_counter() - begin),
            "threads": given.threads,
            "machine": platform.machine(),
            "versions": versions(),
        }
        write_record(given.out, part, entry)
        print(f"{part}  done in {entry['seconds']} s", flush=True)
    size = json.loads((given.out / "RECIPE.json").read_text(encoding="utf-8"))["bytes"]
    print(f"{given.out}: {size:,} bytes (limit {_LIMIT:,})")
    return 0 if size <= _LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
