"""What every approach promises, parametrised over all there are: the next one is covered by being registered."""

import copy
import math

import pytest
import torch

from wlsup.approaches import APPROACHES, approach_class
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.optim import build_optimizer

WORDS = ("red blue green square circle star left right", "above small large sand grass water night brick")
WORDS = [word for line in WORDS for word in line.split()]


def noise_batch(count=16, generator=None):
    """Pictures and captions that have nothing to do with one another."""
    images = torch.randn(count, 3, 64, 64, generator=generator)
    picks = torch.randint(len(WORDS), (count, 6), generator=generator)
    captions = [" ".join(WORDS[i] for i in row) for row in picks]
    return CaptionBatch(images, captions, [f"k{i}" for i in range(count)])


def train(approach, steps, lr=None, make=noise_batch, generator=None):
    approach.setup("fit")
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
        parts = approach.losses(make(generator=generator))
        parts["loss"].backward()
        optimizer.step()
        approach.on_train_batch_end()
        losses.append({name: float(value.detach()) for name, value in parts.items()})
    return losses


@pytest.fixture
def approach(name):
    torch.manual_seed(0)
    return approach_class(name)()


@pytest.mark.parametrize("name", sorted(APPROACHES))
class TestContract:
    def test_name_and_summary(self, name, approach):
        assert approach.name == name
        assert approach.summary

    def test_frozen_is_bit_identical_and_trained_has_moved_after_steps_with_decay(self, name, approach):
        approach.setup("fit")
        trained = set(approach.plan.trained_names(approach))
        before = copy.deepcopy(approach.state_dict())
        train(approach, 3, lr=1e-2)
        for key, tensor in approach.state_dict().items():
            if key in trained:
                assert not torch.equal(tensor, before[key]), f"{key} trains and did not move"
            else:
                assert torch.equal(tensor, before[key]), f"{key} is frozen and moved"

    def test_frozen_modules_stay_in_eval_through_every_epoch(self, name, approach):
        approach.setup("fit")
        for _ in range(2):
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
        assert (approach.features(images) - pretrained.features(images)).abs().max() <= 1e-6
        assert set(approach.encoder.state_dict()) == set(pretrained.state_dict())

    def test_null_features_have_moved_after_training(self, name, approach):
        images = torch.randn(4, 3, 64, 64)
        before = approach.eval().features(images)
        train(approach, 3, lr=1e-2)
        assert (approach.eval().features(images) - before).abs().max() > 1e-4

    def test_the_contrastive_tower_never_sees_the_caption(self, name, approach):
        train(approach, 3, lr=1e-2)
        approach.eval()
        batch = noise_batch()
        image, text = approach.embed(batch)
        shuffled = CaptionBatch(batch.images, batch.captions[1:] + batch.captions[:1], batch.keys)
        again, other = approach.embed(shuffled)
        assert torch.equal(image, again)
        assert not torch.equal(text, other)

    def test_noise_pairs_stay_at_chance(self, name, approach):
        # Fresh noise each step: a leak drives this loss to 0 (FiLM under its own caption: 0.01 within 100 steps).
        generator = torch.Generator().manual_seed(1)
        losses = train(approach, 40, lr=3e-3, generator=generator)
        late = sum(part["contrastive"] for part in losses[-10:]) / 10
        assert late > math.log(16) - 0.15

    def test_a_batch_repeated_is_learned(self, name, approach):
        batch = noise_batch(generator=torch.Generator().manual_seed(2))
        losses = train(approach, 40, lr=3e-3, make=lambda generator: batch)
        assert losses[-1]["contrastive"] < losses[0]["contrastive"] - 0.5

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
        from wlsup.objectives.two_branch import ObjectiveSpec

        approach = approach_class(name)(objective=ObjectiveSpec(contrastive="siglip", contrastive_view="masked"))
        losses = train(approach, 3, lr=1e-2)
        assert all(math.isfinite(part["loss"]) for part in losses)
        assert approach.head.logit_bias.item() != -10.0
