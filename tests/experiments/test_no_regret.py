"""The no-regret study's arithmetic: what validates, what is chosen, what is confirmed."""

import csv
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT
from wlsup.batch import EvalSet
from wlsup.data.datamodule import CaptionDataModule
from wlsup.evaluation.features import Features
from wlsup.evaluation.validation import picture_keys, validation_split
from wlsup.models.vision import VisionSpec, build_vision


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("no_regret", ROOT / "experiments" / "no_regret.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["no_regret"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["no_regret"]


def run(study, inside, outside, n=1000):
    """What `scored` returns where accuracies are those given, at each alpha; pictures right are the first ones."""

    def right(shares):
        return torch.stack([torch.arange(n) < round(n * share) for share in shares])

    return {"home": {"domain": "in", "right": right(inside)}, "away": {"domain": "out", "right": right(outside)}}


def curve(start, end, steps=11):
    return [start + (end - start) * step / (steps - 1) for step in range(steps)]


def test_the_best_gain_within_the_margin_is_chosen_not_the_best_gain(study):
    flat = [0.5] * 11
    curves = {
        "greedy": [run(study, curve(0.5, 0.2), curve(0.3, 0.6))] * 2,
        "careful": [run(study, flat, curve(0.3, 0.36))] * 2,
    }
    assert study.choose(curves) == ("careful", 10, True)


def test_where_nothing_keeps_the_margin_the_least_loss_is_taken_and_told(study):
    curves = {
        "worse": [run(study, curve(0.5, 0.1), curve(0.3, 0.6))],
        "bad": [run(study, [0.5, *[0.45] * 10], curve(0.3, 0.4))],
    }
    assert study.choose(curves) == ("worse", 1, False)  # loses 4 points there, the other one 5


def test_changes_are_means_over_seeds_then_sets_with_an_error_over_pictures(study):
    runs = [run(study, [0.5, 0.6], [0.3, 0.3]), run(study, [0.5, 0.5], [0.3, 0.4])]
    mean, error = study.changes(runs, "in", 1)
    assert mean == pytest.approx(0.05)
    half = torch.tensor(
        [0.5] * 100 + [0.0] * 900, dtype=torch.float64
    )  # of 1,000 pictures 100 change in one of 2 seeds
    assert error == pytest.approx(float(half.std()) / 1000**0.5)


def test_folds_are_a_function_of_keys_and_balanced(study):
    labels = torch.arange(100) % 4
    keys = [f"picture {number}" for number in range(100)]
    fold = study.folds(labels, keys)
    order = torch.randperm(100)
    again = study.folds(labels[order], [keys[number] for number in order.tolist()])
    assert torch.equal(fold[order], again)
    counts = torch.zeros(4, study.FOLDS)
    for label, number in zip(labels.tolist(), fold.tolist(), strict=True):
        counts[label, number] += 1
    assert (counts == 5).all()


def test_no_picture_votes_for_itself(study):
    """Features in which each picture is alone, and its twin of another class is nearest: always wrong, never itself."""
    torch.manual_seed(0)
    pairs = torch.nn.functional.normalize(torch.randn(10, 64), dim=1)
    features = pairs.repeat_interleave(2, 0)
    bank = Features(features, torch.arange(20) % 2, torch.arange(20), [])
    train = SimpleNamespace(names=[str(number) for number in range(20)], __len__=lambda: 20)
    eval_set = EvalSet(name="twins", domain="in", train=train, test=None, class_names=("a", "b"))
    right = study.bank_right(bank, eval_set, whole=True)
    fold = study.folds(bank.labels, train.names)
    apart = torch.tensor([fold[number] != fold[number ^ 1] for number in range(20)])
    assert apart.any()
    assert not right[apart].any()


def test_the_test_is_over_the_confirming_seeds(study):
    runs = [run(study, [0.5, 0.5], [0.3, 0.3 + gain]) for gain in (0.01, 0.02, 0.03, 0.04, 0.05)]
    found = study.confirmed(runs)
    assert found["out"]["mean"] == pytest.approx(0.03)
    assert found["out"]["ci95"][0] == pytest.approx(0.03 - 2.776 * 0.015811 / 5**0.5, abs=1e-4)
    assert found["in"]["mean"] == 0
    assert found["sets"]["away"]["pretrained"] == pytest.approx(0.3)


def test_no_real_picture_that_validates_or_tests_has_a_caption(study, shared_data, tmp_path):
    _, sets = study.world_options("real", tmp_path, "an encoder", "a text encoder")
    data = CaptionDataModule(eval_sets=[one for one in sets if getattr(one, "name", "") == "dtd10"])
    data.image_spec = build_vision(VisionSpec()).image_spec
    (dtd,) = data.eval_datasets()
    bank = picture_keys(dtd.train)
    split = validation_split(torch.tensor(dtd.train.labels), bank)
    with (tmp_path / "captions.csv").open(encoding="utf-8") as file:
        captioned = {row["image"].removeprefix("dtd/") for row in csv.DictReader(file) if row["image"][:4] == "dtd/"}
    assert captioned and captioned <= {bank[row] for row in split.bank.tolist()}  # not all have descriptions
    assert not captioned & set(picture_keys(dtd.test))


def test_seeds_that_choose_do_not_confirm(study):
    assert not set(study.SEARCH) & set(study.CONFIRM)
    assert len(study.CONFIRM) >= 5
