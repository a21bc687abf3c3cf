"""What every approach promises, parametrised over all there are: the next one is covered by being registered.

An approach says by its class what does not apply to it: `embed` is None without a shared space, `untouched` leaves the
encoder's function alone, `identity_at_start` False begins elsewhere.
"""

import copy
import dataclasses
import inspect
import math

import pytest
import torch

from wlsup.approaches import APPROACHES, approach_class
from wlsup.batch import CaptionBatch
from wlsup.data.datamodule import CaptionDataModule
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec
from wlsup.optim import build_optimizer

WORDS = ("red blue green square circle star left right", "above small large sand grass water night brick")
WORDS = [word for line in WORDS for word in line.split()]


def noise_batch(count=16, generator=None):
    """Pictures and captions that have nothing to do with one another."""
    images = torch.randn(count, 3, 64, 64, generator=generator)
    picks = torch.randint(len(WORDS), (count, 6), generator=generator)
    captions = [" ".join(WORDS[i] for i in row) for row in picks]
    return CaptionBatch(images, captions, [f"k{i}" for i in range(count)])


def labelled_sets(approach):
    """Return the door to a run's labelled sets, for approaches that learn from one."""
    data = CaptionDataModule(eval_sets=["mini_shapes", "mini_digits"])
    data.image_spec = approach.image_spec
    return data


def train(approach, steps, lr=None, make=noise_batch, generator=None, until=lambda losses: False):
    """Train for ``steps``, or until ``until(losses)``; return the losses of each step, by part."""
    approach.setup("fit")
    if hasattr(approach, "prepare"):
        approach.prepare(labelled_sets(approach))
    approach.train()
    groups = approach.plan.parameter_groups(approach)
    for group in groups:
        group["lr"] = lr or group["lr"]
        group["weight_decay"] = max(group["weight_decay"], 0.1)
    optimizer = build_optimizer(approach.optimizer_spec, groups)
    losses = []
    for _ in range(steps):
        approach.train()
        optimizer.zero_grad()
        parts = approach.training_losses(make(generator=generator))
        parts["loss"].backward()
        optimizer.step()
        approach.after_step()
        losses.append({name: float(value.detach()) for name, value in parts.items()})
        if until(losses):
            break
    return losses


@pytest.fixture
def approach(name):
    torch.manual_seed(0)
    return approach_class(name)()


def contrasts(approach):
    """Whether the approach embeds pictures and captions in one space, or the test does not apply to it."""
    approach.setup("fit")
    approach.eval()
    if approach.embed(noise_batch(2)) is None:
        pytest.skip(f"{approach.name} has no shared image-text space")


@pytest.mark.parametrize("name", ["mae_cl", "full", "lora", "selective_k"])
def test_where_no_caption_is_told_none_can_be_dropped(name):
    with pytest.raises(WlsupError, match="leave objective.caption_dropout out"):
        approach_class(name)(objective=ObjectiveSpec(caption_dropout=0.1))


@pytest.mark.parametrize("name", sorted(APPROACHES))
class TestContract:
    def test_name_and_summary(self, name, approach):
        assert approach.name == name
        assert approach.summary

    def test_frozen_is_bit_identical_and_trained_has_moved_after_steps_with_decay(self, name, approach):
        approach.setup("fit")
        trained = set(approach.plan.trained_names(approach))
        before = copy.deepcopy(approach.state_dict())
        # A rate at which no expert of a mixture is left without tokens: its bias would have nothing to move it.
        train(approach, 3, lr=1e-3)
        for key, tensor in approach.state_dict().items():
            if key in trained:
                assert not torch.equal(tensor, before[key]), f"{key} trains and did not move"
            else:
                assert torch.equal(tensor, before[key]), f"{key} is frozen and moved"

    def test_frozen_modules_stay_in_eval_through_every_epoch(self, name, approach):
        approach.setup("fit")  # as Lightning leaves it: that calls no train() of its own
        for epoch in range(3):
            if epoch:
                approach.eval()
                approach.train()
            assert approach.training
            for key, module in approach.named_modules():
                own = list(module.parameters())
                if own and not any(p.requires_grad for p in own):
                    assert not module.training, f"{key} is frozen and in train mode"
                if key and own and all(p.requires_grad for p in own):
                    assert module.training, f"{key} trains and is in eval mode"

    def test_encoder_is_the_pretrained_one_at_step_0(self, name, approach):
        images = torch.randn(4, 3, 64, 64)
        pretrained = build_vision(VisionSpec()).eval()
        approach.eval()
        assert set(approach.encoder.state_dict()) == set(pretrained.state_dict())
        difference = (approach.features(images) - pretrained.features(images)).abs().max()
        assert (difference <= 1e-6) == approach.identity_at_start

    def test_null_features_have_moved_after_training_unless_untouched_by_design(self, name, approach):
        images = torch.randn(4, 3, 64, 64)
        before = approach.eval().features(images)
        train(approach, 3, lr=1e-2)
        after = approach.eval().features(images)
        if approach.untouched:
            assert torch.equal(after, before)
            assert not after.requires_grad
        else:
            assert (after - before).abs().max() > 1e-4

    def test_the_contrastive_tower_never_sees_the_caption(self, name, approach):
        contrasts(approach)
        train(approach, 3, lr=1e-2)
        approach.eval()
        batch = noise_batch()
        image, text = approach.embed(batch)
        shuffled = CaptionBatch(batch.images, batch.captions[1:] + batch.captions[:1], batch.keys)
        again, other = approach.embed(shuffled)
        assert torch.equal(image, again)
        assert not torch.equal(text, other)

    def test_checkpoint_holds_trained_tensors_only_and_restores_them(self, name, approach):
        train(approach, 2, lr=1e-2)
        checkpoint = {"state_dict": dict(approach.state_dict())}
        approach.on_save_checkpoint(checkpoint)
        assert set(checkpoint["state_dict"]) == set(approach.plan.trained_names(approach))
        fresh = approach_class(name)()
        fresh.on_load_checkpoint(checkpoint)
        fresh.load_state_dict(checkpoint["state_dict"], strict=False)
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(fresh.eval().features(images), approach.eval().features(images))

    def test_checkpoint_of_another_base_or_approach_or_shape_is_refused(self, name, approach):
        checkpoint = {"state_dict": dict(approach.state_dict())}
        approach.on_save_checkpoint(checkpoint)
        for change, message in (
            (lambda c: c["wlsup"].update(approach="other"), "approach 'other'"),
            (lambda c: c["wlsup"]["bases"]["encoder"].update(sha256="0" * 64), "another encoder"),
            (lambda c: c["state_dict"].popitem(), "tensors differ"),
            (lambda c: c.pop("wlsup"), "not written by wlsup"),
        ):
            bad = copy.deepcopy(checkpoint)
            change(bad)
            with pytest.raises(WlsupError, match=message):
                approach.on_load_checkpoint(bad)

    def test_siglip_trains_too(self, name):
        objective = inspect.signature(approach_class(name).__init__).parameters.get("objective")
        if objective is None or not isinstance(objective.default, ObjectiveSpec):
            pytest.skip(f"{name} takes no contrastive objective")
        approach = approach_class(name)
        view = "full" if approach.untouched else "masked"
        default = inspect.signature(approach.__init__).parameters["objective"].default
        approach = approach(objective=dataclasses.replace(default, contrastive="siglip", contrastive_view=view))
        contrasts(approach)
        losses = train(approach, 3, lr=1e-2)
        assert all(math.isfinite(part["loss"]) for part in losses)
        assert approach.head.logit_bias.item() != -10.0


# Minutes over all approaches: `make test` holds them for one, CI for every one.
FIRST = ("film",)
ALL = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in sorted(APPROACHES)]


@pytest.mark.parametrize("name", ALL)
class TestContractInTraining:
    def test_noise_pairs_stay_at_chance(self, name, approach):
        # Fresh noise each step: a leak drives this loss to 0 (FiLM under its own caption: 0.01 within 100 steps).
        contrasts(approach)
        generator = torch.Generator().manual_seed(1)
        losses = train(approach, 40, lr=3e-3, generator=generator)
        late = sum(part["contrastive"] for part in losses[-10:]) / 10
        assert late > math.log(16) - 0.15

    def test_a_batch_repeated_is_learned(self, name, approach):
        def learned(losses):
            part = "contrastive" if "contrastive" in losses[0] else "loss"
            return losses[-1][part] < losses[0][part] - 0.5

        batch = noise_batch(8, torch.Generator().manual_seed(2))
        assert learned(train(approach, 40, lr=3e-3, make=lambda generator: batch, until=learned))

    def test_every_regularizer_works_by_one_option(self, name):
        def with_replay(generator):
            batch = noise_batch(8, generator)
            batch.replay = torch.randn(4, 3, 64, 64)
            return batch

        torch.manual_seed(0)
        terms = ("distill", "l2sp", "replay")
        approach = approach_class(name)(regularizer=RegularizerSpec(**dict.fromkeys(terms, 0.5)))
        losses = train(approach, 3, lr=1e-2, make=with_replay)
        for term in terms:
            values = [part[term] for part in losses]
            plain = losses[-1]["loss"] - 0.5 * values[-1]
            assert math.isfinite(plain)
            if approach.untouched:
                assert values == [0.0, 0.0, 0.0]
            elif approach.identity_at_start:
                assert values[0] <= 1e-6 < values[-1], f"{term} must start at 0 and grow"
            else:
                assert values[-1] > 0
