"""What the image prefix promises: the published counts, LiMBeR's linearity, patches in order."""

import pytest
import torch

from wlsup.batch import VisionOutput
from wlsup.errors import WlsupError
from wlsup.models.prefix import ImagePrefix, PrefixSpec


def count(*widths, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in ImagePrefix(*widths, PrefixSpec(**options)).parameters())


def vision(batch=2, patches=16, width=6, prefix=1):
    tokens = torch.randn(batch, prefix + patches, width)
    return VisionOutput(tokens[:, 0], tokens, prefix)


def test_parameters_are_the_published_ones():
    assert count(3072, 4096, layer_norm=False) == 12_587_008  # LiMBeR and MAGMA, CLIP RN50x16 into GPT-J
    assert count(3072, 4096) - count(3072, 4096, layer_norm=False) == 8_192
    assert count(1024, 4096, layer_norm=False) == 4_198_400  # LiMBeR, BEiT-L
    assert count(2048, 4096, layer_norm=False, tokens="pooled") == 8_392_704  # LiMBeR, NF-ResNet-50


def test_without_layer_norm_it_is_linear_and_with_it_normalised():
    seen = vision()
    linear = ImagePrefix(6, 8, PrefixSpec(layer_norm=False)).eval()
    wanted = seen.patch_tokens @ linear.project.weight.T + linear.project.bias
    assert torch.allclose(linear(seen, (4, 4)), wanted, atol=1e-6)
    normed = ImagePrefix(6, 8, PrefixSpec()).eval()(seen, (4, 4))
    assert torch.allclose(normed.mean(-1), torch.zeros(2, 16), atol=1e-5)


def test_class_token_and_registers_are_left_out():
    seen = vision(prefix=5)
    prefix = ImagePrefix(6, 8, PrefixSpec()).eval()
    other = VisionOutput(seen.pooled, torch.cat([torch.randn(2, 5, 6), seen.patch_tokens], dim=1), 5)
    assert torch.equal(prefix(seen, (4, 4)), prefix(other, (4, 4)))
    assert prefix(seen, (4, 4)).shape == (2, 16, 8)


def test_pooled_makes_as_many_positions_as_asked():
    prefix = ImagePrefix(6, 8, PrefixSpec(tokens="pooled", length=3)).eval()
    assert prefix(vision(), (4, 4)).shape == (2, 3, 8)
    assert prefix.positions((4, 4)) == 3


def test_pool_averages_squares():
    seen = vision()
    prefix = ImagePrefix(6, 8, PrefixSpec(pool=2))
    chosen = prefix.select(seen, (4, 4))
    assert prefix.positions((4, 4)) == chosen.shape[1] == 4
    assert torch.allclose(chosen[:, 1], seen.patch_tokens[:, [2, 3, 6, 7]].mean(1), atol=1e-6)


@pytest.mark.parametrize(("options", "count"), [({}, 16), ({"pool": 2}, 4), ({"tokens": "pooled", "length": 3}, 0)])
def test_what_is_kept_of_a_picture_gives_the_same_prefix(options, count):
    seen, prefix = vision(), ImagePrefix(6, 8, PrefixSpec(**options)).eval()
    kept = prefix.reduced(seen, (4, 4))
    assert kept.tokens.shape == (2, count, 6)
    assert torch.equal(prefix(kept, (4, 4)), prefix(seen, (4, 4)))


def test_patches_that_are_not_of_the_grid_are_refused():
    prefix = ImagePrefix(6, 8, PrefixSpec())
    with pytest.raises(WlsupError, match="4 patches are not a grid of 4 x 4"):
        prefix(prefix_of_pool_2(), (4, 4))


def prefix_of_pool_2():
    return ImagePrefix(6, 8, PrefixSpec(pool=2)).reduced(vision(), (4, 4))


def test_patches_of_a_masked_picture_are_put_in_order():
    seen, prefix = vision(), ImagePrefix(6, 8, PrefixSpec()).eval()
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    patches = torch.take_along_dim(seen.patch_tokens, keep[..., None], dim=1)
    masked = VisionOutput(seen.pooled, torch.cat([seen.tokens[:, :1], patches], dim=1), 1)
    whole = prefix(seen, (4, 4))
    wanted = torch.take_along_dim(whole, keep.sort(dim=1).values[..., None], dim=1)
    assert torch.allclose(prefix(masked, (4, 4), keep), wanted, atol=1e-6)


def test_dropout_only_in_training():
    prefix, seen = ImagePrefix(6, 8, PrefixSpec(dropout=0.5)), vision()
    assert not torch.equal(prefix(seen, (4, 4)), prefix(seen, (4, 4)))
    mapped = prefix.project(prefix.select(seen, (4, 4))).detach()
    torch.manual_seed(3)
    wanted = torch.nn.functional.dropout(mapped, 0.5)  # alone a process draws as torch's own dropout does
    torch.manual_seed(3)
    assert torch.equal(prefix.dropout(mapped), wanted)
    prefix.eval()
    assert torch.equal(prefix(seen, (4, 4)), prefix(seen, (4, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "all"}, "patches, pooled"),
        ({"length": 0}, "length >= 1"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"length": 2}, "Set prefix.pool"),
        ({"pool": 2, "tokens": "pooled"}, "set prefix.length"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(WlsupError, match=message):
        PrefixSpec(**options)


def test_a_pool_that_does_not_divide_and_holes_are_refused():
    prefix = ImagePrefix(6, 8, PrefixSpec(pool=3))
    with pytest.raises(WlsupError, match="does not divide a grid of 4 x 4"):
        prefix.positions((4, 4))
    with pytest.raises(WlsupError, match="whole pictures"):
        prefix(vision(), (4, 4), torch.zeros(2, 4, dtype=torch.int64))
