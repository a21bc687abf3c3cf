"""What holds the encoder near the pretrained one: known values, what is held, and that it holds."""

import copy
import math

import pytest
import torch

from wlsup.approaches import approach_class
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.objectives.regularizers import RegularizerSpec, cosine_distance, l2_to_start, without_adapters


def pairs(count=8):
    generator = torch.Generator().manual_seed(3)
    images, replay = torch.randn(2, count, 3, 64, 64, generator=generator)
    captions = [f"a {color} {shape}" for color in ("red", "blue") for shape in ("square", "circle", "star", "ring")]
    return CaptionBatch(images, captions[:count], [f"k{i}" for i in range(count)], replay=replay)


def trained(name, steps=12, lr=1e-3, **terms):
    """The approach after some steps under the given terms, and how far the batch's features have turned."""
    torch.manual_seed(0)
    approach = approach_class(name)(regularizer=RegularizerSpec(**terms))
    approach.setup("fit")
    optimizer = torch.optim.AdamW([p for p in approach.parameters() if p.requires_grad], lr=lr)
    batch = pairs()
    before = approach.eval().features(batch.images)
    losses = []
    for _ in range(steps):
        approach.train()
        optimizer.zero_grad()
        parts = approach.training_losses(batch)
        parts["loss"].backward()
        optimizer.step()
        losses.append({key: value.item() for key, value in parts.items()})
    turned = cosine_distance(before, approach.eval().features(batch.images)).item()
    return approach, losses, turned


def test_the_distances_are_the_published_ones():
    one = torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    assert cosine_distance(one, torch.tensor([[0.0, 3.0], [-1.0, -1.0]])) == pytest.approx(1.5)  # (1 - 0 + 1 + 1) / 2
    assert cosine_distance(one, 7 * one) == pytest.approx(0.0, abs=1e-6)
    start = {"a": torch.zeros(2), "b": torch.ones(2, 2)}
    now = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2, 2)}
    assert l2_to_start(now, start) == pytest.approx(25 + 4)


@pytest.mark.parametrize("name", ["mae_cl", "film"])
@pytest.mark.parametrize(("term", "weight"), [("distill", 300.0), ("replay", 300.0), ("l2sp", 30.0)])
def test_a_strong_term_holds_the_features(name, term, weight):
    _, _, free = trained(name)
    _, _, held = trained(name, **{term: weight})
    assert held < 0.8 * free


def test_the_loss_is_the_approachs_own_plus_the_weighted_terms():
    _, losses, _ = trained("film", steps=3, distill=2.0, l2sp=0.25, replay=0.5)
    last = losses[-1]
    own = last["reconstruction"] + last["contrastive"]
    assert min(last["distill"], last["l2sp"], last["replay"]) > 0
    assert last["loss"] == pytest.approx(own + 2.0 * last["distill"] + 0.25 * last["l2sp"] + 0.5 * last["replay"])


def test_the_teacher_is_the_pretrained_encoder_and_stays_so():
    approach, _, _ = trained("mae_cl", steps=2, lr=1e-2, distill=0.1)
    images = pairs().images
    wanted = build_vision(VisionSpec()).eval().features(images)
    teacher = approach.regularizer._teacher
    assert torch.equal(teacher.features(images), wanted)
    assert not torch.equal(approach.features(images), wanted)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_copy_without_adapters_leaves_them_on_the_original_and_shares_what_is_frozen():
    approach, _, _ = trained("film", steps=2, lr=1e-2)
    images = pairs().images
    adapted = approach.features(images)
    plain = without_adapters(approach.encoder)
    assert torch.equal(plain.features(images), build_vision(VisionSpec()).eval().features(images))
    assert torch.equal(approach.features(images), adapted)
    assert plain.blocks[0].attn.qkv.weight is approach.encoder.blocks[0].attn.qkv.weight


def test_l2sp_holds_what_the_features_depend_on_and_leaves_heads_free():
    approach, _, _ = trained("mae_cl", steps=1, l2sp=0.1)
    held = set(approach.regularizer._start)
    assert held == {name for name in approach.plan.trained_names(approach) if name.startswith("mae.encoder.")}
    approach, _, _ = trained("film", steps=1, l2sp=0.1)
    assert set(approach.regularizer._start) == {n for n, _ in approach.named_parameters() if n.startswith("adapter.")}


def test_the_start_is_remembered_once():
    approach, losses, _ = trained("film", steps=3, lr=1e-2, l2sp=0.1)
    start = copy.deepcopy(approach.regularizer._start)
    approach.setup("fit")
    assert all(torch.equal(value, start[name]) for name, value in approach.regularizer._start.items())
    assert losses[0]["l2sp"] == 0.0


def test_validation_is_not_regularised():
    approach, _, _ = trained("film", steps=1, distill=5.0)
    assert "distill" not in approach.losses(pairs())
    assert math.isfinite(approach.losses(pairs())["loss"].item())


def test_replay_without_pictures_is_refused():
    approach, _, _ = trained("film", steps=1, replay=0.1)
    batch = pairs()
    batch.replay = None
    with pytest.raises(WlsupError, match=r"data\.replay"):
        approach.training_losses(batch)


def test_of_an_untouched_encoder_replay_is_0_with_cached_features_too():
    approach, _, _ = trained("lit", steps=1, replay=0.1)
    batch = pairs()
    batch.replay = None  # the cache brings none
    losses = approach.training_losses(batch)
    assert losses["replay"] == 0.0 and torch.isfinite(losses["loss"])


@pytest.mark.parametrize("wrong", [{"distill": -1.0}, {"l2sp": float("nan")}, {"ema": 1.0}, {"ema": -0.1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(WlsupError, match="regularizer"):
        RegularizerSpec(**wrong)
