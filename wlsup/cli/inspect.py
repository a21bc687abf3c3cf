"""``wlsup inspect APPROACH``: the plan, rule by rule, before anything runs."""

from __future__ import annotations

import json
import sys

from wlsup.approaches import APPROACHES, approach_class
from wlsup.cli.logs import log_to_terminal
from wlsup.errors import WlsupError, choose

__all__ = ["run"]


def run(arguments: list[str]) -> int:
    """Print what an approach trains, what it freezes, and on which base models it stands."""
    as_json = "--json" in arguments
    rest = [argument for argument in arguments if argument != "--json"]
    if not rest or rest[0].startswith("-"):
        raise WlsupError(f"Name an approach: wlsup inspect APPROACH. Valid: {', '.join(APPROACHES)}.")
    name = choose("approach", rest[0], APPROACHES, hint="`wlsup approaches` says what each one is.")
    log_to_terminal(quiet=True)
    from wlsup.cli.configuration import configure
    from wlsup.data.datamodule import CaptionDataModule

    arguments = ["--approach", name, *rest[1:]]
    cli = configure(approach_class(name), CaptionDataModule, arguments, "inspect", build=False)
    model, data = cli.model, cli.datamodule
    if hasattr(model, "select_from"):  # what trains is chosen by the first batches
        data.image_spec = model.image_spec
        data.setup("fit")
        model.select_from(data)
    plan = model.plan.describe(model)
    if as_json:
        print(json.dumps({"approach": name, "bases": model.bases, **plan}, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}: {model.summary}", title_justify="left")
    for column, justify in (("parameters", "left"), ("trains", "left"), ("lr", "right"), ("weight decay", "right")):
        table.add_column(column, justify=justify)
    table.add_column("tensors", justify="right")
    table.add_column("count", justify="right")
    for row in plan["rules"]:
        trains = row["trains"]
        table.add_row(
            row["pattern"],
            "[green]yes[/]" if trains else "[dim]frozen[/]",
            f"{row['lr']:g}" if trains else "-",
            f"{row['weight_decay']:g}" if trains else "-",
            str(row["tensors"]),
            f"{row['parameters']:,}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(model.plan.summary(model), highlight=False)
    for role, base in model.bases.items():
        console.print(f"{role}: {base['id']} (sha256 {base['sha256'][:16]})", highlight=False)
    return 0
