"""Everything that is asked of one encoder on one set, kept small, and two encoders compared on it.

Shapes: n bank pictures, m queries, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from wlsup.errors import WlsupError, choose
from wlsup.evaluation import calibration, classes, drift, few_shot, probe, retrieval, zero_shot
from wlsup.evaluation.features import Features
from wlsup.evaluation.knn import KNNResult, knn_probabilities, protocol_of
from wlsup.evaluation.statistics import Interval, crossed_interval, paired_bootstrap, wilson

__all__ = ["METRICS", "Judgement", "MetricSpec", "compare", "judge", "protocols", "shots_of"]

_KNN_RESAMPLES = 10_000  # as many as `KNN` draws: one change has one interval, here and in results.json

METRICS = ("probe", "few_shot", "calibration", "drift", "classes", "zero_shot", "retrieval")
"""What may be asked for beside k-NN; zero_shot and retrieval need a shared space of pictures and text."""

_PROTOCOLS = {
    "probe": probe.PROTOCOL,
    "few_shot": few_shot.PROTOCOL,
    "calibration": calibration.PROTOCOL,
    "drift": drift.PROTOCOL,
    "classes": classes.PROTOCOL,
    "zero_shot": zero_shot.PROTOCOL,
    "retrieval": retrieval.PROTOCOL,
}
_SAMPLE = 1000
_OVERLAP = 10


@dataclass(frozen=True)
class MetricSpec:
    """What to measure beside k-NN.

    Args:
        metrics: of `METRICS`.
        shots: of few_shot, pictures a class.
        draws: of few_shot, how often they are drawn.
        resamples: of the test pictures, for intervals.
    """

    metrics: tuple[str, ...] = METRICS
    shots: tuple[int, ...] = (1, 5)
    draws: int = 20
    resamples: int = 2000

    def __post_init__(self) -> None:
        for name in self.metrics:
            choose("metric", name, METRICS)
        if min(self.shots, default=0) < 1 or self.draws < 2 or self.resamples < 100:
            raise WlsupError(
                f"shots={list(self.shots)}, draws={self.draws}, resamples={self.resamples}: give shots of at least 1, "
                "2 draws or more, 100 resamples or more."
            )

    def __contains__(self, metric: str) -> bool:
        return metric in self.metrics


@dataclass
class Judgement:
    """What one encoder did with one set's pictures: enough to compare it with another, without its features.

    Args:
        labels: (m,) int64.
        indices: (m,) int64 positions of the queries in the set.
        k: of k-NN.
        temperature: of its vote.
        correct: (m,) bool, by k-NN.
        votes: (m, C) k-NN's shares of votes; of calibration.
        probe_correct: (m,) bool.
        probabilities: (m, C) of the probe.
        strength: C of the probe.
        shots: {classifier: {k: (R, m) bool}}, draw by draw; of few_shot.
        sample: (s, D) fp16 features of bank pictures, the same ones for every encoder; of drift.
        sampled: (s,) int64 their positions in the bank.
    """

    labels: Tensor
    indices: Tensor
    k: int
    temperature: float
    correct: Tensor
    votes: Tensor | None = None
    probe_correct: Tensor | None = None
    probabilities: Tensor | None = None
    strength: float | None = None
    shots: dict[str, dict[int, Tensor]] | None = None
    sample: Tensor | None = None
    sampled: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """Return it as plain tensors and values, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def judge(
    bank: Features,
    queries: Features,
    knn: KNNResult,
    spec: MetricSpec,
    *,
    num_classes: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Judgement:
    """Measure one encoder on one set.

    Args:
        bank: training pictures' features, of unit length.
        queries: test pictures'.
        knn: what k-NN said of them.
        spec: what to measure.
        num_classes: C.
        device: where the probe is fitted.
        progress: called with (fits and draws done, to do).
    """
    found = Judgement(queries.labels, queries.indices, knn.k, knn.temperature, knn.correct)
    steps = (len(probe.STRENGTHS) + 1) * ("probe" in spec), spec.draws * ("few_shot" in spec)
    show = progress or (lambda done, total: None)
    if "probe" in spec:
        fitted = probe.linear_probe(
            bank, queries, num_classes=num_classes, device=device, progress=lambda done, _: show(done, sum(steps))
        )
        found.probe_correct, found.strength = fitted.correct, fitted.strength
        found.probabilities = fitted.probabilities if "calibration" in spec else None
    if "few_shot" in spec:
        found.shots = few_shot.few_shot(
            bank,
            queries,
            num_classes=num_classes,
            shots=spec.shots,
            draws=spec.draws,
            progress=lambda done, _: show(steps[0] + done, sum(steps)),
        ).correct
    if "calibration" in spec:
        found.votes = knn_probabilities(bank, queries, num_classes=num_classes, k=knn.k, temperature=knn.temperature)
    if "drift" in spec:
        order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:_SAMPLE]
        found.sample, found.sampled = bank.features[order].half(), bank.indices[order]
    return found


def compare(
    before: Judgement, after: Judgement | None, spec: MetricSpec, class_names: Sequence[str], domain: str
) -> dict[str, Any]:
    """Return a set's entry of evaluation.json: each figure of both encoders, and its change, with 95 % intervals.

    Args:
        before: of the pretrained encoder.
        after: of the fine-tuned one; None for an encoder alone, which has no changes.
        spec: what was measured.
        class_names: one a class id.
        domain: "in" or "out".

    Raises:
        WlsupError: if the two did not see the same queries, or for drift the same bank.
    """
    if after is not None and not (
        torch.equal(before.indices, after.indices) and torch.equal(before.labels, after.labels)
    ):
        raise WlsupError("The two encoders were judged by different pictures: has the set changed since?")
    entry: dict[str, Any] = {"domain": domain, "n": len(before.labels)}
    right = (before.correct, None if after is None else after.correct)
    many = max(spec.resamples, _KNN_RESAMPLES)
    entry["knn"] = {"k": before.k, "temperature": before.temperature, **_accuracies(*right, many)}
    if "probe" in spec:
        entry["probe"] = _accuracies(
            before.probe_correct, None if after is None else after.probe_correct, spec.resamples
        )
        entry["probe"]["strength"] = [before.strength, *([] if after is None else [after.strength])]
    if "few_shot" in spec:
        entry["few_shot"] = _shots(before.shots, None if after is None else after.shots)
    if "calibration" in spec:
        sides = {"knn": [one.votes for one in (before, after) if one is not None]}
        if "probe" in spec:
            sides["probe"] = [one.probabilities for one in (before, after) if one is not None]
        entry["calibration"] = {name: _calibration(found, before.labels, spec) for name, found in sides.items()}
    if "drift" in spec and after is not None:
        if not torch.equal(before.sampled, after.sampled):
            raise WlsupError("Drift would compare different pictures: has the bank changed since?")
        entry["drift"] = _drift(before.sample, after.sample)
    if "classes" in spec:
        second = before.correct if after is None else after.correct
        rows = classes.class_changes(before.correct, second, before.labels, class_names, resamples=spec.resamples)
        alone = ("class", "label", "n", "pretrained", "pretrained_ci95")
        entry["classes"] = rows if after is not None else [{key: row[key] for key in alone} for row in rows]
    return entry


def protocols(spec: MetricSpec, sets: dict[str, dict[str, Any]], retrieval: bool = False) -> dict[str, str]:
    """Return the id of each metric that was measured, k-NN's with its k and temperature among them.

    Args:
        spec: what was asked for.
        sets: what was found; an approach without a shared space has no zero_shot.
        retrieval: whether that was found.
    """
    there = {"zero_shot": any("zero_shot" in entry for entry in sets.values()), "retrieval": retrieval}
    return {
        "knn": protocol_of(entry["knn"] for entry in sets.values()),
        **{name: _PROTOCOLS[name] for name in spec.metrics if there.get(name, True)},
    }


def shots_of(spec: MetricSpec) -> dict[str, list[int]]:
    """Return what evaluation.json says of the few-shot metric beside its protocol: of how many pictures a class."""
    return {"shots": list(spec.shots)} if "few_shot" in spec else {}


def _accuracies(before: Tensor, after: Tensor | None, resamples: int) -> dict[str, Any]:
    first = wilson(int(before.sum()), len(before))
    found: dict[str, Any] = {"pretrained": first.estimate, "pretrained_ci95": list(first[1:])}
    if after is not None:
        second = wilson(int(after.sum()), len(after))
        found |= {"finetuned": second.estimate, "finetuned_ci95": list(second[1:])}
        found |= _change(paired_bootstrap(before, after, resamples=max(resamples, 1000)))
    return found


def _change(interval: Interval) -> dict[str, Any]:
    return {"delta": interval.estimate, "ci95": list(interval[1:])}


def _shots(before: Any, after: Any) -> dict[str, Any]:
    """Return intervals over draws and test pictures; each draw used the same bank pictures for both encoders."""
    found: dict[str, Any] = {}
    for name, by_shots in before.items():
        for k, right in by_shots.items():
            first = crossed_interval(right.double())
            one: dict[str, Any] = {"draws": len(right)}
            one |= {"pretrained": first.estimate, "pretrained_ci95": _within_0_and_1(first)}
            if after is not None:
                second = crossed_interval(after[name][k].double())
                one |= {"finetuned": second.estimate, "finetuned_ci95": _within_0_and_1(second)}
                one |= _change(crossed_interval(after[name][k].double() - right.double()))
            found.setdefault(name, {})[str(k)] = one
    return found


def _within_0_and_1(share: Interval) -> list[float]:
    return [max(0.0, share.low), min(1.0, share.high)]


def _calibration(sides: list[Tensor], labels: Tensor, spec: MetricSpec) -> dict[str, Any]:
    names = ("pretrained", "finetuned")[: len(sides)]
    scores = [calibration.calibration(side, labels, resamples=spec.resamples // 2) for side in sides]
    found: dict[str, Any] = {}
    for score in scores[0]:
        found[score] = {}
        for name, one in zip(names, scores, strict=True):
            found[score] |= {name: one[score]["value"], f"{name}_ci95": one[score]["ci95"]}
    if len(sides) == 2:
        for score, one in calibration.calibration_change(*sides, labels, resamples=spec.resamples // 2).items():
            found[score] |= {"delta": one["value"], "ci95": one["ci95"]}
    diagrams = [calibration.reliability(side, labels) for side in sides]
    return found | {"reliability": dict(zip(names, diagrams, strict=True))}


def _drift(before: Tensor, after: Tensor) -> dict[str, Any]:
    first, second = (torch.nn.functional.normalize(side.float(), dim=1) for side in (before, after))
    cka = drift.cka_interval(first, second)
    finite = cka.low > float("-inf") and cka.estimate == cka.estimate
    found: dict[str, Any] = {
        "n": len(first),
        "cka": cka.estimate if finite else None,
        "cka_ci95": list(cka[1:]) if finite else None,
    }
    k = min(_OVERLAP, len(first) - 2)
    overlap, chance = drift.neighbor_overlap(first, second, k=k)
    found |= {"knn_overlap": overlap.estimate, "knn_overlap_ci95": list(overlap[1:]), "chance": chance, "k": k}
    if (cosine := drift.cosine_to(first, second)) is not None:
        found |= {"cosine": cosine.estimate, "cosine_ci95": list(cosine[1:])}
    return found
