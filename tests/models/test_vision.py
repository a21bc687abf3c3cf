"""What the vision encoder promises: timm's own features, any size, hooks that see the condition."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from wlsup.batch import Condition, ImageSpec
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionEncoder, VisionSpec, build_vision

TINY = "vit(img_size=32,patch_size=8,embed_dim=48,depth=3,num_heads=3)"


def tiny(architecture: str = TINY, **options) -> VisionEncoder:
    torch.manual_seed(0)
    encoder = build_vision(VisionSpec(architecture=architecture, pretrained=False, **options)).eval()
    with torch.no_grad():  # positions start near zero; make them matter
        if encoder.backbone.pos_embed is not None:
            encoder.backbone.pos_embed.normal_(std=0.5)
    return encoder


def pictures(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def condition(batch: int = 2) -> Condition:
    return Condition(
        torch.randn(batch, 4, 8),
        torch.ones(batch, 4, dtype=torch.bool),
        torch.randn(batch, 8),
        torch.ones(batch).bool(),
    )


@pytest.mark.parametrize("size", [32, 48, 24])
@pytest.mark.parametrize(
    "architecture",
    [
        TINY,
        TINY[:-1] + ",global_pool='avg')",  # mean of patches, then fc_norm
        TINY[:-1] + ",global_pool='avg',fc_norm=False)",
        TINY[:-1] + ",reg_tokens=4)",
        TINY[:-1] + ",no_embed_class=True,reg_tokens=2)",
        TINY[:-1] + ",class_token=False,global_pool='avg')",
        TINY[:-1] + ",pre_norm=True,init_values=0.1)",
        TINY[:-1] + ",global_pool='map')",
    ],
)
def test_features_are_timms_own_at_any_size(architecture: str, size: int) -> None:
    encoder = tiny(architecture)
    images = pictures(size=size)
    with torch.no_grad():
        expected = encoder.backbone(images)
        tokens = encoder.backbone.forward_features(images)
        output = encoder(images)
        assert torch.allclose(encoder.features(images), expected, atol=1e-6)
    assert torch.allclose(output.tokens, tokens, atol=1e-6)
    assert output.patch_tokens.shape == (2, (size // 8) ** 2, 48)


def test_pooling_override_takes_class_token_or_mean_of_patches() -> None:
    encoder, images = tiny(TINY[:-1] + ",reg_tokens=4)", pooling="mean"), pictures()
    with torch.no_grad():
        tokens = encoder.backbone.forward_features(images)
        assert torch.allclose(encoder.features(images), tokens[:, 5:].mean(1), atol=1e-6)
        encoder.pooling = "cls"
        assert torch.allclose(encoder.features(images), tokens[:, 0], atol=1e-6)
    with pytest.raises(WlsupError, match="class token"):
        tiny(TINY[:-1] + ",class_token=False,global_pool='avg')", pooling="cls")


def test_dinov3_keeps_its_own_mean_pooling_and_five_prefix_tokens() -> None:
    encoder = build_vision(VisionSpec("vit_small_patch16_dinov3", pretrained=False, image_size=64)).eval()
    images = pictures(size=64)
    with torch.no_grad():
        assert encoder.num_prefix_tokens == 5
        assert torch.allclose(encoder.features(images), encoder.backbone(images), atol=1e-5)
        # Rotary positions follow the kept patches: keeping all of them, in any order, changes nothing.
        shuffled = torch.stack([torch.randperm(16) for _ in range(2)])
        assert torch.allclose(encoder(images, ids_keep=shuffled).pooled, encoder.features(images), atol=1e-5)


@pytest.mark.parametrize(
    "architecture",
    [TINY, TINY[:-1] + ",reg_tokens=4)", TINY[:-1] + ",no_embed_class=True)", TINY[:-1] + ",pre_norm=True)"],
)
@pytest.mark.parametrize("hooked", [False, True])
def test_kept_patches_get_their_positions_before_the_others_leave(architecture: str, hooked: bool) -> None:
    encoder, images = tiny(architecture), pictures()
    calls = []
    if hooked:  # a hook on the patch embedding must fire, which the shortcut over the kept patches would not let it
        encoder.backbone.patch_embed.proj.register_forward_hook(lambda *_: calls.append(1))
    ids_keep = torch.tensor([[3, 0, 9, 15], [7, 8, 1, 2]])
    with torch.no_grad():
        backbone, prefix = encoder.backbone, encoder.num_prefix_tokens
        tokens = backbone._pos_embed(backbone.patch_embed(images))
        chosen = torch.stack([tokens[i, prefix:][ids_keep[i]] for i in range(2)])
        tokens = backbone.norm_pre(torch.cat([tokens[:, :prefix], chosen], dim=1))
        expected = backbone.norm(backbone.blocks(tokens))
        calls.clear()
        assert torch.allclose(encoder(images, ids_keep=ids_keep).tokens, expected, atol=2e-6)
    assert bool(calls) == hooked


def test_hooks_fire_and_see_the_condition_also_when_blocks_are_recomputed() -> None:
    encoder, given, seen = tiny(), condition(), []
    for module in (encoder.blocks[0], encoder.blocks[1].attn, encoder.blocks[2].mlp, encoder.blocks[0].norm1):
        module.register_forward_hook(lambda *_: seen.append(encoder.condition_slot.value))
    encoder(pictures(), given)
    assert len(seen) == 4 and all(value is given for value in seen)
    seen.clear()
    encoder.features(pictures())
    assert seen == [None] * 4
    encoder.backbone.set_grad_checkpointing(True)
    seen.clear()
    encoder(pictures(), given).pooled.sum().backward()
    assert len(seen) > 4 and all(value is given for value in seen)  # the recomputation stops early
    assert encoder.condition_slot.value is None


def _noted(sizes: list[int], tensor: torch.Tensor) -> torch.Tensor:
    sizes.append(tensor.numel())
    return tensor


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients() -> None:
    kept, gradients = [], []
    for on in (False, True):
        encoder, sizes = build_vision(VisionSpec(gradient_checkpointing=on)), []
        keep = partial(_noted, sizes)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = encoder(pictures()).pooled.square().sum()
        output.backward()
        kept.append(sum(sizes))
        gradients.append([parameter.grad for parameter in encoder.parameters() if parameter.grad is not None])
    assert kept[1] < kept[0] / 3
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients, strict=True))


def test_condition_slot_is_empty_after_a_failed_forward() -> None:
    encoder = tiny()

    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    encoder.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        encoder(pictures(), condition())
    assert encoder.condition_slot.value is None


def test_state_dict_keys_are_timms() -> None:
    keys = set(
        VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0).state_dict()
    )
    assert set(tiny().state_dict()) == {f"backbone.{key}" for key in keys}


@pytest.mark.parametrize(
    ("name", "size", "resize"),
    [
        ("vit_base_patch16_224.dino", None, 256),  # DINO's published evaluation, not timm's crop_pct of 0.9 (248)
        ("vit_small_patch16_224.dino", 112, 128),
        ("vit_base_patch16_224.mae", None, 248),
        ("vit_base_patch16_224.mae", 112, 124),
        ("vit_tiny_patch16_224.augreg_in21k", None, 248),
    ],
)
def test_image_spec_is_the_published_evaluation(name: str, size: int | None, resize: int) -> None:
    with torch.device("meta"):
        encoder = build_vision(VisionSpec(name, image_size=size, pretrained=False))
    config = timm.models.get_pretrained_cfg(name)
    assert encoder.image_spec == ImageSpec(size or 224, config.mean, config.std, "bicubic", resize)
    assert encoder.grid_size == ((size or 224) // 16,) * 2


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 30, 32), (3, 32, 32), (2, 3, 32, 4)])
def test_pictures_of_a_wrong_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(WlsupError, match="Pictures"):
        tiny()(torch.zeros(shape))


def test_bfloat16_autocast_masked_and_whole() -> None:
    encoder, images = tiny(), pictures()
    ids_keep = torch.tensor([[3, 0], [7, 8]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, low_kept = encoder(images), encoder(images, ids_keep=ids_keep)
    assert torch.allclose(low.pooled.float(), encoder(images).pooled, atol=0.15)
    assert torch.allclose(low_kept.pooled.float(), encoder(images, ids_keep=ids_keep).pooled, atol=0.15)


def test_same_weights_have_the_same_fingerprint_and_others_another() -> None:
    one, same = tiny(), tiny()
    assert one.base_sha256 == same.base_sha256 and len(one.base_sha256) == 64
    assert one.base_sha256 != build_vision(VisionSpec(architecture=TINY, pretrained=False)).base_sha256
    assert one.base_id.startswith("random:vit(")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (VisionSpec("vit_bas_patch16_224"), "vit_base_patch16_224"),
        (VisionSpec("resnet50"), "not one of the ViTs that wlsup teaches"),
        (VisionSpec("/nowhere/model.safetensors"), "/nowhere/model.safetensors"),
        (VisionSpec("dino_vitbase16.pth"), "No such file or folder"),
        (VisionSpec(architecture="vit(width=3)", pretrained=False), "Unknown argument"),
        (VisionSpec(architecture="vit(embed_dim=50,num_heads=3)", pretrained=False), "Cannot build"),
        (VisionSpec(architecture="vit(embed_dim=open('x'))", pretrained=False), "Cannot read"),
        (VisionSpec(architecture="vit_base", pretrained=False), "Unknown architecture"),
        (VisionSpec(architecture=TINY, pretrained=False, image_size=30), "24, 32"),
        (VisionSpec(architecture=TINY[:-1] + ",in_chans=1)", pretrained=False), "takes 1 channel, and .* divided by 3"),
        (VisionSpec(architecture=TINY, pretrained=False, pooling="max"), "auto, cls, mean"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_say_what_is_allowed(spec: VisionSpec, message: str) -> None:
    with pytest.raises(WlsupError, match=message):
        build_vision(spec)


def test_a_grey_encoder_with_its_weight_over_three_channels_makes_the_same() -> None:
    grey = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, in_chans=1, num_classes=0)
    picture = torch.randn(2, 1, 32, 32)
    wanted = grey.eval()(picture)
    grey.patch_embed.proj.weight = torch.nn.Parameter(grey.patch_embed.proj.weight.repeat(1, 3, 1, 1) / 3)
    assert torch.allclose(grey(picture.repeat(1, 3, 1, 1)), wanted, atol=1e-5)  # as the error for such encoders says


def test_lacking_mini_weights_name_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("wlsup.models.sources.MINI_FOLDER", tmp_path)
    with pytest.raises(WlsupError, match=str(tmp_path / "config.json")):
        build_vision(VisionSpec("mini"))
