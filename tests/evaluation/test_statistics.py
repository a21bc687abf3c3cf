"""Intervals: the paired bootstrap against resampling by hand, and Student's t against the tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from wlsup.errors import WlsupError
from wlsup.evaluation.statistics import (
    Interval,
    crossed_interval,
    exact_sign_test,
    holm,
    mean_and_interval,
    mean_of_intervals,
    mean_over_pictures,
    over_seeds,
    paired_bootstrap,
    wilson,
)


def pictures(m: int, gained: float, lost: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Correctness before and after, of m pictures that change with these probabilities."""
    generator = np.random.default_rng(seed)
    change = generator.choice([1, -1, 0], size=m, p=[gained, lost, 1 - gained - lost])
    settled = generator.random(m) < 0.7
    return np.where(change == 0, settled, change < 0), np.where(change == 0, settled, change > 0)


def test_the_interval_is_that_of_resampling_the_pictures_one_by_one():
    before, after = pictures(300, 0.12, 0.05, seed=1)
    generator = np.random.default_rng(5)
    drawn = generator.integers(300, size=(40_000, 300))
    deltas = (after.astype(float) - before.astype(float))[drawn].mean(1)
    low, high = np.quantile(deltas, [0.025, 0.975])
    ours = paired_bootstrap(torch.from_numpy(before), torch.from_numpy(after), resamples=40_000)
    assert ours.estimate == pytest.approx(after.mean() - before.mean())
    # Two Monte Carlo quantiles of a distribution on multiples of 1/300 differ by at most one such step.
    assert ours.low == pytest.approx(low, abs=1.01 / 300)
    assert ours.high == pytest.approx(high, abs=1.01 / 300)
    assert low < high


def test_resampled_changes_have_the_mean_and_spread_of_the_bootstrap_distribution():
    # Known: mean delta, variance (p + q - delta^2) / m; the 95 % interval of a near-normal is +-1.96 of it.
    before, after = pictures(20_000, 0.10, 0.06, seed=2)
    change = after.astype(float) - before.astype(float)
    half = 1.96 * change.std() / math.sqrt(len(change))
    delta, low, high = paired_bootstrap(before, after)
    assert low == pytest.approx(delta - half, rel=0.02, abs=2e-4)
    assert high == pytest.approx(delta + half, rel=0.02, abs=2e-4)


def test_the_interval_covers_the_true_change_about_19_times_in_20():
    covered = 0
    for seed in range(400):
        _, low, high = paired_bootstrap(*pictures(400, 0.15, 0.10, seed), resamples=1000)
        covered += low <= 0.05 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_same_seed_gives_the_same_interval_and_leaves_global_random_states_alone():
    before, after = pictures(200, 0.2, 0.1, seed=0)
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    first, second, other = (paired_bootstrap(before, after, seed=seed, resamples=500) for seed in (3, 3, 4))
    assert first == second
    assert first != other
    assert (np.random.get_state()[1] == state).all()


def test_no_change_has_an_interval_of_nothing():
    same = torch.tensor([True, False, True])
    assert paired_bootstrap(same, same) == (0.0, 0.0, 0.0)
    assert paired_bootstrap(~same, ~same) == (0.0, 0.0, 0.0)


def test_all_gained_and_all_lost_are_whole():
    nothing, everything = torch.zeros(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)
    assert paired_bootstrap(nothing, everything) == (1.0, 1.0, 1.0)
    assert paired_bootstrap(everything, nothing) == (-1.0, -1.0, -1.0)


def test_pairing_matters():
    # The same two accuracies: changed on the same pictures or on others.
    before = np.arange(1000) < 500
    few = paired_bootstrap(before, np.arange(1000) < 520)
    many = paired_bootstrap(before, np.arange(1000) >= 480)
    assert few.estimate == many.estimate == pytest.approx(0.02)
    assert few.low > 0 > many.low


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        ([], [], {}, "same test pictures"),
        ([True], [True, False], {}, r"not \(1,\) and \(2,\)"),
        ([0.3, 0.2], [0.1, 0.9], {}, "true or false"),
        ([True], [True], {"resamples": 0}, "resamples must be at least 1"),
        ([True], [True], {"confidence": 1.0}, "confidence"),
    ],
)
def test_a_mistake_is_refused(before, after, options, message):
    with pytest.raises(WlsupError, match=message):
        paired_bootstrap(np.asarray(before), np.asarray(after), **options)


def test_the_mean_over_seeds_has_students_interval():
    # t(4, 0.975) = 2.776 and t(2, 0.975) = 4.303 in the printed tables.
    mean, low, high = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert (high - mean) == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert mean - low == pytest.approx(high - mean)
    assert mean_and_interval([0.0, 1.0, 2.0]).high == pytest.approx(1 + 4.303 / math.sqrt(3), rel=1e-3)


def test_one_seed_says_nothing_about_spread_and_equal_seeds_say_none():
    assert mean_and_interval([0.3]) == (0.3, -math.inf, math.inf)
    assert mean_and_interval([0.25, 0.25]) == (0.25, 0.25, 0.25)
    for values in ([], [0.1, math.nan]):
        with pytest.raises(WlsupError, match="one or more finite numbers"):
            mean_and_interval(values)


def test_seeds_are_kept_with_mean_interval_and_values_and_one_seed_has_no_interval():
    found = over_seeds([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["values"] == [1.0, 2.0, 3.0]
    assert found["ci95"] == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5])  # t(0.975, 2) = 4.302653
    assert over_seeds([1.0])["ci95"] is None


def test_a_share_has_scipys_wilson_interval():
    for right, total in ((0, 10), (3, 10), (10, 10), (412, 500)):
        theirs = binomtest(right, total).proportion_ci(0.95, method="wilson")
        ours = wilson(right, total)
        assert ours == pytest.approx((right / total, theirs.low, theirs.high), abs=1e-12)
    with pytest.raises(WlsupError, match="11 of 10"):
        wilson(11, 10)


def test_intervals_of_a_share_and_of_a_mean_cover_the_truth_about_19_times_in_20():
    generator = np.random.default_rng(0)
    share = mean = 0
    for seed in range(400):
        found = wilson(int(generator.binomial(100, 0.9)), 100)
        share += found.low <= 0.9 <= found.high
        one = mean_over_pictures(generator.exponential(size=300), seed=seed, resamples=600)
        mean += one.low <= 1.0 <= one.high
    assert 0.92 <= share / 400 <= 0.98
    assert 0.92 <= mean / 400 <= 0.98


def test_a_mean_over_sets_adds_up_the_distances_in_squares():
    found = mean_of_intervals([Interval(0.2, 0.1, 0.5), Interval(0.4, 0.4, 0.8)])
    assert found == pytest.approx((0.3, 0.3 - 0.1 / 2, 0.3 + 0.5 / 2))
    with pytest.raises(WlsupError, match="at least one"):
        mean_of_intervals([])


def test_a_mean_over_sets_covers_the_true_mean_change():
    covered = 0
    for seed in range(300):
        sets = [paired_bootstrap(*pictures(300, 0.15, 0.10, 7 * seed + i), resamples=500) for i in range(3)]
        found = mean_of_intervals(sets)
        covered += found.low <= 0.05 <= found.high
    assert 0.92 <= covered / 300 <= 0.98


@pytest.mark.parametrize(("seeds", "by_seed", "by_picture"), [(3, 0.01, 0.3), (3, 0.0, 0.3), (5, 0.03, 0.1)])
def test_seeds_and_pictures_together_are_covered_where_seeds_alone_may_not_be(seeds, by_seed, by_picture):
    generator, covered = np.random.default_rng(1), 0
    for _ in range(600):
        change = 0.02 + by_seed * generator.standard_normal((seeds, 1))
        change = change + by_picture * generator.standard_normal((1, 300))
        found = crossed_interval(change + 0.4 * generator.standard_normal((seeds, 300)))
        covered += found.low <= 0.02 <= found.high
    assert 0.915 <= covered / 600 <= 0.985


def test_without_a_common_part_of_pictures_the_crossed_interval_is_students_over_seeds():
    # Seeds that change disjoint pictures: the rest carries more than the pictures, whose part is then nothing.
    change = np.zeros((3, 6))
    change[0, :2], change[1, 2:4], change[2, 4:] = 1, 0.5, 0.25
    assert crossed_interval(change) == pytest.approx(mean_and_interval(change.mean(1)))
    assert crossed_interval(np.ones((2, 4))) == (1.0, 1.0, 1.0)
    with pytest.raises(WlsupError, match="two or more seeds"):
        crossed_interval(np.ones((1, 4)))


def test_holms_correction_is_the_published_example_and_keeps_false_finds_rare():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    generator = np.random.default_rng(0)
    false = sum(min(holm(generator.random(20).tolist())) < 0.05 for _ in range(1000))
    assert false / 1000 < 0.07


def test_the_sign_test_is_the_binomial_of_what_changed():
    assert exact_sign_test(0, 0) == 1.0
    assert exact_sign_test(5, 0) == pytest.approx(2 / 32)
    assert exact_sign_test(3, 1) == pytest.approx(2 * (1 + 4) / 16)
