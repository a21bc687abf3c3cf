"""k-NN leaves the module as it found it, and says what it compares."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from wlsup.approaches import approach_class
from wlsup.batch import EvalSet
from wlsup.callbacks.knn import KNN, domain_intervals, domain_means, evaluate_knn
from wlsup.data.datamodule import CaptionDataModule
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionSpec, build_vision


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(1))

    def features(self, images):
        assert not self.training
        return self.frozen(images.flatten(1)) * self.weight


def separable(count):
    labels = torch.arange(count) % 2
    images = torch.randn(count, 3, 2, 2) * 0.1 + (labels * 2.0 - 1).view(-1, 1, 1, 1)
    return TensorDataset(images, labels)


@pytest.fixture
def eval_set():
    return EvalSet("toy", "in", separable(40), separable(30), ["a", "b"])


def test_it_runs_in_eval_mode_and_puts_every_modules_mode_back(eval_set):
    encoder = Encoder()
    encoder.train()
    encoder.frozen.eval()
    result = evaluate_knn(encoder, eval_set, ks=(10, 20, 100))
    assert result.top1 == 1.0
    assert set(result.accuracy) == {10, 20}
    assert encoder.training
    assert not encoder.frozen.training


def test_domain_means_are_none_where_there_is_no_set():
    entries = {"a": {"domain": "out", "delta": 0.1}, "b": {"domain": "out", "delta": 0.3}}
    assert domain_means(entries) == {"in_domain_delta": None, "out_of_domain_delta": pytest.approx(0.2)}


def test_k_must_be_positive():
    with pytest.raises(WlsupError, match="at least 1"):
        KNN(k=0)


def test_the_interval_of_a_domains_mean_is_made_of_its_sets():
    entries = {
        "a": {"domain": "out", "delta": 0.1, "ci95": [0.0, 0.2]},
        "b": {"domain": "out", "delta": 0.3, "ci95": [0.3, 0.3]},
    }
    assert domain_intervals(entries) == {"in_domain_ci95": None, "out_of_domain_ci95": pytest.approx([0.15, 0.25])}


def test_a_listener_is_given_the_features_that_k_nn_was_scored_on(eval_set):
    knn, heard = KNN(ks=(10,)), []
    knn.listeners.append(lambda *told: heard.append(told))
    result = knn._evaluate(Encoder(), eval_set, "pretrained")
    ((told_set, bank, queries, told_result, when),) = heard
    assert (told_set, told_result, when) == (eval_set, result, "pretrained")
    assert (len(bank), len(queries)) == (40, 30)


@pytest.mark.usefixtures("few_mini_pictures")
def test_pretrained_is_the_encoder_where_an_approach_does_not_begin_as_it():
    lst = approach_class("lst")(form="replace")
    data = CaptionDataModule(eval_sets=["mini_shapes"])
    data.image_spec = lst.image_spec
    trainer = SimpleNamespace(datamodule=data, ckpt_path=None, loggers=[], global_step=0, is_global_zero=True)
    callback = KNN()
    callback.on_fit_start(trainer, lst)
    (expected,) = (evaluate_knn(build_vision(VisionSpec()), one).top1 for one in data.eval_datasets())
    assert callback.baseline() == {"mini_shapes": expected}


def test_pictures_that_could_not_be_read_are_in_the_results():
    from wlsup.callbacks.knn import left_out

    eval_set = SimpleNamespace(train=range(10), test=range(6))
    assert left_out(eval_set, SimpleNamespace(train=10, test=6)) == {}
    assert left_out(eval_set, SimpleNamespace(train=10, test=4)) == {"left_out": {"train": 0, "test": 2}}
