"""Token replay's own facts; the adapter contract covers its defaults, this its options."""

import copy
import itertools

import pytest
import torch

from wlsup.adapters.token_replay import TokenReplay
from wlsup.batch import Condition
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionSpec, build_vision

C, M = 24, 7
TINY = VisionSpec(pretrained=False, architecture="vit(img_size=32,patch_size=8,embed_dim=48,depth=4,num_heads=3)")
OPTIONS = [
    {"kind": kind, "source": source, "tokens": tokens}
    for kind, source, tokens in itertools.product(("layerwise", "concat"), ("caption", "image", "both"), (5, None))
]
OTHERS = [{"gate": "zero_up"}, {"share_projection": True}, {"layers": [2]}, {"image_block": 1}, {"heads": 2}]


@pytest.fixture
def encoder():
    return build_vision(TINY).eval().requires_grad_(False)


def make(encoder, **options):
    return TokenReplay(encoder.embed_dim, len(encoder.blocks), C, **{"hidden": 16, **options})


def opened(adapter):
    """As after long training: every site's gate, or up-projection, well open."""
    for site in adapter.replay_sites:
        if site.g is None:
            torch.nn.init.normal_(site.up.weight, std=0.3)
        else:
            torch.nn.init.constant_(site.g, 0.7)
    return adapter


def captions(count=4, present=True):
    return Condition(
        tokens=torch.randn(count, M, C),
        mask=torch.arange(M)[None] < torch.randint(2, M, (count, 1)),
        pooled=torch.randn(count, C),
        present=torch.full((count,), present),
    )


@pytest.mark.parametrize("options", [*OPTIONS, *OTHERS], ids=str)
class TestEveryOption:
    def test_identity_at_gate_0_with_a_first_gradient(self, options, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        before = encoder(images).tokens
        adapter = make(encoder, **options).attach(encoder)
        for told in (None, condition):
            adapter.zero_grad()
            after = encoder(images, told)
            assert (after.tokens - before).abs().max() <= 1e-6
            after.pooled.square().sum().backward()
            opening = [site.up.weight if site.g is None else site.g for site in adapter.replay_sites]
            assert all(parameter.grad.abs().max() > 0 for parameter in opening)

    def test_the_order_of_replayed_tokens_does_not_matter(self, options, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        adapter = opened(make(encoder, **options)).attach(encoder)
        before = encoder(images, condition).pooled
        order = torch.randperm(M)
        turned = Condition(condition.tokens[:, order], condition.mask[:, order], condition.pooled, condition.present)
        assert torch.allclose(encoder(images, turned).pooled, before, atol=1e-5)
        if adapter.image_reader is not None:
            read = adapter.image_reader.forward
            adapter.image_reader.forward = lambda tokens: read(tokens[:, torch.randperm(tokens.shape[1])])
            assert torch.allclose(encoder(images, condition).pooled, before, atol=1e-5)

    def test_padding_changes_nothing(self, options, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        opened(make(encoder, **options)).attach(encoder)
        other = copy.deepcopy(condition)
        other.tokens[~other.mask] = 100 * torch.randn(int((~other.mask).sum()), C)
        assert torch.equal(encoder(images, condition).tokens, encoder(images, other).tokens)

    def test_null_is_what_is_left_without_a_caption(self, options, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        adapter = opened(make(encoder, **options)).attach(encoder)
        null, told = encoder(images).pooled, encoder(images, condition).pooled
        condition.present[1] = False
        mixed = encoder(images, condition).pooled
        assert torch.allclose(mixed[1], null[1], atol=1e-5)
        assert torch.allclose(mixed[0], told[0], atol=1e-5)
        assert (adapter.caption_reader is None) == torch.equal(null, told)
        torch.nn.init.normal_(adapter.null, std=3.0)
        assert not torch.allclose(encoder(images).pooled, null, atol=1e-4)

    def test_samples_do_not_see_one_another(self, options, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        opened(make(encoder, **options)).attach(encoder)
        before = encoder(images, condition).pooled
        condition.tokens[2] += torch.randn(C)
        images = images.clone()
        images[2] += 1.0
        after = encoder(images, condition).pooled
        assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
        assert not torch.equal(before[2], after[2])

    def test_gradients_are_the_same_when_blocks_are_recomputed(self, options, encoder):
        images, condition = torch.randn(4, 3, 32, 32), captions()
        adapter = opened(make(encoder, **options)).attach(encoder)
        gradients = []
        for recompute in (False, True):
            encoder.backbone.set_grad_checkpointing(recompute)
            adapter.zero_grad()
            # two passes before one backward, as in training: each recomputes from its own replayed tokens
            told, null = encoder(images, condition).pooled, encoder(images.flip(0)).pooled
            (told.square().sum() + null.pow(3).sum()).backward()
            gradients.append({name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-4) for name in gradients[0])


def test_image_tokens_are_replayed_under_null_too_and_are_those_of_the_block_named(encoder):
    seen = {}
    encoder.blocks[1].register_forward_hook(lambda module, inputs, output: seen.update(stored=output))
    adapter = make(encoder, source="image", image_block=1, tokens=None).attach(encoder)
    read = []
    adapter.image_reader.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    encoder(torch.randn(2, 3, 32, 32))
    assert len(read) == 1, "replayed tokens are computed once a forward pass"
    assert torch.equal(read[0], seen["stored"][:, 1:])


def test_it_computes_the_stated_form(encoder):
    for kind in ("layerwise", "concat"):
        adapter = opened(make(encoder, kind=kind, heads=1))
        site, key_value = adapter.replay_sites[0], adapter.key_values[0]
        x, replayed = torch.randn(2, 6, 48), torch.randn(2, 5, 16)
        allowed = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        query = site.down(site.norm(x))
        keys = replayed if kind == "layerwise" else torch.cat([query, replayed], dim=1)
        mask = allowed if kind == "layerwise" else torch.cat([torch.ones(2, 6, dtype=torch.bool), allowed], dim=1)
        key, value = key_value(keys).chunk(2, dim=-1)
        weight = (query @ key.transpose(1, 2) / 4.0).masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        wanted = x + torch.tensor(0.7).tanh() * site.up(weight @ value)
        assert torch.allclose(site(x, replayed, allowed, key_value), wanted, atol=1e-5)


def test_a_shared_projection_is_one_projection(encoder):
    apart, shared = make(encoder), make(encoder, share_projection=True)
    count = {name: sum(p.numel() for p in adapter.parameters()) for name, adapter in (("a", apart), ("s", shared))}
    assert len(apart.replay_sites) == 3
    assert count["a"] - count["s"] == 2 * (16 * 32 + 32)


def test_gate_and_up_projection_never_both_begin_at_zero(encoder):
    for gate in ("tanh", "zero_up"):
        for site in make(encoder, gate=gate).replay_sites:
            assert (site.g is None) == (not site.up.weight.any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rehearsal"}, "Valid: layerwise, concat"),
        ({"source": "text"}, "Valid: caption, image, both"),
        ({"gate": "both"}, "Valid: tanh, zero_up"),
        ({"tokens": 0}, "at least 1"),
        ({"heads": 3}, "multiple of heads"),
        ({"layers": [0]}, "allowed: at least one of 1 to 3, those after image_block 0"),
        ({"layers": [7]}, "allowed: at least one of 1 to 3"),
        ({"layers": []}, "at least one"),
        ({"image_block": 3}, "blocks 0 to 2 of 4"),
    ],
)
def test_wrong_options_are_refused(options, message, encoder):
    with pytest.raises(WlsupError, match=message):
        make(encoder, **options)
    assert make(encoder, source="caption").layers == [0, 1, 2, 3]
