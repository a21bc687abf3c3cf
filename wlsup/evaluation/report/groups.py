"""Runs that differ by their seed alone are one row: mean, interval, and what the interval is over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wlsup.evaluation.report.runs import Run
from wlsup.evaluation.statistics import Interval, mean_and_interval, mean_of_intervals, wilson

__all__ = ["UNTOUCHED", "Basis", "Estimate", "Group", "comparable", "group_runs", "of_share", "over_seeds"]

Basis = Literal["seeds", "pictures", "pairs", "none"]
Verdict = Literal["gain", "loss", "unsure", "untouched"]

# Of a configuration, what changes what is trained or measured; the rest says where things lie and what is shown.
_TELLS = ("model.", "data.", "knn.k", "knn.temperature", "optimizer", "lr_scheduler", "trainer.accumulate_grad_batches",
          "trainer.devices", "trainer.gradient_clip", "trainer.limit_train_batches", "trainer.max_",
          "trainer.num_nodes", "trainer.precision")  # fmt: skip
_TELLS_NOT = ("data.seed", "data.root", "data.num_workers", "data.patience", "data.decoder", "knn.ks")


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Args:
        value: in the unit of what it estimates.
        low: None where there is no interval.
        high: likewise.
        basis: what the interval is over: seeds (Student's t), test pictures (bootstrap), pairs (Wilson), nothing.
        count: of seeds, of the pictures' sets, of pairs.
    """

    value: float
    low: float | None
    high: float | None
    basis: Basis
    count: int = 1

    @property
    def verdict(self) -> Verdict:
        """Whether a change's interval excludes 0."""
        if self.low is None or self.high is None:
            return "unsure"
        if self.low == self.high == 0:
            return "untouched"
        return "gain" if self.low > 0 else "loss" if self.high < 0 else "unsure"


UNTOUCHED = Estimate(0.0, 0.0, 0.0, "none")
"""Of an encoder that did not train: its change is 0 without doubt."""


@dataclass(frozen=True)
class Group:
    """The runs of one approach with one configuration, one a seed, by ascending seed.

    Args:
        approach: its name.
        preset: of all its runs.
        name: as tables and figures show it: the approach, and what sets it apart from the approach's other groups.
        runs: at least one.
        notes: what a reader must know of it.
    """

    approach: str
    preset: str
    name: str
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    @property
    def sets(self) -> dict[str, str]:
        """Domain by evaluation set, of the sets that all runs have."""
        shared = set.intersection(*(set(run.results["knn"]) for run in self.runs))
        return {name: entry["domain"] for name, entry in self.runs[0].results["knn"].items() if name in shared}

    @property
    def untouched(self) -> bool:
        """Whether the encoder did not train; of runs that do not say so: it gives the pretrained one's neighbours."""
        told = [run.results.get("untouched") for run in self.runs]
        if None not in told:
            return all(told)
        entries = [entry for run in self.runs for entry in run.results["knn"].values()]
        deltas = [(entry["delta"], *entry.get("ci95", ())) for entry in entries]
        return bool(deltas) and not any(map(any, deltas))

    def delta(self, name: str) -> Estimate | None:
        """Return the change of k-NN accuracy on one set, as a fraction."""
        if name not in self.sets:
            return None
        if self.untouched:
            return UNTOUCHED
        entries = [run.results["knn"][name] for run in self.runs]
        if len(entries) == 1:
            return _of_one(entries[0]["delta"], entries[0].get("ci95"))
        return over_seeds([entry["delta"] for entry in entries])

    def finetuned(self, name: str) -> Estimate | None:
        """Return the accuracy on one set after training, as a fraction."""
        if name not in self.sets:
            return None
        entries = [run.results["knn"][name] for run in self.runs]
        if len(entries) == 1:
            count = entries[0].get("test")
            return (
                of_share(entries[0]["finetuned"], count, "pictures") if count else over_seeds([entries[0]["finetuned"]])
            )
        return over_seeds([entry["finetuned"] for entry in entries])

    def domain_delta(self, domain: str) -> Estimate | None:
        """Return the mean change over the sets of a domain, "in" or "out", as a fraction.

        Of one run the interval is made of its sets' own.
        """
        names = [name for name, of in self.sets.items() if of == domain]
        if not names:
            return None
        if self.untouched:
            return UNTOUCHED
        per_run = [[run.results["knn"][name] for name in names] for run in self.runs]
        means = [sum(entry["delta"] for entry in entries) / len(names) for entries in per_run]
        intervals = [entry.get("ci95") for entry in per_run[0]]
        if len(means) > 1 or not all(intervals):
            return over_seeds(means)
        return combined([entry["delta"] for entry in per_run[0]], intervals)

    def over_seeds(self, figure: Callable[[Run], Any]) -> Estimate | None:
        """Return a figure of each run over the seeds; None where a run lacks it."""
        values = [figure(run) for run in self.runs]
        return None if any(value is None for value in values) else over_seeds(values)


def comparable(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Return those groups, the most that agree, whose means are over the same sets by one protocol; and the others."""
    alike: dict[Any, list[Group]] = defaultdict(list)
    for group in groups:
        protocols = {str(run.results.get("protocol")) for run in group.runs}
        alike[tuple(sorted(group.sets.items())), tuple(sorted(protocols))].append(group)
    most = max(alike.values(), key=len, default=[])
    return most, [group for group in groups if group not in most]


def _of_one(value: float, interval: Sequence[float] | None) -> Estimate:
    return Estimate(value, *interval, "pictures") if interval else over_seeds([value])


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return mean and Student's t interval over seeds; of one seed no interval."""
    mean, low, high = mean_and_interval(values)
    if len(values) == 1:
        return Estimate(mean, None, None, "none")
    return Estimate(mean, low, high, "seeds", len(values))


def combined(deltas: Sequence[float], intervals: Sequence[Sequence[float]]) -> Estimate:
    """Return the mean of independent changes with an interval made of theirs, by `mean_of_intervals`."""
    parts = [Interval(delta, *interval) for delta, interval in zip(deltas, intervals, strict=True)]
    return Estimate(*mean_of_intervals(parts), "pictures", len(parts))


def of_share(share: float, count: int, basis: Basis) -> Estimate:
    """Return a share of ``count`` independent trials with Wilson's 95 % interval."""
    return Estimate(share, *wilson(round(share * count), count)[1:], basis, count)


def group_runs(runs: Sequence[Run], order: Sequence[str] = ()) -> list[Group]:
    """Return the groups: by ``order`` of approaches, then by name and by what sets them apart.

    Args:
        runs: in any order.
        order: names of approaches; others come after, by name.
    """
    families: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        families[run.results["approach"], run.results["preset"]].append(run)
    presets = {preset for _, preset in families}
    rank = {name: place for place, name in enumerate(order)}
    groups: list[Group] = []
    for (approach, preset), members in sorted(
        families.items(), key=lambda item: (rank.get(item[0][0], len(rank)), item[0])
    ):
        name = approach if len(presets) == 1 else f"{approach}, {preset}"
        groups += _split(approach, preset, name, members)
    return groups


def _split(approach: str, preset: str, name: str, runs: list[Run]) -> list[Group]:
    told = [_told(run) for run in runs]
    # a run without a configuration says little of itself: the others are told apart all the same
    keys = sorted(set.union(*map(set, told)))
    variants: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run, options in sorted(zip(runs, told, strict=True), key=lambda pair: not pair[0].options):
        values = tuple(options.get(key, "?") for key in keys)
        alike = [] if run.options else [one for one in variants if _agree(one, values)]
        variants[alike[0] if len(alike) == 1 else values].append(run)
    differing = [place for place in range(len(keys)) if len({values[place] for values in variants}) > 1]
    groups: list[Group] = []
    for values, members in sorted(variants.items()):
        apart = [f"{keys[place].removeprefix('model.')} {values[place]}" for place in differing]
        more = f", {len(apart) - 3} more" if len(apart) > 3 else ""
        label = f"{name} ({', '.join(apart[:3])}{more})" if apart else name
        same = sum(group.name.partition(" [")[0] == label for group in groups)  # those that differ further on
        label += f" [{same + 1}]" if same else ""
        groups.append(_group(approach, preset, label, members))
    return groups


def _agree(values: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two variants say nothing different of what both tell."""
    return all(one == other or "?" in (one, other) for one, other in zip(values, others, strict=True))


def _told(run: Run) -> dict[str, str]:
    results = run.results
    told = {"pairs": str(results["captions"].get("pairs")), "steps": str(results.get("steps"))}
    if not run.options and results["approach"] != "selective_k":  # whose groups of layers each seed chooses
        told["parameters trained"] = str(results["parameters"].get("trained"))
    return told | {
        key: value for key, value in run.options.items() if key.startswith(_TELLS) and not key.startswith(_TELLS_NOT)
    }


def _group(approach: str, preset: str, name: str, runs: list[Run]) -> Group:
    newest: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.folder / "results.json").stat().st_mtime):
        newest[run.seed] = run
    kept = tuple(newest[seed] for seed in sorted(newest))
    notes = []
    if len(kept) < len(runs):
        notes.append(f"{len(runs) - len(kept)} older runs of the same seeds are left out.")
    commits = {run.environment["git_commit"] for run in kept if run.environment.get("git_commit")}
    if len(commits) > 1:
        notes.append(f"Its seeds were run at {len(commits)} different commits.")
    notes += dict.fromkeys(f"Seed {run.seed}: {run.results['note']}." for run in kept if run.results.get("note"))
    return Group(approach, preset, name, kept, tuple(notes))
