"""Our masked autoencoder and transformers' ViTMAE are the same function: loss, predictions and every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from wlsup.models.layouts import split_checkpoint
from wlsup.models.mae import DecoderSpec, MaskedAutoencoder, build_mae, export_transformers, sincos_position_embedding
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.objectives.reconstruction import reconstruction_loss

TOLERANCE = 1e-5


def transformers_mae(normalize: bool, eps: float = 1e-12) -> ViTMAEForPreTraining:
    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=200,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=160,
        image_size=64,
        patch_size=8,
        norm_pix_loss=normalize,
        layer_norm_eps=eps,
    )
    model = ViTMAEForPreTraining(config)
    for name, parameter in model.named_parameters():  # biases and norms away from 0 and 1, so that none can be swapped
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    with torch.no_grad():  # from a bare configuration transformers leaves these zero
        model.vit.embeddings.position_embeddings.normal_()
        model.decoder.decoder_pos_embed.normal_()
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 64, 64, generator=generator), torch.rand(3, 64, generator=generator)


def assert_same(ours: MaskedAutoencoder, theirs: ViTMAEForPreTraining, predict_kept: bool = True) -> None:
    images, noise = inputs()
    expected = theirs(images, noise=noise)
    output = ours(images, mask_ratio=theirs.config.mask_ratio, noise=noise, predict_kept=predict_kept)
    loss = reconstruction_loss(output.prediction, images, output.mask, 8, theirs.config.norm_pix_loss)
    assert torch.equal(output.mask, expected.mask) and torch.equal(output.ids_restore, expected.ids_restore)
    logits = expected.logits if predict_kept else expected.logits * expected.mask[..., None]
    assert torch.allclose(output.prediction, logits, atol=TOLERANCE)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=TOLERANCE)

    expected.loss.backward()
    loss.backward()
    # The gradients travel through the same renaming as the weights.
    layout = split_checkpoint({name: value.grad for name, value in theirs.named_parameters() if value.grad is not None})
    gradients = {f"encoder.backbone.{name}": value for name, value in layout.encoder.items()}
    gradients |= {f"decoder.{name}": value for name, value in layout.decoder.items()}
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    # transformers' from_pretrained lets the fixed positions require gradients; FAIR's code and ours do not.
    assert gradients.keys() - {"encoder.backbone.pos_embed", "decoder.pos_embed"} == trained
    for name, parameter in ours.named_parameters():
        if name in trained:
            assert torch.allclose(parameter.grad, gradients[name], atol=TOLERANCE), name


@pytest.mark.parametrize("predict_kept", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_their_checkpoint_in_our_model(tmp_path: Path, normalize: bool, eps: float, predict_kept: bool) -> None:
    theirs = transformers_mae(normalize, eps)
    theirs.save_pretrained(tmp_path)
    ours = build_mae(VisionSpec(str(tmp_path)), DecoderSpec(normalize_pixels=normalize))
    assert ours.decoder_pretrained and ours.decoder_spec.heads == 2 and ours.normalize_pixels == normalize
    assert_same(ours, theirs, predict_kept)


def test_our_checkpoint_in_their_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture = "vit(img_size=64,patch_size=8,embed_dim=96,depth=3,num_heads=4,mlp_ratio=2.0)"
    ours = build_mae(VisionSpec(architecture=architecture, pretrained=False), DecoderSpec(width=64, depth=2, heads=2))
    for name, parameter in ours.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    export_transformers(ours, tmp_path)
    theirs, report = ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same(ours, theirs)


def test_their_fixed_positions_are_ours() -> None:
    theirs = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    if not hasattr(theirs, "build_2d_sinusoidal_position_embedding"):
        pytest.skip("this transformers has no function for the positions")
    positions = theirs.build_2d_sinusoidal_position_embedding(8, 8, 96, cls_token=True)
    columns_first = torch.cat([positions[:, 48:], positions[:, :48]], dim=1)  # as their initialisation turns them
    assert torch.allclose(sincos_position_embedding(96, (8, 8))[0], columns_first, atol=1e-6)


def test_their_encoder_alone_and_as_an_encoder(tmp_path: Path) -> None:
    theirs = transformers_mae(True)
    encoder_only: ViTMAEModel = theirs.vit
    encoder_only.save_pretrained(tmp_path / "encoder")
    theirs.save_pretrained(tmp_path / "full")
    images, _ = inputs()
    order = torch.arange(64.0).expand(3, -1)
    encoder_only.config.mask_ratio = 0.0
    with torch.no_grad():
        expected = encoder_only.eval()(images, noise=order).last_hidden_state
        for folder in ("encoder", "full"):
            encoder = build_vision(VisionSpec(str(tmp_path / folder))).eval()
            assert torch.allclose(encoder(images).tokens, expected, atol=TOLERANCE)
    mae = build_mae(VisionSpec(str(tmp_path / "encoder")), DecoderSpec(width=32, depth=1, heads=2))
    assert not mae.decoder_pretrained and mae.decoder.norm.weight.shape == (32,)
