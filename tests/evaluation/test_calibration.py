"""Calibration: torchmetrics' and scikit-learn's figures, the definitions in slow motion, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from wlsup.errors import WlsupError
from wlsup.evaluation.calibration import calibration, calibration_change, reliability


def forecasts(m: int, classes: int = 5, sharpen: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities whose labels are drawn from them, then sharpened: calibrated at 1, overconfident above."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(m, classes)) * 1.5
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (true.cumsum(1) < generator.random((m, 1))).sum(1).clip(max=classes - 1)
    said = np.exp(sharpen * logits)
    return torch.from_numpy(said / said.sum(1, keepdims=True)), torch.from_numpy(labels)


@pytest.mark.parametrize("sharpen", [0.5, 1.0, 2.5])
def test_the_expected_calibration_error_is_torchmetrics(sharpen):
    p, y = forecasts(700, sharpen=sharpen)
    theirs = float(multiclass_calibration_error(p, y, num_classes=5, n_bins=15, norm="l1"))
    assert calibration(p, y, resamples=10)["ece"]["value"] == pytest.approx(theirs, abs=1e-6)


def test_votes_on_the_edges_of_bins_fall_where_torchmetrics_puts_them():
    # On an edge one that is right, just below it one that is wrong: in one bin they would cancel.
    edges = torch.linspace(0, 1, 16)[9:15:2]
    sure = torch.cat([edges, edges - 0.03])
    p = torch.stack([sure, 1 - sure], 1)
    y = torch.cat([torch.zeros(3), torch.ones(3)]).long()
    theirs = float(multiclass_calibration_error(p, y, num_classes=2, n_bins=15, norm="l1"))
    assert calibration(p, y, resamples=10)["ece"]["value"] == pytest.approx(theirs, abs=1e-6)


def test_the_scores_are_scikit_learns_and_briers():
    p, y = forecasts(300, sharpen=2.0)
    found = calibration(p, y, resamples=10)
    assert found["nll"]["value"] == pytest.approx(log_loss(y, p, labels=list(range(5))))
    truth = torch.nn.functional.one_hot(y, 5)
    assert found["brier"]["value"] == pytest.approx(float(((p - truth) ** 2).sum(1).mean()))


def test_adaptive_and_classwise_errors_are_their_definitions():
    p, y = forecasts(450, sharpen=2.0)
    found = calibration(p, y, resamples=10)
    order = p.max(1).values.argsort()
    sure, right = p.max(1).values[order], (p.argmax(1) == y)[order].double()
    parts = [abs(float((sure - right)[i * 30 : (i + 1) * 30].sum())) for i in range(15)]
    assert found["adaptive"]["value"] == pytest.approx(sum(parts) / 450, abs=2e-3)
    total = 0.0
    for label in range(5):
        for low in range(15):
            mine = [(float(q), int(t == label)) for q, t in zip(p[:, label], y, strict=True) if int(q * 15) == low]
            total += abs(sum(q - t for q, t in mine)) / 450 / 5
    assert found["classwise"]["value"] == pytest.approx(total, abs=1e-5)


def test_a_perfect_forecaster_has_no_error():
    y = torch.tensor([0, 1, 2, 1])
    found = calibration(torch.eye(3)[y], y, resamples=20)
    assert {name: entry["value"] for name, entry in found.items()} == pytest.approx(dict.fromkeys(found, 0.0))


def test_a_vote_of_nothing_costs_much_and_not_everything():
    found = calibration(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 0]), resamples=20)
    assert 10 < found["nll"]["value"] < 20


@pytest.mark.parametrize(("sharpen", "least"), [(2.0, 0.88), (1.3, 0.75)])
def test_intervals_cover_the_true_error_of_an_overconfident_forecaster(sharpen, least):
    # Near calibration noise outweighs the error: there the percentile interval covers 63 % for ece, 0 % for classwise.
    p, y = forecasts(100_000, sharpen=sharpen)
    truth = {name: entry["value"] for name, entry in calibration(p, y, resamples=1).items()}
    covered = dict.fromkeys(truth, 0)
    for start in range(0, 100 * 500, 500):
        part = slice(start, start + 500)
        for name, entry in calibration(p[part], y[part], resamples=200, seed=start).items():
            covered[name] += entry["ci95"][0] <= truth[name] <= entry["ci95"][1]
    rates = {name: count / 100 for name, count in covered.items()}
    assert all(rates[name] >= 0.88 for name in ("nll", "brier")), rates
    assert rates["ece"] >= least, rates
    assert rates["classwise"] >= 0.6, rates


def test_a_change_is_paired_and_nothing_changed_is_nothing():
    p, y = forecasts(400, sharpen=1.0)
    sharp, _ = forecasts(400, sharpen=3.0)
    same = calibration_change(p, p, y, resamples=50)
    assert all(entry == {"value": 0.0, "ci95": [0.0, 0.0]} for entry in same.values())
    worse = calibration_change(p, sharp, y, resamples=200)
    for name in ("ece", "nll", "brier"):
        assert worse[name]["ci95"][0] > 0, name
    alone = calibration(sharp, y, resamples=200)["brier"]["ci95"]
    paired = worse["brier"]["ci95"]
    assert paired[1] - paired[0] < alone[1] - alone[0]


def test_the_reliability_diagram_adds_up_to_the_error():
    p, y = forecasts(600, sharpen=2.0)
    rows = reliability(p, y)
    assert sum(row["n"] for row in rows) == 600
    error = sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / 600
    assert error == pytest.approx(calibration(p, y, resamples=10)["ece"]["value"], abs=1e-9)
    assert all(row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] for row in rows)


def test_what_are_no_probabilities_is_refused():
    with pytest.raises(WlsupError, match="rows sum to 1"):
        calibration(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(WlsupError, match=r"outside 0\.\.1"):
        calibration(torch.full((4, 2), 0.5), torch.full((4,), 2))
