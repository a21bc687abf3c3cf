"""What the frozen classifier promises: the head that scikit-learn finds, the same every time, and frozen."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from wlsup.errors import WlsupError
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.reprogramming.classifier import FrozenClassifier, fit_head


def features():
    labels = torch.arange(90) % 3
    return torch.randn(90, 5) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]) + labels[:, None] * 0.7 + 3, labels


def test_the_head_is_that_of_a_reference_logistic_regression():
    given, labels = features()
    weight, bias = fit_head(given, labels, 3, penalty=0.01)
    standard = (given - given.mean(0)) / given.std(0)
    reference = LogisticRegression(C=1 / (0.01 * len(given)), tol=1e-10, max_iter=10_000)
    reference.fit(standard.double().numpy(), labels.numpy())
    ours = (given @ weight.T + bias).softmax(-1)
    theirs = torch.from_numpy(reference.predict_proba(standard.double().numpy())).float()
    assert (ours - theirs).abs().max() < 1e-3


def test_the_same_features_give_the_same_head_also_in_inference_mode():
    given, labels = features()
    first = fit_head(given, labels, 3)
    torch.rand(7)
    with torch.inference_mode():
        second = fit_head(given, labels, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_head_is_no_parameter_and_no_part_of_the_state():
    classifier = FrozenClassifier(build_vision(VisionSpec()).eval())
    names = {f"encoder.{name}" for name in classifier.encoder.state_dict()}
    with pytest.raises(WlsupError, match="no head yet"):
        classifier(torch.zeros(1, 3, 64, 64))
    classifier.fit(torch.randn(20, classifier.encoder.embed_dim), torch.arange(20) % 4, 4)
    assert classifier(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
    assert set(classifier.state_dict()) == names
    assert not {name for name, _ in classifier.named_parameters()} - names
