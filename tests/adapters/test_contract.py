"""The adapter contract, held by every registered adapter: the next one is covered by being registered."""

import copy

import pytest
import torch

from wlsup.adapters.base import ADAPTERS
from wlsup.batch import Condition
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionSpec, build_vision

C = 24
TINY = VisionSpec(pretrained=False, architecture="vit(img_size=32,patch_size=8,embed_dim=48,depth=3,num_heads=3)")


@pytest.fixture
def encoder():
    return build_vision(TINY).eval()


def captions(count=4, present=True):
    return Condition(
        tokens=torch.randn(count, 7, C),
        mask=torch.arange(7)[None] < torch.randint(2, 8, (count, 1)),
        pooled=torch.randn(count, C),
        present=torch.full((count,), present),
    )


def make(name, encoder):
    return ADAPTERS[name](encoder.embed_dim, len(encoder.blocks), C)


def train_a_little(adapter, encoder, images, condition, steps=3):
    """A few real steps towards features unlike the pretrained ones, null and told by turns."""
    encoder.requires_grad_(False)
    target = torch.randn(len(images), encoder.embed_dim)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        for told in (condition, None):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(encoder(images, told).pooled, target).backward()
            optimizer.step()


@pytest.mark.parametrize("name", sorted(ADAPTERS))
class TestContract:
    def test_exact_identity_at_step_0_told_or_not(self, name, encoder):
        images = torch.randn(4, 3, 32, 32)
        before = encoder(images).tokens
        make(name, encoder).attach(encoder)
        mixed = captions()
        mixed.present[::2] = False
        for condition in (None, captions(), mixed, captions(present=False)):
            assert (encoder(images, condition).tokens - before).abs().max() <= 1e-6

    def test_first_gradient_is_not_zero(self, name, encoder):
        adapter = make(name, encoder).attach(encoder)
        for condition in (None, captions()):
            adapter.zero_grad()
            encoder(torch.randn(4, 3, 32, 32), condition).pooled.square().sum().backward()
            assert sum(p.grad.abs().sum() for p in adapter.parameters() if p.grad is not None) > 0

    def test_pretrained_keys_and_tensors_are_unchanged_and_detach_gives_the_original_back(self, name, encoder):
        images = torch.randn(4, 3, 32, 32)
        state, features = copy.deepcopy(encoder.state_dict()), encoder.features(images)
        adapter = make(name, encoder).attach(encoder)
        train_a_little(adapter, encoder, images, captions())
        assert list(encoder.state_dict()) == list(state)
        assert not torch.equal(encoder.features(images), features)
        adapter.detach()
        assert torch.equal(encoder.features(images), features)
        assert all(torch.equal(tensor, state[key]) for key, tensor in encoder.state_dict().items())
        adapter.attach(encoder)
        assert not torch.equal(encoder.features(images), features)

    def test_null_is_learned(self, name, encoder):
        images = torch.randn(4, 3, 32, 32)
        before = encoder.features(images)
        adapter = make(name, encoder).attach(encoder)
        train_a_little(adapter, encoder, images, captions())
        assert (encoder.features(images) - before).abs().max() > 1e-3

    def test_every_parameter_moves_in_training(self, name, encoder):
        adapter = make(name, encoder).attach(encoder)
        before = copy.deepcopy(adapter.state_dict())
        train_a_little(adapter, encoder, torch.randn(4, 3, 32, 32), captions())
        still = [key for key, tensor in adapter.state_dict().items() if torch.equal(tensor, before[key])]
        assert not still

    def test_captions_matter_and_a_dropped_caption_is_the_null_condition(self, name, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        adapter = make(name, encoder).attach(encoder)
        train_a_little(adapter, encoder, images, condition)
        null, told = encoder(images).pooled, encoder(images, condition).pooled
        assert (null - told).abs().max() > 1e-4
        condition.present[1] = False
        mixed = encoder(images, condition).pooled
        assert torch.allclose(mixed[1], null[1], atol=1e-6)
        assert torch.allclose(mixed[0], told[0], atol=1e-6)
        assert torch.allclose(encoder(images, captions(present=False)).pooled, null, atol=1e-6)

    def test_one_picture_never_sees_anothers_caption(self, name, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        adapter = make(name, encoder).attach(encoder)
        train_a_little(adapter, encoder, images, condition)
        before = encoder(images, condition).pooled
        condition.pooled[2] += 1.0
        condition.tokens[2] += 1.0
        after = encoder(images, condition).pooled
        unchanged = [0, 1, 3]
        assert torch.equal(before[unchanged], after[unchanged])
        assert not torch.equal(before[2], after[2])

    def test_no_condition_outlives_its_forward_pass(self, name, encoder):
        make(name, encoder).attach(encoder)
        encoder(torch.randn(4, 3, 32, 32), captions())
        assert encoder.condition_slot.value is None

    def test_attaching_twice_or_to_another_shape_is_refused(self, name, encoder):
        adapter = make(name, encoder).attach(encoder)
        with pytest.raises(WlsupError, match="detach"):
            adapter.attach(encoder)
        other = ADAPTERS[name](encoder.embed_dim, len(encoder.blocks) + 1, C)
        with pytest.raises(WlsupError, match="blocks of width"):
            other.attach(encoder)
