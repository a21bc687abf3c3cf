"""Write what `make results` measured where people read it: the recipes' headers, and the README's table.

    python experiments/publish_results.py [--check]

With --check nothing is written, and the exit code is 1 where a file says something else than experiments/results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from wlsup.files import write_text

HERE = Path(__file__).parent
ROOT = HERE.parent


def header(row: dict[str, Any]) -> dict[str, str]:
    """Return a recipe's "time" and "result" lines out of its approach's row."""
    knn, retrieval, task = row["knn"].items(), row["retrieval"], row["task"]
    if any(value for _, entry in knn for value in entry["delta"]["values"]):
        found = [
            f"{name.removeprefix('mini_')} {100 * entry['pretrained']:.1f} -> {100 * entry['finetuned']['mean']:.1f}"
            for name, entry in knn
        ]
    elif task:  # the encoder is untouched: what counts is what the approach measures of itself
        found = [f"{one['what']} {one['value']['mean']:.4g} {one['unit']}" for one in task["rows"][:2]]
    else:
        recall = 100 * retrieval["image_to_text"]["1"]["mean"]
        found = [f"image-to-text R@1 {recall:.1f} %; k-NN cannot change, by design"]
    seeds = row["seeds"]
    whose = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of {len(seeds)} seeds"
    return {
        "time": f"{row['processor_seconds']:.0f} s of computing, {row['peak_resident_mib']:,.0f} MiB at the peak",
        "result": f"{whose}, reproduced here: {', '.join(found)}",
    }


def with_header(recipe: str, lines: dict[str, str]) -> str:
    """Return a recipe with its "time" and "result" lines replaced, added behind "hardware" where there are none."""
    kept = [line for line in recipe.splitlines() if not re.match(r"# (time|result):", line)]
    place = next(number for number, line in enumerate(kept) if line.startswith("# hardware:")) + 1
    told = [f"# {name + ':':<11}{text}" for name, text in lines.items()]
    return "\n".join([*kept[:place], *told, *kept[place:]]) + "\n"


def with_table(readme: str, table: str) -> str:
    """Return the README with the table of results replaced."""
    return re.sub(r"(<!-- results -->\n).*?(\n<!-- end -->)", lambda m: m[1] + table + m[2], readme, flags=re.DOTALL)


def main() -> int:
    """Write, or with --check compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    measured = json.loads((HERE / "results" / "mini.json").read_text())
    text = (HERE / "results" / "mini.md").read_text()
    table = re.search(r"^\| approach.*?(?=\n\n)", text, re.DOTALL | re.MULTILINE).group(0)
    protocol = re.search(r"^Protocol: (.*)\.$", text, re.MULTILINE).group(1)
    files = {ROOT / "README.md": lambda old: with_table(old, f"{table}\n\nProtocol: `{protocol}`.")}
    for row in measured["rows"]:
        files[HERE / f"{row['approach']}.yaml"] = lambda old, row=row: with_header(old, header(row))
    stale = []
    for file, change in files.items():
        old = file.read_text(encoding="utf-8")
        if (new := change(old)) != old:
            stale.append(file.name)
            if not check:
                write_text(file, new)
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
