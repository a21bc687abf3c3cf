"""What changed class by class: before, after, how sure, and who was helped or hurt when many are looked at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.evaluation.statistics import exact_sign_test, holm, paired_bootstrap, wilson

__all__ = ["file_name", "PROTOCOL", "class_changes", "examples"]

PROTOCOL = "classes:v1 accuracy by class; paired bootstrap; exact McNemar test, Holm over classes at 0.05"
"""The id kept beside per-class numbers."""


def class_changes(
    before: Tensor, after: Tensor, labels: Tensor, class_names: Sequence[str], *, resamples: int = 2000
) -> list[dict[str, Any]]:
    """Return each class's accuracy before and after, most helped first.

    The interval of a class is its own; among many classes some exclude 0 by chance. "verdict" is by McNemar's exact
    test with Holm's correction over all classes: "helped" or "hurt" where the chance of any false one is below 5 %.

    Args:
        before: (m,) bool, which queries the first encoder got right.
        after: (m,) bool, the second.
        labels: (m,) int64.
        class_names: one a class id.
        resamples: of each class's queries.

    Returns:
        [{"class", "label", "n", "pretrained", "pretrained_ci95", "finetuned", "finetuned_ci95", "delta", "ci95",
        "p_holm", "verdict"}] of the classes that have queries.

    Raises:
        WlsupError: if the three are not of one length.
    """
    if not len(before) == len(after) == len(labels) or not len(labels):
        raise WlsupError(f"One answer a query before and after: {len(before)}, {len(after)}, {len(labels)} labels.")
    rows, p_values = [], []
    for label in labels.unique().tolist():
        mine = labels == label
        first, second = before[mine], after[mine]
        n = int(mine.sum())
        sides = [wilson(int(side.sum()), n) for side in (first, second)]
        delta, low, high = paired_bootstrap(first, second, resamples=resamples)
        p_values.append(exact_sign_test(int((second & ~first).sum()), int((first & ~second).sum())))
        rows.append(
            {
                "class": class_names[label],
                "label": label,
                "n": n,
                "pretrained": sides[0].estimate,
                "pretrained_ci95": list(sides[0][1:]),
                "finetuned": sides[1].estimate,
                "finetuned_ci95": list(sides[1][1:]),
                "delta": delta,
                "ci95": [low, high],
            }
        )
    for row, adjusted in zip(rows, holm(p_values), strict=True):
        sure = adjusted < 0.05
        row["p_holm"] = adjusted
        row["verdict"] = "unsure" if not sure else "helped" if row["delta"] > 0 else "hurt"
    return sorted(rows, key=lambda row: (-row["delta"], row["label"]))


def examples(
    rows: Sequence[dict[str, Any]],
    before: Tensor,
    after: Tensor,
    labels: Tensor,
    *,
    classes: int = 6,
    pictures: int = 4,
) -> list[tuple[Literal["helped", "hurt"], int, str, list[int]]]:
    """Return queries to look at: of the most helped classes those newly right, of the most hurt those newly wrong.

    Args:
        rows: of `class_changes`.
        before: (m,) bool.
        after: (m,) bool.
        labels: (m,).
        classes: how many of each kind at most; a class that did not change is none.
        pictures: of each class at most.

    Returns:
        [(kind, rank from 1, class, query numbers)].
    """
    chosen: list[tuple[Literal["helped", "hurt"], int, str, list[int]]] = []
    kinds: tuple[tuple[Literal["helped", "hurt"], list[dict[str, Any]], Tensor], ...] = (
        ("helped", [row for row in rows if row["delta"] > 0][:classes], after & ~before),
        ("hurt", [row for row in reversed(rows) if row["delta"] < 0][:classes], before & ~after),
    )
    for kind, worst, changed in kinds:
        for rank, row in enumerate(worst, start=1):
            found = (changed & (labels == row["label"])).nonzero().squeeze(1)[:pictures]
            chosen.append((kind, rank, row["class"], torch.atleast_1d(found).tolist()))
    return chosen


def file_name(name: str) -> str:
    """Return a set's or a class's name as one that every file system takes."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "_"
