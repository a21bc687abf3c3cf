"""What asymmetric_attention promises where the text asks; the contract covers the image's asking."""

import copy
import math

import pytest
import torch

from wlsup.approaches.asymmetric_attention import AsymmetricAttentionApproach
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.fusion.base import FusionSpec
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.objectives.matching import MatchingSpec
from wlsup.objectives.two_branch import ObjectiveSpec
from wlsup.optim import build_optimizer

WORDS = [
    "red",
    "blue",
    "green",
    "square",
    "circle",
    "star",
    "left",
    "right",
    "above",
    "small",
    "large",
    "sand",
    "grass",
]


def noise_batch(count=16, generator=None):
    picks = torch.randint(len(WORDS), (count, 6), generator=generator)
    captions = [" ".join(WORDS[i] for i in row) for row in picks]
    return CaptionBatch(torch.randn(count, 3, 64, 64, generator=generator), captions, [f"k{i}" for i in range(count)])


def text_asks(**options):
    return AsymmetricAttentionApproach(fusion=FusionSpec(kind="asymmetric_text"), **options)


def train(approach, steps, lr, make):
    approach.setup("fit")
    groups = approach.plan.parameter_groups(approach)
    for group in groups:
        group["lr"] = lr
    optimizer = build_optimizer(approach.optimizer_spec, groups)
    losses = []
    for _ in range(steps):
        approach.train()
        optimizer.zero_grad()
        parts = approach.losses(make())
        parts["loss"].backward()
        optimizer.step()
        losses.append({name: float(value.detach()) for name, value in parts.items()})
    return losses


def test_the_contract_holds_where_the_text_asks():
    approach, images = text_asks(), torch.randn(2, 3, 64, 64)
    approach.setup("fit")
    start = approach.eval().features(images)
    assert (start - build_vision(VisionSpec()).eval().features(images)).abs().max() <= 1e-6
    trained, before = set(approach.plan.trained_names(approach)), copy.deepcopy(approach.state_dict())
    train(approach, 3, 1e-2, noise_batch)
    assert {name for name, tensor in approach.state_dict().items() if not torch.equal(tensor, before[name])} == trained
    assert (approach.eval().features(images) - start).abs().max() > 1e-4


def test_no_caption_reaches_the_encoder_but_its_gradient_does():
    # The matching loss alone: what it changes in the encoder can have come by no other way.
    approach, batch = text_asks(), noise_batch()
    approach.setup("fit")
    train(approach, 2, 1e-2, noise_batch)
    told, null = approach.mae.encoder(batch.images, approach.text(batch.captions)), approach.mae.encoder(batch.images)
    assert torch.equal(told.tokens, null.tokens)
    losses = approach.losses(batch)
    # by way of the last layer's text step, the encoder's own feed-forward of the layer before it
    (gradient,) = torch.autograd.grad(losses["matching"], approach.fusion.layers[0].image_feed.up.weight)
    assert gradient.abs().max() > 0


# Without the contrastive branch a step is one pass over the visible patches: the same loss, sooner.
MATCHING_ONLY = ObjectiveSpec(contrastive_weight=0.0)


def test_matching_stays_at_chance_on_noise():
    generator = torch.Generator().manual_seed(1)
    losses = train(text_asks(objective=MATCHING_ONLY), 40, 3e-3, lambda: noise_batch(generator=generator))
    assert sum(part["matching"] for part in losses[-10:]) / 10 > math.log(4) - 0.15


def test_matching_of_a_batch_repeated_is_learned():
    batch = noise_batch(8, generator=torch.Generator().manual_seed(2))
    half = ObjectiveSpec(contrastive_weight=0.0, mask_ratio=0.5)  # most of a picture, so that it is known again
    losses = train(text_asks(objective=half), 40, 3e-3, lambda: batch)
    assert losses[0]["matching"] == pytest.approx(math.log(4), abs=0.25)
    assert sum(part["matching"] for part in losses[-10:]) / 10 < losses[0]["matching"] - 0.5


def test_the_text_asks_the_visible_patches_where_there_is_no_contrastive_branch():
    approach = text_asks(objective=ObjectiveSpec(contrastive_weight=0.0), matching=MatchingSpec(0.5, 2))
    lengths = []
    approach.fusion.score = lambda seen, candidates: lengths.append(seen[0].shape[1]) or torch.zeros(4, 3)
    losses = approach.losses(noise_batch(4))
    assert lengths == [1 + 16]
    assert set(losses) == {"reconstruction", "matching", "loss"}
    assert losses["loss"].item() == pytest.approx(losses["reconstruction"].item() + 0.5 * math.log(3))


def test_it_validates_without_a_graph():
    with torch.no_grad():
        losses = text_asks().eval().losses(noise_batch(4))
    assert math.isfinite(losses["matching"]) and not losses["loss"].requires_grad


def test_options_of_captions_that_the_picture_does_not_see_are_refused():
    with pytest.raises(WlsupError, match="leave objective.caption_dropout out"):
        text_asks(objective=ObjectiveSpec(caption_dropout=0.1))
    with pytest.raises(WlsupError, match=r"leave fusion.null_tokens out"):
        AsymmetricAttentionApproach(fusion=FusionSpec(kind="asymmetric_text", null_tokens=8))


def test_matching_without_a_text_that_asks_is_refused():
    with pytest.raises(WlsupError, match="asymmetric_text only"):
        AsymmetricAttentionApproach(matching=MatchingSpec())
    assert "matching" not in AsymmetricAttentionApproach().losses(noise_batch(4))
