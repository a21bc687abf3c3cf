"""What every fusion strategy promises, parametrised over all kinds: the adapter contract, and its own."""

import copy
from contextlib import nullcontext

import pytest
import torch

from wlsup.batch import Condition
from wlsup.errors import WlsupError
from wlsup.fusion.asymmetric import AsymmetricFusion
from wlsup.fusion.base import FusionSpec
from wlsup.fusion.co import CoFusion
from wlsup.fusion.merged import MergedFusion
from wlsup.models.text import TextEncoder, TextSpec
from wlsup.models.vision import VisionSpec, build_vision

C, M = 24, 7
TINY = VisionSpec(pretrained=False, architecture="vit(img_size=32,patch_size=8,embed_dim=48,depth=4,num_heads=3)")
KINDS = {kind: strategy for strategy in (MergedFusion, CoFusion, AsymmetricFusion) for kind in strategy.kinds}
SEEING = sorted(set(KINDS) - {"asymmetric_text"})


def make(kind, encoder, condition_width=C, **options):
    spec = FusionSpec(kind=kind, width=16, heads=2, hidden=24, **options)
    return KINDS[kind](encoder.embed_dim, len(encoder.blocks), condition_width, spec)


def captions(count=4, present=True):
    return Condition(
        tokens=torch.randn(count, M, C),
        mask=torch.arange(M)[None] < torch.randint(2, M, (count, 1)),
        pooled=torch.randn(count, C),
        present=torch.full((count,), present),
    )


def open_gates(fusion):
    """As after long training: every gate well open."""
    for name, parameter in fusion.named_parameters():
        if name.endswith(".g"):
            torch.nn.init.constant_(parameter, 0.7)
    return fusion


def train_a_little(fusion, encoder, images, condition, steps=3):
    encoder.requires_grad_(False)
    target = torch.randn(len(images), encoder.embed_dim)
    optimizer = torch.optim.AdamW(fusion.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        for told in (condition, None):
            optimizer.zero_grad()
            with fusion.recording() if isinstance(fusion, AsymmetricFusion) else nullcontext() as passes:
                loss = torch.nn.functional.mse_loss(encoder(images, told).pooled, target)
            if not fusion.image_sees_text:
                loss = loss + fusion.score(passes[-1], condition).square().sum()
            loss.backward()
            optimizer.step()


@pytest.fixture
def encoder():
    return build_vision(TINY).eval()


@pytest.mark.parametrize("kind", sorted(KINDS))
class TestContract:
    def test_exact_identity_at_step_0_told_or_not(self, kind, encoder):
        images = torch.randn(4, 3, 32, 32)
        before = encoder(images).tokens
        make(kind, encoder).attach(encoder)
        mixed = captions()
        mixed.present[::2] = False
        for condition in (None, captions(), mixed, captions(present=False)):
            assert (encoder(images, condition).tokens - before).abs().max() <= 1e-6

    def test_first_gradient_is_not_zero_told_or_not(self, kind, encoder):
        fusion = make(kind, encoder).attach(encoder)
        for condition in (None, captions()):
            fusion.zero_grad()
            encoder(torch.randn(4, 3, 32, 32), condition).pooled.square().sum().backward()
            assert sum(p.grad.abs().sum() for p in fusion.parameters() if p.grad is not None) > 0

    def test_keys_and_tensors_are_unchanged_and_detach_gives_the_original_back(self, kind, encoder):
        images = torch.randn(4, 3, 32, 32)
        state, features = copy.deepcopy(encoder.state_dict()), encoder.features(images)
        fusion = make(kind, encoder).attach(encoder)
        train_a_little(fusion, encoder, images, captions())
        assert list(encoder.state_dict()) == list(state)
        assert not torch.equal(encoder.features(images), features)
        fusion.detach()
        assert torch.equal(encoder.features(images), features)
        assert all(torch.equal(tensor, state[key]) for key, tensor in encoder.state_dict().items())

    def test_every_parameter_moves_and_null_is_learned(self, kind, encoder):
        images = torch.randn(4, 3, 32, 32)
        features = encoder.features(images)
        fusion = make(kind, encoder).attach(encoder)
        before = copy.deepcopy(fusion.state_dict())
        train_a_little(fusion, encoder, images, captions())
        assert not [key for key, tensor in fusion.state_dict().items() if torch.equal(tensor, before[key])]
        assert (encoder.features(images) - features).abs().max() > 1e-3

    def test_padding_changes_nothing(self, kind, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        fusion = open_gates(make(kind, encoder)).attach(encoder)
        other = copy.deepcopy(condition)
        other.tokens[~other.mask] = torch.randn(int((~other.mask).sum()), C) * 100
        assert torch.equal(encoder(images, condition).tokens, encoder(images, other).tokens)
        if not fusion.image_sees_text:
            seen = [torch.randn(4, 17, 48) for _ in fusion.layers]
            assert torch.equal(fusion.score(seen, condition), fusion.score(seen, other))

    def test_longer_padding_changes_nothing(self, kind, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        open_gates(make(kind, encoder)).attach(encoder)
        longer = Condition(
            torch.cat([condition.tokens, torch.randn(4, 5, C)], dim=1),
            torch.cat([condition.mask, torch.zeros(4, 5, dtype=torch.bool)], dim=1),
            condition.pooled,
            condition.present,
        )
        assert torch.allclose(encoder(images, condition).tokens, encoder(images, longer).tokens, atol=1e-5)

    def test_what_it_computes_is_the_same_when_blocks_are_recomputed(self, kind, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        fusion = open_gates(make(kind, encoder)).attach(encoder)
        gradients = []
        for recompute in (False, True):
            encoder.backbone.set_grad_checkpointing(recompute)
            fusion.zero_grad()
            told, null = encoder(images, condition).pooled, encoder(images).pooled
            (told.square().sum() + null.pow(3).sum()).backward()
            gradients.append({name: p.grad.clone() for name, p in fusion.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in gradients[0])


@pytest.mark.parametrize("kind", SEEING)
class TestWhereTheImageSeesText:
    def test_captions_matter_and_a_dropped_caption_is_the_null_condition(self, kind, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        open_gates(make(kind, encoder)).attach(encoder)
        null, told = encoder(images).pooled, encoder(images, condition).pooled
        assert (null - told).abs().max() > 1e-4
        condition.present[1] = False
        mixed = encoder(images, condition).pooled
        assert torch.allclose(mixed[1], null[1], atol=1e-5)
        assert torch.allclose(mixed[0], told[0], atol=1e-5)
        assert torch.allclose(encoder(images, captions(present=False)).pooled, null, atol=1e-5)

    def test_null_tokens_may_outnumber_a_captions(self, kind, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        open_gates(make(kind, encoder, null_tokens=M + 3)).attach(encoder)
        told, null = encoder(images, condition).pooled, encoder(images).pooled
        condition.present[1] = False
        mixed = encoder(images, condition).pooled
        assert torch.allclose(mixed[1], null[1], atol=1e-5)
        assert torch.allclose(mixed[0], told[0], atol=1e-5)

    def test_one_picture_never_sees_anothers_caption(self, kind, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        open_gates(make(kind, encoder)).attach(encoder)
        before = encoder(images, condition).pooled
        condition.tokens[2] += torch.randn(C)
        after = encoder(images, condition).pooled
        assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
        assert not torch.equal(before[2], after[2])

    def test_ids_at_padding_change_nothing_through_the_text_encoder_either(self, kind, encoder):
        text = TextEncoder(TextSpec())
        tokenizer = text.tokenizer
        given = ["a red square above a blue circle on the grass", "a star"]

        def other_ids_at_padding(*args, **kwargs):
            encoded = tokenizer(*args, **kwargs)
            ids, mask = encoded["input_ids"], encoded["attention_mask"]
            encoded["input_ids"] = torch.where(mask == 0, torch.randint_like(ids, 5, 900), ids)
            return encoded

        open_gates(make(kind, encoder, condition_width=text.width)).attach(encoder)
        images = torch.randn(2, 3, 32, 32)
        before = encoder(images, text(given)).tokens
        text.tokenizer = other_ids_at_padding
        assert (encoder(images, text(given)).tokens - before).abs().max() <= 1e-6


def test_no_caption_reaches_the_image_in_asymmetric_text(encoder):
    images = torch.randn(4, 3, 32, 32)
    open_gates(make("asymmetric_text", encoder)).attach(encoder)
    assert torch.equal(encoder(images, captions()).tokens, encoder(images).tokens)


def test_a_kind_of_another_strategy_and_a_layer_that_fits_nowhere_are_refused(encoder):
    with pytest.raises(WlsupError, match="Valid: co, co_meter"):
        CoFusion(48, 4, C, FusionSpec(kind="merged"))
    with pytest.raises(WlsupError, match="has 4 blocks"):
        MergedFusion(48, 4, C, FusionSpec(every=5))
    for option in ("every", "width", "heads", "hidden", "null_tokens"):
        with pytest.raises(WlsupError, match=rf"fusion.{option} must be at least 1"):
            FusionSpec(**{option: 0})
    with pytest.raises(WlsupError, match="not a multiple"):
        FusionSpec(width=10, heads=4)
