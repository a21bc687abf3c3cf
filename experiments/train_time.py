"""How long `make train APPROACH=x` takes, for every approach: wall time, one after the other.

    python experiments/train_time.py [--only NAME ...] [--out experiments/results/train_seconds.json]

With preset mini and seed 0, after set-up, with as many threads as the machine has cores; start, training,
evaluation and the table included. Bar: 240 s each on two cores. What an earlier call measured of other
approaches, on as many cores, is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from wlsup.approaches import APPROACHES
from wlsup.files import write_json

ROOT = Path(__file__).resolve().parents[1]
BAR = 240.0


def measure(approach: str) -> float:
    """Return the seconds of one `make train`.

    Raises:
        RuntimeError: it failed.
    """
    begin = time.perf_counter()
    done = subprocess.run(["make", "train", f"APPROACH={approach}"], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"{approach}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return seconds


def main() -> int:
    """Measure, write after each approach, and say which missed the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(APPROACHES), default=list(APPROACHES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "train_seconds.json")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if found.get("cores") != os.cpu_count():
        found = {"seconds": {}}
    subprocess.run(["make", "setup"], cwd=ROOT, check=True, capture_output=True)
    for approach in options.only:
        found["seconds"][approach] = round(measure(approach), 1)
        print(f"{approach:28} {found['seconds'][approach]:6.1f} s", flush=True)
        seconds = {name: found["seconds"][name] for name in APPROACHES if name in found["seconds"]}
        found = {"command": "make train APPROACH=x", "cores": os.cpu_count(), "bar": BAR, "seconds": seconds}
        write_json(options.out, found)
    return 1 if any(seconds > BAR for seconds in found["seconds"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
