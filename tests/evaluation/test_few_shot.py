"""Few shots: known answers, the same draws for every encoder, more shots help."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from clusters import clusters  # noqa: E402

from wlsup.errors import WlsupError  # noqa: E402
from wlsup.evaluation.features import Features  # noqa: E402
from wlsup.evaluation.few_shot import few_shot  # noqa: E402


def test_well_parted_classes_are_told_apart_by_one_picture_and_equal_ones_are_not():
    bank, queries = clusters(40, noise=0.05), clusters(40, noise=0.05, seed=1)
    found = few_shot(bank, queries, num_classes=4, shots=(1,), draws=5)
    assert all(draws[1] == [1.0] * 5 for draws in found.accuracies.values())
    same = torch.ones(40, 12) / 12**0.5
    found = few_shot(
        Features(same, bank.labels, bank.indices), Features(same, queries.labels, queries.indices), num_classes=4,
        shots=(1,), draws=5,
    )  # fmt: skip
    assert all(draws[1] == [0.25] * 5 for draws in found.accuracies.values())


def test_a_centroid_is_the_mean_of_the_drawn_pictures_by_cosine():
    # Class 0 points to x in the mean, class 1 to y; a query between belongs to the nearer mean.
    bank = Features(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0, 1, 1]), None)
    queries = Features(torch.tensor([[0.6, 0.8], [0.9, 0.4359]]), torch.tensor([0, 0]), None)
    # mean of class 0: (0.9, 0.3) / 0.9487; cosine of query 0: 0.822 against 0.8
    found = few_shot(bank, queries, num_classes=2, shots=(2,), draws=2, classifiers=("centroid",))
    assert found.accuracies == {"centroid": {2: [1.0, 1.0]}}


def test_two_encoders_see_the_same_draws_and_another_seed_others():
    bank, queries = clusters(200), clusters(300, seed=1)
    turned = torch.linalg.qr(torch.randn(12, 12)).Q
    other = [Features(part.features @ turned, part.labels, part.indices) for part in (bank, queries)]
    options = {"num_classes": 4, "shots": (1, 3), "draws": 6}
    first, second = few_shot(bank, queries, **options), few_shot(*other, **options)
    for name, by_shots in first.accuracies.items():
        for k, values in by_shots.items():
            assert values == pytest.approx(second.accuracies[name][k], abs=0.004)  # but for rounding
    assert few_shot(bank, queries, seed=1, **options).accuracies != first.accuracies
    assert len(set(first.accuracies["centroid"][1])) > 1


def test_more_shots_help_and_what_the_bank_cannot_give_is_left_out():
    bank, queries = clusters(100), clusters(300, seed=1)
    found = few_shot(bank, queries, num_classes=4, shots=(1, 10, 26), draws=8)
    for by_shots in found.accuracies.values():
        assert sorted(by_shots) == [1, 10]
        assert sum(by_shots[10]) > sum(by_shots[1])
    with pytest.raises(WlsupError, match=r"\[26\], and one has 25"):
        few_shot(bank, queries, num_classes=4, shots=(26,))
    with pytest.raises(WlsupError, match="draws=1"):
        few_shot(bank, queries, num_classes=4, draws=1)


def test_a_class_without_a_bank_picture_is_never_named():
    bank, queries = clusters(40, noise=0.05), clusters(40, noise=0.05, seed=1)
    kept = (bank.labels != 2).nonzero().squeeze(1)
    part = Features(bank.features[kept], bank.labels[kept], bank.indices[kept])
    found = few_shot(part, queries, num_classes=4, shots=(2,), draws=2)
    assert found.accuracies["centroid"][2] == [0.75, 0.75]
