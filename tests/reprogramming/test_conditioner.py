"""What the caption reprogrammer promises: tokens for adapters, a warm-up that touches nothing else, a guard."""

import copy

import pytest
import torch

from wlsup.approaches.token_replay import TokenReplayApproach
from wlsup.batch import CaptionBatch
from wlsup.callbacks.guards import Guards
from wlsup.data.mini import mini_captions, normalised
from wlsup.errors import WlsupError
from wlsup.models.text import TextEncoder, TextSpec
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.objectives.contrastive import CLIP_LOGIT_SCALE, info_nce
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.optim import build_optimizer
from wlsup.reprogramming.conditioner import CaptionReprogrammer, FiniteGuard, ReprogrammerSpec

CAPTIONS = ["a red square", "a blue circle above a star", "green", "a small star left of a night"]


def batch(captions=CAPTIONS):
    return CaptionBatch(torch.randn(4, 3, 64, 64), captions, ["a", "b", "c", "d"])


def taught(steps, **options):
    approach = TokenReplayApproach(reprogrammer=ReprogrammerSpec(**options), source="caption")
    approach.setup("fit")
    optimizer = build_optimizer(approach.optimizer_spec, approach.plan.parameter_groups(approach))
    before, seen = copy.deepcopy(approach.state_dict()), []
    for _ in range(steps):
        approach.train()
        optimizer.zero_grad()
        losses = approach.losses(batch())
        losses["loss"].backward()
        optimizer.step()
        seen.append(set(losses))
    moved = {name.split(".")[0] for name, t in approach.state_dict().items() if not torch.equal(t, before[name])}
    return approach, moved, seen


def test_tokens_take_the_place_of_the_text_encoders():
    encoder, text = build_vision(VisionSpec()).eval(), TextEncoder(TextSpec())
    reprogrammer = CaptionReprogrammer(encoder, ReprogrammerSpec(match="none"))
    encoded = text(CAPTIONS)
    condition = reprogrammer(CAPTIONS, encoded)
    assert condition.tokens.shape == (4, condition.mask.shape[1], encoder.embed_dim)
    assert torch.equal(condition.pooled, encoded.pooled)
    assert torch.equal(condition.present, encoded.present)
    words = condition.mask.sum(1)
    assert words[1] > words[0] > words[2] >= 2  # the end token is one


def test_the_warm_up_trains_the_reprogrammer_alone_and_then_all_train():
    approach, moved, seen = taught(3, warmup_batches=3)
    assert moved == {"reprogrammer"}
    assert seen == [{"loss", "warm_up"}] * 3
    assert not approach.reprogrammer.warming
    _, moved, seen = taught(3, warmup_batches=1)
    assert moved == {"reprogrammer", "adapter", "head"}
    assert [("warm_up" in names) for names in seen] == [True, False, False]


def test_in_the_warm_up_every_tensor_gets_a_gradient_and_no_regulariser_or_decay_moves_the_adapters(caplog):
    approach = TokenReplayApproach(
        reprogrammer=ReprogrammerSpec(warmup_batches=3), regularizer=RegularizerSpec(distill=1.0), weight_decay=0.1
    )
    approach.setup("fit")
    with torch.no_grad():  # off the identity, where distillation has a gradient
        for site in approach.adapter.replay_sites:
            site.g.fill_(0.1)
    groups = approach.plan.parameter_groups(approach)
    before, optimizer = copy.deepcopy(approach.state_dict()), build_optimizer(approach.optimizer_spec, groups)
    for step in range(4):
        approach.train()
        optimizer.zero_grad()
        losses = approach.training_losses(batch())
        losses["loss"].backward()
        if step < 3:
            assert losses["loss"] == losses["warm_up"]
            trained = [parameter for group in groups for parameter in group["params"]]
            assert all(parameter.grad is not None for parameter in trained)  # or DistributedDataParallel would wait
            Guards().on_after_backward(None, approach)
            assert not caplog.text
        approach.on_after_backward()
        optimizer.step()
        moved = {name.split(".")[0] for name, t in approach.state_dict().items() if not torch.equal(t, before[name])}
        assert moved == ({"reprogrammer"} if step < 3 else {"reprogrammer", "adapter", "head"})
    assert "distill" in losses


def test_the_warm_up_learns_to_match_captions_with_their_pictures():
    encoder = build_vision(VisionSpec()).eval().requires_grad_(False)
    reprogrammer = CaptionReprogrammer(encoder, ReprogrammerSpec(match="none", warmup_batches=30))
    scenes = mini_captions("validation", 4)
    images, captions = normalised(scenes.images, encoder.image_spec), [texts[0] for texts in scenes.captions]
    optimizer = torch.optim.Adam(reprogrammer.parameters(), lr=3e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        image, text = reprogrammer.warm_up(encoder, images, captions)
        loss = info_nce(image, text, torch.tensor(CLIP_LOGIT_SCALE))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert int(reprogrammer.program.warmed) == 25


def test_where_the_warm_up_stands_is_in_the_checkpoint():
    approach, _, _ = taught(2, warmup_batches=2)
    checkpoint = {"state_dict": dict(approach.state_dict())}
    approach.on_save_checkpoint(checkpoint)
    fresh = TokenReplayApproach(reprogrammer=ReprogrammerSpec(warmup_batches=2), source="caption")
    assert fresh.reprogrammer.warming
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"], strict=False)
    assert not fresh.reprogrammer.warming
    assert torch.equal(fresh.reprogrammer.program.std, approach.reprogrammer.program.std)


def test_the_encoder_is_the_pretrained_one_at_step_0_and_never_sees_its_caption():
    approach, _, _ = taught(0)
    images = torch.randn(2, 3, 64, 64)
    assert (approach.eval().features(images) - build_vision(VisionSpec()).eval().features(images)).abs().max() <= 1e-6
    approach, _, _ = taught(3, warmup_batches=0)
    approach.eval()
    first = batch()
    again = CaptionBatch(first.images, CAPTIONS[::-1], first.keys)
    assert torch.equal(approach.embed(first)[0], approach.embed(again)[0])
    with torch.no_grad():
        changed = approach.reprogrammer(CAPTIONS, approach.text(CAPTIONS))
        for site in approach.adapter.replay_sites:
            site.g.fill_(1.0)
        assert not torch.equal(approach.encoder(first.images, changed).pooled, approach.encoder(first.images).pooled)


def test_losses_that_are_not_finite_are_counted_left_to_the_guards_and_end_the_run_when_there_is_nothing_else():
    guard, weight = FiniteGuard(3), torch.nn.Parameter(torch.ones(2))
    for factor in (1.0, float("nan"), float("inf")):
        losses = {"loss": (weight * factor).sum(), "part": torch.tensor(factor)}
        assert guard(losses) is losses  # with its graph: all processes skip the step together
    assert guard.skipped == 2
    with pytest.raises(WlsupError, match=r"not finite for 3 batches in a row .*part nan.*Lower model.lr"):
        guard({"loss": weight.sum() * float("nan"), "part": torch.tensor(float("nan"))})


def test_a_finite_batch_between_resets_the_guard_and_zero_turns_it_off():
    guard, bad = FiniteGuard(2), {"loss": torch.tensor(float("nan"))}
    for _ in range(4):
        guard(bad)
        guard({"loss": torch.tensor(1.0)})
    assert guard.skipped == 4
    off = FiniteGuard(0)
    assert off(bad) is bad
    assert off.skipped == 0


def test_a_loss_that_is_bad_on_another_process_counts_too(monkeypatch):
    guard, losses = FiniteGuard(2), {"loss": torch.tensor(1.0)}
    monkeypatch.setattr("wlsup.reprogramming.conditioner.global_sum", lambda own: own + 1)  # the other one's
    guard(losses)
    with pytest.raises(WlsupError, match="2 batches in a row"):
        guard(losses)


@pytest.mark.parametrize("wrong", [{"match": "x"}, {"warmup_batches": -1}, {"skip_nonfinite": -1}], ids=str)
def test_an_unknown_setting_is_refused(wrong):
    with pytest.raises(WlsupError):
        ReprogrammerSpec(**wrong)
