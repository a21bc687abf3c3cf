"""Class by class: known counts, the caution of many comparisons, and which pictures to look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wlsup.errors import WlsupError
from wlsup.evaluation.classes import class_changes, examples, file_name


def answers(changes: dict[int, tuple[int, int, int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """{label: (both right, gained, lost, both wrong)} -> before, after, labels."""
    rows = [
        (first, second, label)
        for label, counts in changes.items()
        for (first, second), count in zip(((1, 1), (0, 1), (1, 0), (0, 0)), counts, strict=True)
        for _ in range(count)
    ]
    before, after, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    return before.bool(), after.bool(), labels


def test_counts_order_and_verdicts():
    before, after, labels = answers({0: (10, 0, 30, 10), 1: (20, 3, 1, 26), 3: (5, 25, 0, 20)})
    rows = class_changes(before, after, labels, ["a", "b", "c", "d"])
    assert [(row["class"], row["n"], row["verdict"]) for row in rows] == [
        ("d", 50, "helped"), ("b", 50, "unsure"), ("a", 50, "hurt"),
    ]  # fmt: skip
    assert (rows[0]["pretrained"], rows[0]["finetuned"], rows[0]["delta"]) == (0.1, 0.6, 0.5)
    for row in rows:
        assert row["ci95"][0] <= row["delta"] <= row["ci95"][1]
        assert row["pretrained_ci95"][0] <= row["pretrained"] <= row["pretrained_ci95"][1]
    with pytest.raises(WlsupError, match="One answer a query"):
        class_changes(before, after[:-1], labels, ["a", "b", "c", "d"])


def test_among_fifty_classes_without_a_change_hardly_ever_one_is_found():
    generator, single, found = np.random.default_rng(0), 0, 0
    for _ in range(20):
        labels = torch.arange(50).repeat(40)
        before, after = (torch.from_numpy(generator.random(2000) < 0.5) for _ in range(2))
        rows = class_changes(before, after, labels, list(map(str, range(50))), resamples=100)
        found += any(row["verdict"] != "unsure" for row in rows)
        single += any(row["ci95"][0] > 0 or row["ci95"][1] < 0 for row in rows)
    assert single >= 17  # without the correction there is nearly always one
    assert found <= 4  # 5 % of 20, and chance


def test_examples_are_the_newly_right_of_the_helped_and_the_newly_wrong_of_the_hurt():
    before, after, labels = answers({0: (0, 0, 5, 0), 1: (3, 2, 0, 0), 2: (4, 0, 0, 0)})
    rows = class_changes(before, after, labels, ["a", "b", "c"])
    shown = examples(rows, before, after, labels, pictures=3)
    assert [(kind, rank, name, len(found)) for kind, rank, name, found in shown] == [
        ("helped", 1, "b", 2), ("hurt", 1, "a", 3),
    ]  # fmt: skip
    for kind, _, _, found in shown:
        assert all(bool(after[i]) == (kind == "helped") and before[i] != after[i] for i in found)
    same = class_changes(before, before, labels, ["a", "b", "c"])
    assert examples(same, before, before, labels) == []


@pytest.mark.parametrize(
    ("name", "file"), [("a/b: c", "a_b_c"), ("..", "_"), ("", "_"), ("Müller-1.5", "Müller-1.5"), ("../x", "x")]
)
def test_a_class_may_have_any_name_and_its_file_may_not(name, file):
    assert file_name(name) == file
