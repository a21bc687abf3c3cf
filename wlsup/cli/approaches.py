"""``wlsup approaches``: what there is to compare, and what each trains."""

from __future__ import annotations

import argparse
import json
from typing import Any

from wlsup.approaches import APPROACHES, approach_class
from wlsup.cli.logs import log_to_terminal

__all__ = ["approaches_markdown", "run"]


def listing() -> list[dict[str, Any]]:
    """Return name, summary and plan of each approach, built on the mini models with its own defaults."""
    rows = []
    for name in APPROACHES:
        approach = approach_class(name)()
        plan = approach.plan.describe(approach)
        trains = [row["pattern"] for row in plan["rules"] if row["trains"]]
        rows.append(
            {
                "name": name,
                "summary": approach.summary,
                "trains": list(getattr(approach, "trains_told", trains)),  # where each run chooses anew
                "trained": plan["trained"],
                "total": plan["total"],
            }
        )
    return rows


def approaches_markdown() -> str:
    """Return the README's table, generated from the plans; how many parameters train depends on the recipe."""
    lines = ["| `APPROACH` | what it is | trains |", "|---|---|---|"]
    for row in listing():
        trains = ", ".join(f"`{pattern}`" for pattern in row["trains"])
        lines.append(f"| `{row['name']}` | {row['summary']} | {trains} |")
    return "\n".join(lines)


def run(arguments: list[str]) -> int:
    """List the approaches as a table, as Markdown or as JSON."""
    parser = argparse.ArgumentParser(prog="wlsup approaches")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--markdown", action="store_true", help="as in the README")
    options = parser.parse_args(arguments)
    log_to_terminal(quiet=True)
    if options.markdown:
        print(approaches_markdown())
        return 0
    rows = listing()
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = 2 + max(len(row["name"]) for row in rows)
    for row in rows:
        share = 100 * row["trained"] / row["total"]
        print(f"{row['name']:<{width}}{row['summary']}")
        print(f"{'':<{width}}trains {', '.join(row['trains'])}: {row['trained']:,} of {row['total']:,} ({share:.1f} %)")
    print("\nCounts by the code's defaults, without a recipe: wlsup inspect APPROACH -c RECIPE.yaml has a recipe's.")
    return 0
