"""lit: the encoder is locked, and what would only pretend to teach it is refused."""

import pytest
import torch

from wlsup.approaches import approach_class
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.objectives.two_branch import ObjectiveSpec, two_branch_losses

Lit = approach_class("lit")


def test_only_the_heads_train_and_the_loss_is_the_contrastive_one():
    approach = Lit()
    assert set(approach.plan.trained_names(approach)) == {f"head.{n}" for n, _ in approach.head.named_parameters()}
    batch = CaptionBatch(torch.randn(3, 3, 64, 64), ["a red square", "two stars", "a ring"], ["a", "b", "c"])
    approach.eval()
    captions = approach.text(batch.captions)
    wanted = two_branch_losses(approach.mae, approach.head, batch.images, captions, approach.objective, keys=batch.keys)
    assert approach.losses(batch)["loss"].item() == pytest.approx(wanted["contrastive"].item(), rel=1e-6)


@pytest.mark.parametrize("wrong", [{}, {"reconstruction_weight": 0.0, "contrastive_view": "masked"}])
def test_objectives_that_a_locked_encoder_cannot_follow_are_refused(wrong):
    with pytest.raises(WlsupError, match="reconstruction_weight to 0"):
        Lit(objective=ObjectiveSpec(**wrong))


@pytest.mark.parametrize("unread", [{"micro_batch": 8}, {"caption_dropout": 0.1}, {"mask_ratio": 0.5}])
def test_options_that_it_would_not_read_are_refused(unread):
    with pytest.raises(WlsupError, match=f"leave objective.{next(iter(unread))} out"):
        Lit(objective=ObjectiveSpec(reconstruction_weight=0.0, **unread))
