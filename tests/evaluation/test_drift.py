"""Drift: what CKA must not see, what it must, and neighbours by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from wlsup.errors import WlsupError
from wlsup.evaluation.drift import cka_interval, cosine_to, linear_cka, neighbor_overlap


def features(n: int = 200, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("debiased", [True, False])
def test_cka_is_one_at_identity_and_under_rotation_scale_and_shift(debiased):
    x = features()
    turn = torch.linalg.qr(features(16, 16, seed=1)).Q
    for other in (x, x @ turn, 7.3 * x, 0.01 * x @ turn + 5):
        assert linear_cka(x, other, debiased=debiased) == pytest.approx(1.0, abs=1e-5)
    stretched = x * torch.linspace(0.05, 3, 16)  # no isotropic scale: CKA does see it
    assert linear_cka(x, stretched, debiased=debiased) < 0.9


def test_cka_is_symmetric_and_takes_different_widths():
    x, y = features(), torch.cat([features(), features(seed=3)], 1)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))
    assert 0.5 < linear_cka(x, y) < 0.95


def test_of_unrelated_wide_features_the_debiased_estimate_says_nothing_and_the_plain_one_does_not():
    x, y = features(100, 512), features(100, 512, seed=1)
    assert abs(linear_cka(x, y)) < 0.05
    assert linear_cka(x, y, debiased=False) > 0.5


def test_both_estimates_are_their_definitions_by_gram_matrices():
    x, y = features(30, 5).double(), (features(30, 5) ** 2).double()
    n, eye = 30, torch.eye(30, dtype=torch.float64)
    centre = eye - 1 / n
    plain = [centre @ part @ part.T @ centre for part in (x, y)]

    def ratio(hsic, grams):
        return float(hsic(*grams) / (hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])).sqrt())

    assert linear_cka(x, y, debiased=False) == pytest.approx(ratio(lambda k, m: (k * m).sum(), plain))

    def unbiased(k, m):
        k, m = k * (1 - eye), m * (1 - eye)
        one = torch.ones(n, dtype=torch.float64)
        terms = (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (terms - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))

    assert linear_cka(x, y) == pytest.approx(ratio(unbiased, [x @ x.T, y @ y.T]), abs=1e-9)


def test_the_interval_of_cka_covers_the_value_of_many_pictures():
    def pair(n, seed):
        x = features(n, 8, seed)
        return x, x @ torch.diag(torch.linspace(0.2, 2, 8)) + 0.5 * features(n, 8, seed + 10_000)

    truth = linear_cka(*pair(20_000, 1))
    covered = 0
    for seed in range(80):
        found = cka_interval(*pair(200, 100 + seed))
        covered += found.low <= truth <= found.high
        assert found.low <= found.estimate <= found.high
    assert covered / 80 > 0.86
    constant = cka_interval(torch.ones(40, 3), features(40, 3))
    assert math.isnan(constant.estimate)


def test_neighbours_kept_are_all_at_identity_and_chance_when_unrelated():
    x, y = (normalize(features(400, 16, seed), dim=1) for seed in (0, 1))
    same, chance = neighbor_overlap(x, x)
    assert same == (1.0, 1.0, 1.0)
    unrelated, _ = neighbor_overlap(x, y)
    assert chance == pytest.approx(10 / 399)
    assert unrelated.low <= chance <= unrelated.high


def test_neighbours_are_counted_by_hand():
    angles = torch.tensor([0.0, 0.1, 0.3, 1.0, 1.15, 2.0])
    x = torch.stack([angles.cos(), angles.sin()], 1)
    moved = angles.clone()
    moved[1] = 1.9  # picture 1 leaves 0 and 2 for 5: nearest were 0->1, 1->0, 2->1, 3->4, 4->3, 5->4
    y = torch.stack([moved.cos(), moved.sin()], 1)  # now 0->2, 1->5, 2->0, 3->4, 4->3, 5->1
    assert neighbor_overlap(x, y, k=1)[0].estimate == pytest.approx(2 / 6)


def test_copies_of_a_picture_are_neighbours_and_itself_never_is():
    x = normalize(torch.ones(30, 4), dim=1)
    assert neighbor_overlap(x, x, k=5)[0].estimate == 1.0
    with pytest.raises(WlsupError, match="k=29"):
        neighbor_overlap(x, x, k=29)


def test_the_cosine_sees_a_rotation_and_widths_must_agree():
    x = normalize(features(), dim=1)
    assert cosine_to(x, x) == pytest.approx((1.0, 1.0, 1.0))
    assert cosine_to(x, -x).estimate == pytest.approx(-1.0)
    assert cosine_to(x, x[:, :8]) is None
    with pytest.raises(WlsupError, match="same four or more"):
        linear_cka(x, x[:50])
