"""The linear probe: scikit-learn's optimum, a C that no query can choose, whatever the features' scale."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).parent))

from clusters import clusters  # noqa: E402

from wlsup.errors import WlsupError  # noqa: E402
from wlsup.evaluation.features import Features  # noqa: E402
from wlsup.evaluation.probe import fit_logistic, linear_probe, standardise  # noqa: E402


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_the_fit_is_scikit_learns(strength):
    part = clusters(300)
    weights = fit_logistic(part.features, part.labels, 4, strength)
    peer = LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(part.features.double(), part.labels)
    ours = (part.features.double() @ weights[:-1] + weights[-1]).softmax(1)
    assert torch.allclose(ours, torch.from_numpy(peer.predict_proba(part.features.double())), atol=2e-4)
    # the bias is only known up to a constant over classes
    bias = weights[-1] - weights[-1].mean()
    assert torch.allclose(bias, torch.from_numpy(peer.intercept_ - peer.intercept_.mean()), atol=2e-3)


def test_queries_do_not_choose_the_strength_and_the_bank_alone_is_fitted():
    bank, queries = clusters(400), clusters(200, seed=1)
    first = linear_probe(bank, queries, num_classes=4)
    shuffled = Features(queries.features, queries.labels.flip(0).roll(1), queries.indices)
    second = linear_probe(bank, shuffled, num_classes=4)
    assert first.strength == second.strength
    assert torch.equal(first.probabilities, second.probabilities)
    assert first.accuracy > 0.6 > second.accuracy
    assert set(first.validation) == {1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3}
    assert first.validation[first.strength] == max(first.validation.values())


def test_scale_and_offset_of_single_features_change_nothing():
    bank, queries = clusters(200), clusters(100, seed=1)
    scale, offset = torch.rand(12) * 10 + 0.1, torch.randn(12)
    moved = [Features(part.features * scale + offset, part.labels, part.indices) for part in (bank, queries)]
    ours, theirs = linear_probe(bank, queries, num_classes=4), linear_probe(*moved, num_classes=4)
    assert torch.allclose(ours.probabilities, theirs.probabilities, atol=1e-3)


def test_a_constant_feature_is_harmless():
    bank, queries = clusters(100), clusters(50, seed=1)
    for part in (bank, queries):
        part.features[:, 3] = 0.25
    assert standardise(bank.features)[0][:, 3].abs().max() == 0
    assert linear_probe(bank, queries, num_classes=4).probabilities.isfinite().all()


def test_a_picture_a_class_leaves_nothing_to_hold_out_and_still_fits():
    bank, queries = clusters(4, noise=0.1), clusters(40, noise=0.1, seed=1)
    result = linear_probe(bank, queries, num_classes=4)
    assert result.validation == {}
    assert result.accuracy > 0.9


def test_a_mistake_is_refused():
    bank, queries = clusters(40), clusters(20)
    with pytest.raises(WlsupError, match=r"labels in 0\.\.2"):
        linear_probe(bank, queries, num_classes=3)
    with pytest.raises(WlsupError, match="two classes"):
        linear_probe(Features(bank.features[::4], bank.labels[::4], bank.indices[::4]), queries, num_classes=4)
    queries.features[0, 0] = math.nan
    with pytest.raises(WlsupError, match="diverged"):
        linear_probe(bank, queries, num_classes=4)
