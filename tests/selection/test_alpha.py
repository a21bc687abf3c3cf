"""The spectrum's exponent, on values whose exponent is known."""

import math

import numpy as np
import pytest
import torch

from wlsup.evaluation.watcher import watch
from wlsup.selection.alpha import fit_power_law, spectral_alpha


def pareto(alpha, count, seed=0):
    """Values of density proportional to x^-alpha from 1 on."""
    return (1 - np.random.default_rng(seed).random(count)) ** (-1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [2.5, 3.0, 4.0])
def test_the_exponent_of_a_pareto_sample_is_found(alpha):
    fit = fit_power_law(pareto(alpha, 2000))
    assert fit.alpha == pytest.approx(alpha, rel=0.12)
    assert fit.distance < 0.05


def test_with_a_fixed_tail_it_is_the_closed_form():
    values = np.array([1.0, math.e, math.e**2])
    fit = fit_power_law(values)
    # xmin = 1: 1 + 3 / (0 + 1 + 2) = 2; xmin = e: 1 + 2 / (0 + 1) = 3
    assert fit.alpha == pytest.approx({1.0: 2.0, math.e: 3.0}[fit.xmin])


def test_the_body_below_the_tail_is_left_out():
    values = np.concatenate([np.random.default_rng(1).uniform(0.01, 1, 500), pareto(3.0, 1500)])
    assert fit_power_law(values).alpha == pytest.approx(3.0, rel=0.15)


def test_a_matrix_with_such_a_spectrum_has_it_whatever_its_scale():
    size = 300
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for _ in range(2))
    singular = torch.from_numpy(pareto(3.0, size) ** 0.5)
    weight = left @ torch.diag(singular) @ right
    fit = spectral_alpha(weight)
    assert fit.alpha == pytest.approx(fit_power_law(pareto(3.0, size)).alpha, rel=1e-6)
    assert spectral_alpha(7 * weight).alpha == pytest.approx(fit.alpha, rel=1e-6)


def test_noise_has_no_power_law_in_reach_and_small_or_empty_matrices_no_exponent():
    assert spectral_alpha(torch.randn(300, 200)).alpha > 5
    assert spectral_alpha(torch.randn(300, 20)) is None
    assert spectral_alpha(torch.zeros(300, 200)) is None


@pytest.mark.parametrize("shape", [(96, 60), (60, 96), (64, 64)])
def test_it_is_weightwatchers_own_exponent(shape):
    weight = torch.randn(shape) * torch.from_numpy(pareto(3.0, shape[1])).float().sqrt()
    fit, theirs = spectral_alpha(weight), watch(weight, shuffle=False)
    assert fit.alpha == pytest.approx(theirs["alpha"], rel=1e-6)
    assert fit.distance == pytest.approx(theirs["D"], rel=1e-6)
    assert fit.xmin == pytest.approx(theirs["xmin"], rel=1e-6)
    assert fit.tail == theirs["num_pl_spikes"]
