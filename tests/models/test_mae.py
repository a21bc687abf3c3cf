"""What the masked autoencoder promises: FAIR's counts, masks and initialisation, replays, and files that round-trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from wlsup.batch import Condition
from wlsup.errors import WlsupError
from wlsup.models.mae import (
    DecoderSpec,
    MaskedAutoencoder,
    build_mae,
    export_transformers,
    random_masking,
    save_mae,
    sincos_position_embedding,
)
from wlsup.models.saving import save_vision
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.objectives.reconstruction import reconstruction_loss

TINY = "vit(img_size=32,patch_size=8,embed_dim=192,depth=2,num_heads=3)"
SMALL = DecoderSpec(width=64, depth=2, heads=4)


def tiny(architecture: str = TINY, decoder: DecoderSpec = SMALL, **options) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return build_mae(VisionSpec(architecture=architecture, pretrained=False, **options), decoder)


def pictures(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def noise(batch: int = 2, count: int = 16) -> torch.Tensor:
    return torch.rand(batch, count, generator=torch.Generator().manual_seed(2))


def fair_state(mae: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    """The names that FAIR's models_mae.py gives the same tensors."""
    state = dict(mae.encoder.backbone.state_dict())
    for name, tensor in mae.decoder.state_dict().items():
        state[name if name == "mask_token" else f"decoder_{name}"] = tensor
    return state


@pytest.mark.parametrize(
    ("name", "total", "encoder", "trainable"),
    [
        ("vit_base_patch16_224", 111_907_840, 85_798_656, 111_655_680),
        ("vit_large_patch16_224", 329_541_888, 303_301_632, 329_541_888 - 197 * (1024 + 512)),
        ("vit_huge_patch14_224", 657_074_508, 630_764_800, 657_074_508 - 257 * (1280 + 512)),
    ],
)
def test_parameter_counts_are_fairs_to_the_unit(name: str, total: int, encoder: int, trainable: int) -> None:
    with torch.device("meta"):
        mae = build_mae(VisionSpec(name, pretrained=False))
    assert sum(parameter.numel() for parameter in mae.parameters()) == total
    assert sum(parameter.numel() for parameter in mae.encoder.parameters()) == encoder
    # Both sine-cosine position embeddings are fixed in FAIR's code; timm alone would train the encoder's.
    assert sum(parameter.numel() for parameter in mae.parameters() if parameter.requires_grad) == trainable


def test_masking_removes_147_of_196_with_the_largest_noise() -> None:
    given = noise(3, 196)
    ids_keep, ids_restore, mask = random_masking(3, 196, 0.75, given)
    assert ids_keep.shape == (3, 49) and mask.sum(dim=1).tolist() == [147] * 3
    kept = given.gather(1, ids_keep)
    assert torch.equal(mask.gather(1, ids_keep), torch.zeros(3, 49))
    assert (kept.amax(1) <= given.masked_fill(mask == 0, 2).amin(1)).all()
    # Shuffling and restoring is the identity.
    order = given.argsort(1)
    assert torch.equal(order.gather(1, ids_restore), torch.arange(196).expand(3, -1))


def test_masking_replays_from_noise_and_from_a_generator() -> None:
    for one, two in zip(random_masking(2, 16, 0.5, noise()), random_masking(2, 16, 0.5, noise()), strict=True):
        assert torch.equal(one, two)
    seeded = [random_masking(2, 16, 0.5, generator=torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(*seeded)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.97, float("nan")])
def test_a_mask_ratio_that_keeps_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(WlsupError, match="mask_ratio"):
        random_masking(2, 16, ratio)
    with pytest.raises(WlsupError, match=r"\(B, N\) = \(2, 16\)"):
        random_masking(2, 16, 0.5, torch.rand(2, 15))


def test_positions_put_the_column_first_as_fairs_do() -> None:
    positions = sincos_position_embedding(8, (3, 5))
    assert positions.shape == (1, 16, 8) and positions[0, 0].abs().sum() == 0
    row, column = 2, 4
    frequency = torch.tensor([1.0, 0.01])
    expected = torch.cat([f(x * frequency) for x in (column, row) for f in (torch.sin, torch.cos)])
    assert torch.allclose(positions[0, 1 + row * 5 + column], expected, atol=1e-6)


def test_from_scratch_weights_are_fairs_initialisation() -> None:
    mae = tiny()
    for name, module in mae.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert module.bias.abs().max() == 0, name
            assert bound * 0.98 < module.weight.abs().max() <= bound, name
    patch = mae.encoder.backbone.patch_embed.proj.weight.flatten(1)
    assert (6 / sum(patch.shape)) ** 0.5 * 0.98 < patch.abs().max() <= (6 / sum(patch.shape)) ** 0.5
    assert 0.01 < mae.decoder.mask_token.std() < 0.03 and 0.01 < mae.encoder.backbone.cls_token.std() < 0.03
    assert torch.equal(mae.encoder.backbone.pos_embed, sincos_position_embedding(192, (4, 4)))
    assert torch.equal(mae.decoder.pos_embed, sincos_position_embedding(64, (4, 4)))
    assert not mae.decoder_pretrained and not mae.decoder.pos_embed.requires_grad


def test_forward_shapes_at_native_and_other_sizes_and_with_registers() -> None:
    for architecture, prefix in ((TINY, 1), (TINY[:-1] + ",reg_tokens=3)", 4)):
        mae = tiny(architecture)
        for size, count in ((32, 16), (48, 36)):
            output = mae(pictures(size=size), mask_ratio=0.75)
            assert output.prediction.shape == (2, count, 192) and output.mask.shape == (2, count)
            assert output.latent.tokens.shape == (2, prefix + count // 4, 192)


def test_decoder_puts_each_latent_at_its_own_place() -> None:
    mae = tiny().eval()
    with torch.no_grad():
        whole = mae(pictures(), mask_ratio=0.0, noise=noise())
        ordered = mae(pictures(), mask_ratio=0.0, noise=torch.arange(16.0).expand(2, -1))
        assert not torch.equal(whole.ids_keep, ordered.ids_keep)
        assert torch.allclose(whole.prediction, ordered.prediction, atol=1e-5)
        assert torch.allclose(whole.latent.pooled, mae.encoder.features(pictures()), atol=1e-5)


def test_removed_pixels_do_not_reach_the_prediction_and_visible_ones_do() -> None:
    mae, images = tiny().eval(), pictures().requires_grad_()
    output = mae(images, noise=noise())
    (gradient,) = torch.autograd.grad(output.prediction.square().sum(), images)
    cells = gradient.reshape(2, 3, 4, 8, 4, 8).abs().amax(dim=(1, 3, 5)).reshape(2, 16)
    assert torch.equal((cells == 0).float(), output.mask)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("ratio", [0.75, 0.3, 0.0])
def test_predicting_only_removed_patches_changes_neither_loss_nor_gradients(hooked: bool, ratio: float) -> None:
    images, results = pictures(), []
    for predict_kept in (True, False):
        mae, calls = tiny().double(), []
        for name, parameter in mae.named_parameters():
            if name.endswith("bias") or "norm" in name:
                nn.init.normal_(parameter, mean=0.5, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        if hooked:  # a hook in the last block must fire, which the shortcut would not let it
            last = mae.decoder.blocks[-1]
            last.mlp.register_forward_hook(lambda _m, _i, output, seen=calls: seen.append(1) or output * 2)
        output = mae(images.double(), mask_ratio=ratio, noise=noise(), predict_kept=predict_kept)
        loss = reconstruction_loss(output.prediction, images.double(), output.mask, 8)
        loss.backward()
        assert bool(calls) == hooked
        results.append((loss, output, {name: parameter.grad for name, parameter in mae.named_parameters()}))
    (loss, whole, gradients), (sooner, some, others) = results
    assert torch.allclose(loss, sooner, atol=1e-7)
    mask = whole.mask[..., None].bool()
    assert torch.allclose(whole.prediction.masked_fill(~mask, 0), some.prediction, atol=1e-9)
    for name, gradient in gradients.items():
        if gradient is not None:
            assert torch.allclose(gradient, others[name], atol=1e-6), name


def test_an_adapter_on_the_encoder_works_inside_the_autoencoder_and_sees_the_condition() -> None:
    mae, seen = tiny(), []
    given = Condition(torch.zeros(2, 1, 4), torch.ones(2, 1).bool(), torch.zeros(2, 4), torch.ones(2).bool())
    before = mae(pictures(), given, noise=noise()).prediction
    mae.encoder.blocks[0].register_forward_hook(
        lambda _m, _i, output: (seen.append(mae.encoder.condition_slot.value), output + 1)[1]
    )
    after = mae(pictures(), given, noise=noise()).prediction
    assert seen == [given] and not torch.allclose(before, after)
    assert mae.encoder.condition_slot.value is None


def test_a_training_step_reaches_every_trainable_parameter() -> None:
    mae, images = tiny(), pictures()
    output = mae(images, noise=noise())
    reconstruction_loss(output.prediction, images, output.mask, 8).backward()
    without = [name for name, parameter in mae.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert without == []
    zero = [name for name, parameter in mae.named_parameters() if parameter.requires_grad and not parameter.grad.any()]
    assert zero == []


def test_bfloat16_autocast_stays_near_fp32() -> None:
    mae, images = tiny().eval(), pictures()
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = mae(images, noise=noise())
            losses.append(reconstruction_loss(output.prediction, images, output.mask, 8))
    assert losses[1].dtype == torch.float32 and losses[1].item() == pytest.approx(losses[0].item(), rel=2e-2)


@pytest.mark.parametrize("wrapper", [lambda state: {"model": state}, lambda state: state])
def test_fair_checkpoint_with_decoder_round_trips(tmp_path: Path, wrapper) -> None:
    mae = tiny(decoder=DecoderSpec(width=64, depth=2, heads=16)).eval()
    nn.init.normal_(mae.decoder.pred.bias)
    torch.save(wrapper(fair_state(mae)), tmp_path / "mae_visualize.pth")
    again = build_mae(VisionSpec(str(tmp_path / "mae_visualize.pth"))).eval()  # width and depth come from the file
    assert again.decoder_pretrained and (again.decoder_spec.width, again.decoder_spec.depth) == (64, 2)
    assert torch.equal(again(pictures(), noise=noise()).prediction, mae(pictures(), noise=noise()).prediction)
    encoder = build_vision(VisionSpec(str(tmp_path / "mae_visualize.pth"))).eval()  # the same file as an encoder only
    assert torch.equal(encoder.features(pictures()), mae.encoder.features(pictures()))
    fresh = build_mae(VisionSpec(str(tmp_path / "mae_visualize.pth")), DecoderSpec(32, 1, 4, pretrained=False))
    assert not fresh.decoder_pretrained and fresh.decoder.norm.weight.shape == (32,)


def test_fair_encoder_alone_gets_a_fresh_decoder(tmp_path: Path) -> None:
    mae = tiny()
    torch.save({"model": mae.encoder.backbone.state_dict()}, tmp_path / "mae_pretrain.pth")
    again = build_mae(VisionSpec(str(tmp_path / "mae_pretrain.pth")), SMALL)
    assert not again.decoder_pretrained
    assert again.encoder.base_sha256 == mae.encoder.base_sha256
    assert again.decoder.pred.weight.std() > 0 and 0.01 < again.decoder.mask_token.std() < 0.03


def test_own_folder_round_trips_bit_for_bit(tmp_path: Path) -> None:
    mae = tiny(decoder=DecoderSpec(width=64, depth=2, heads=4, mlp_ratio=2.0, normalize_pixels=False)).eval()
    save_mae(mae, tmp_path)
    again = build_mae(VisionSpec(str(tmp_path))).eval()
    assert again.decoder_pretrained and again.decoder_spec == mae.decoder_spec and not again.normalize_pixels
    assert again.state_dict().keys() == mae.state_dict().keys()
    assert all(torch.equal(tensor, mae.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert build_vision(VisionSpec(str(tmp_path))).base_sha256 == mae.encoder.base_sha256
    scratch = build_mae(VisionSpec(str(tmp_path), pretrained=False))
    assert scratch.decoder_spec == mae.decoder_spec and not scratch.decoder_pretrained


def test_own_folder_of_an_encoder_alone_gets_a_fresh_decoder(tmp_path: Path) -> None:
    save_vision(tiny().encoder, tmp_path)
    mae = build_mae(VisionSpec(str(tmp_path)), SMALL)
    assert not mae.decoder_pretrained and len(mae.decoder.blocks) == 2


def test_another_image_size_resamples_both_position_embeddings(tmp_path: Path) -> None:
    mae = tiny().eval()
    save_mae(mae, tmp_path)
    larger = build_mae(VisionSpec(str(tmp_path), image_size=48)).eval()
    assert larger.decoder.pos_embed.shape == (1, 37, 64) and larger.encoder.backbone.pos_embed.shape == (1, 37, 192)
    images, given = pictures(size=48), noise(2, 36)
    assert torch.allclose(larger(images, noise=given).prediction, mae(images, noise=given).prediction, atol=1e-5)


def test_a_decoder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WlsupError, match="multiple of the heads"):
        tiny(decoder=DecoderSpec(width=64, depth=2, heads=5))
    with pytest.raises(WlsupError, match="multiple of 4"):
        tiny(decoder=DecoderSpec(width=66, depth=2, heads=3))
    mae = tiny()
    state = fair_state(mae)
    del state["decoder_blocks.1.attn.qkv.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(WlsupError, match=r"blocks\.1\.attn\.qkv\.weight"):
        build_mae(VisionSpec(str(tmp_path / "cut.pth")), SMALL)


def test_a_fresh_decoder_warms_up_without_moving_the_encoder(tmp_path: Path) -> None:
    spec = DecoderSpec(width=64, depth=2, heads=4, warmup_batches=2)
    save_vision(tiny().encoder, tmp_path / "encoder")
    mae = build_mae(VisionSpec(str(tmp_path / "encoder")), spec)
    moved = []
    for _ in range(3):
        assert mae.eval().warming_up() is None  # evaluation does not count
        output = mae.train()(pictures(), noise=noise(), warming=mae.warming_up())
        reconstruction_loss(output.prediction, pictures(), output.mask, 8).backward()
        assert mae.decoder.embed.weight.grad.any()
        moved.append(bool(mae.encoder.backbone.patch_embed.proj.weight.grad.any()))
        mae.zero_grad()
    assert moved == [False, False, True]
    save_mae(mae, tmp_path / "whole")
    export_transformers(mae, tmp_path / "theirs")
    for folder in ("whole", "theirs"):
        assert not [name for name in load_file(tmp_path / folder / "model.safetensors") if "warmed" in name]
    again = build_mae(VisionSpec(str(tmp_path / "whole")), spec)  # its decoder is no longer fresh
    assert again.decoder_pretrained and again.warming_up() is None
    assert torch.equal(again(pictures(), noise=noise()).prediction, mae(pictures(), noise=noise()).prediction)
    assert not tiny(decoder=spec).decoder_spec.warmup_batches  # nor one on an encoder that knows as little
