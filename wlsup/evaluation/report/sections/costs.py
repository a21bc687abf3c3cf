"""What it took: seconds, memory, parameters; what trained; and how to do it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from wlsup.evaluation.report.blocks import Cell, Charts, Code, Section, Table, Text
from wlsup.evaluation.report.figures.cost import cost_chart
from wlsup.evaluation.report.groups import Group
from wlsup.evaluation.report.runs import Run

__all__ = ["cost", "reproduce", "trained"]


def cost(groups: Sequence[Group]) -> Section:
    """Return seconds, memory and parameters."""
    rows = []
    for group in groups:
        parameters = group.runs[0].results["parameters"]
        share = 100 * parameters["trained"] / parameters["total"]
        rows.append((
            Cell(group.name),
            _figure(group, lambda run: run.cost.get("processor_seconds")),
            _figure(group, lambda run: run.results.get("seconds")),
            _figure(group, lambda run: (run.cost.get("peak_memory_mib") or {}).get("resident")),
            _figure(group, lambda run: (run.cost.get("peak_memory_mib") or {}).get("gpu")),
            Cell(f"{parameters['trained']:,}", f"{share:.1f} % of {parameters['total']:,}"),
        ))  # fmt: skip
    table = Table(
        "What a run takes: mean over seeds, and below it the lowest and the highest seed’s. Core seconds are added up "
        "over cores and hardly depend on what else the machine does; wall seconds do. Memory is the most "
        "that a process held.",
        ("approach", "core seconds", "wall seconds", "memory, MiB", "GPU memory, MiB", "parameters trained"),
        tuple(rows),
    )  # fmt: skip
    chart = cost_chart(groups)
    return Section("cost", "Cost", [table, *([Charts((chart,))] if chart else [])])


def trained(groups: Sequence[Group]) -> Section:
    """Return each group's plan: what trained, what was frozen."""
    blocks = []
    for group in groups:
        plan = next((run.plan for run in group.runs if run.plan.get("rules")), None)
        if plan is None:
            continue
        rows = tuple(
            (
                Cell(rule["pattern"]), Cell("trains" if rule["trains"] else "frozen"),
                Cell(f"{rule['lr']:g}" if rule["trains"] else "–"),
                Cell(f"{rule['weight_decay']:g}" if rule["trains"] else "–"),
                Cell(str(rule["tensors"])), Cell(f"{rule['parameters']:,}"),
            )
            for rule in plan["rules"]
        )  # fmt: skip
        bases = "; ".join(f"{role}: {base['id']}, sha256 {base['sha256'][:16]}" for role, base in plan["bases"].items())
        blocks.append(Table(
            f"{group.name}. {bases}", ("parameters", "", "lr", "weight decay", "tensors", "count"), rows, words=2
        ))  # fmt: skip
    return Section("trained", "What trained", blocks or [Text("No run has its plan.json.")])


def reproduce(groups: Sequence[Group]) -> Section:
    """Return, of each group, the commands and the configuration that run it again."""
    blocks: list[Any] = [
        Text(
            "Each run’s folder has config.yaml, which runs it again. The same seed on the same machine with the same "
            "versions gives the same results.json, times aside."
        )
    ]
    for group in groups:
        run = group.runs[0]
        lines = _commands(group)
        blocks.append(Code(f"{group.name}: commands and versions", "\n".join(lines), open=True))  # on paper, too
        if run.config:
            blocks.append(Code(f"{group.name}: config.yaml of seed {run.seed}", run.config))
    return Section("reproduce", "How to do it again", blocks)


def _commands(group: Group) -> list[str]:
    run = group.runs[0]
    environment, captions = run.environment, run.results["captions"]
    lines = (
        [f"git checkout {environment['git_commit'].removesuffix('-dirty')}"] if environment.get("git_commit") else []
    )
    if str(environment.get("git_commit")).endswith("-dirty"):
        lines.append("# files were changed and not committed when it ran: the commit alone is not what ran")
    lines += [
        f"wlsup fit -c {one.folder / 'config.yaml'} --run_dir NEW_FOLDER_{one.seed}" if one.config
        else f"# seed {one.seed}: no config.yaml beside {one.folder / 'results.json'}"
        for one in group.runs
    ]  # fmt: skip
    if environment.get("versions"):
        named = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
        lines += [f"# python {environment.get('python')}, {named}"]
    if environment.get("platform"):
        gpus = ", ".join(environment.get("gpus") or []) or "no GPU"
        lines.append(f"# {environment['platform']}, {environment.get('cpu_count')} cores, {gpus}")
    lines.append(
        f"# captions: {captions.get('source')}, {captions.get('pairs')} pairs, sha256 of their keys "
        f"{captions.get('manifest_sha256')}"
    )
    return lines


def _figure(group: Group, of: Callable[[Run], float | None]) -> Cell:
    values = [of(run) for run in group.runs]
    if any(value is None for value in values):
        return Cell("–", "not recorded")
    low, high = (f"{end:,.0f}" for end in (min(values), max(values)))
    return Cell(f"{sum(values) / len(values):,.0f}", "one seed" if len(values) == 1 else f"{low} to {high}")
