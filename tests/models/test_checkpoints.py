"""What loading promises: every published layout gives the same features, and every bad file one clear error."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from wlsup.errors import WlsupError
from wlsup.models.saving import save_vision
from wlsup.models.vision import VisionSpec, build_vision

TINY = "vit(img_size=32,patch_size=8,embed_dim=192,depth=2,num_heads=3)"


@pytest.fixture
def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0).eval()
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def layouts(state: dict) -> dict[str, object]:
    head = {"head.mlp.0.weight": torch.zeros(3, 192), "head.last_layer.weight_g": torch.zeros(3, 1)}
    return {
        "flat": state,
        "fair mae": {"model": state, "epoch": 1, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}},
        "dino": {
            "teacher": prefixed(state, "backbone.") | head,
            "student": prefixed({name: torch.zeros_like(tensor) for name, tensor in state.items()}, "module.backbone."),
            "epoch": 3,
        },
        "student and teacher side by side": {
            **prefixed({name: torch.zeros_like(tensor) for name, tensor in state.items()}, "net."),
            **prefixed(state, "teacher.backbone."),
            **prefixed({name: torch.zeros_like(tensor) for name, tensor in state.items()}, "momentum.net.backbone."),
        },
        "data parallel": prefixed(state, "module."),
        "lightning": {"state_dict": prefixed(state, "model.backbone.") | {"loss.weight": torch.zeros(3)}},
        "with a classifier": state | {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)},
    }


FLAT = ("flat", "data parallel", "with a classifier")


@pytest.mark.parametrize(
    ("layout", "suffix"), [(name, ".pth") for name in layouts({})] + [(name, ".safetensors") for name in FLAT]
)
def test_every_layout_gives_the_same_features(backbone, images, tmp_path: Path, layout: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_file)(layouts(backbone.state_dict())[layout], path)
    encoder = build_vision(VisionSpec(str(path))).eval()
    assert torch.equal(encoder.features(images), backbone(images))
    assert encoder.base_id == f"file:weights{suffix}"


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k", None])
def test_a_local_file_takes_a_timm_architecture_and_another_size(tmp_path: Path, architecture: str | None) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    encoder = build_vision(VisionSpec(str(tmp_path / "tiny.safetensors"), architecture, 96)).eval()
    images = torch.randn(2, 3, 96, 96)
    assert encoder.image_spec.size == 96 and encoder.backbone.pos_embed.shape == (1, 37, 192)
    with torch.no_grad():
        assert torch.allclose(encoder.features(images), model(images), atol=1e-5)


@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
@pytest.mark.parametrize("bias", [True, False])
def test_hugging_face_vit_folder_gives_the_same_features(tmp_path: Path, images, kind: type, bias: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    model = kind(ViTConfig(**sizes, image_size=32, patch_size=8, qkv_bias=bias)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "resample": 2})
    )
    encoder = build_vision(VisionSpec(str(tmp_path))).eval()
    body = model.vit if kind is ViTForImageClassification else model
    with torch.no_grad():
        expected = body(images).last_hidden_state
        assert torch.allclose(encoder(images).tokens, expected, atol=1e-5)
    spec = encoder.image_spec
    assert (spec.size, spec.mean, spec.std, spec.interpolation) == (32, (0.5,) * 3, (0.25,) * 3, "bilinear")


def test_hugging_face_names_of_memory_load_as_those_of_disk(tmp_path: Path, images) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6)).eval()
    torch.save(model.state_dict(), tmp_path / "vit.bin")
    encoder = build_vision(VisionSpec(str(tmp_path / "vit.bin"))).eval()
    with torch.no_grad():
        assert torch.allclose(encoder(images).tokens, model(images).last_hidden_state, atol=1e-5)


def test_timm_hub_folder_says_its_architecture_and_that_it_is_dino(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"depth": 1},
        "pretrained_cfg": {"tag": "dino", "input_size": [3, 224, 224], "crop_pct": 0.9, "mean": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = build_vision(VisionSpec(str(tmp_path)))
    assert encoder.image_spec.resize == 256 and encoder.image_spec.mean == (0.1, 0.2, 0.3)
    config["pretrained_cfg"]["tag"] = "mae"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert build_vision(VisionSpec(str(tmp_path))).image_spec.resize == 248


def test_a_timm_name_and_a_hub_id_load_from_the_local_cache_without_a_network(tmp_path: Path, monkeypatch) -> None:
    revision = "0" * 40
    repository = tmp_path / "models--timm--vit_tiny_patch16_224.augreg_in21k"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=21843)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 21843}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for weights in ("vit_tiny_patch16_224.augreg_in21k", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"):
        encoder = build_vision(VisionSpec(weights))
        assert torch.equal(encoder.backbone.pos_embed, model.pos_embed)
    with pytest.raises(WlsupError, match=r"timm/vit_base_patch16_224\.dino.*" + str(tmp_path) + ".*hf download"):
        build_vision(VisionSpec("vit_base_patch16_224.dino"))
    with pytest.raises(WlsupError, match="facebook/vit-mae-base"):
        build_vision(VisionSpec("hf-hub:facebook/vit-mae-base"))


def test_own_folder_round_trips_bit_for_bit_and_half_precision_loads_as_fp32(tmp_path: Path, images) -> None:
    encoder = build_vision(VisionSpec(architecture=TINY, pretrained=False, pooling="mean", image_size=64)).eval()
    save_vision(encoder, tmp_path / "own")
    again = build_vision(VisionSpec(str(tmp_path / "own"))).eval()
    assert (
        again.base_sha256 == encoder.base_sha256 and again.pooling == "mean" and again.image_spec == encoder.image_spec
    )
    assert torch.equal(again.features(images), encoder.features(images))
    save_vision(encoder, tmp_path / "half", dtype=torch.float16)
    half = build_vision(VisionSpec(str(tmp_path / "half"))).eval()
    assert all(tensor.dtype == torch.float32 for tensor in half.state_dict().values())
    assert torch.allclose(half.features(images), encoder.features(images), atol=1e-2)
    assert sorted(path.name for path in (tmp_path / "half").iterdir()) == ["config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in (tmp_path / "half").iterdir()}) == 1  # not readable by the owner only


def test_own_folder_with_one_changed_value_is_refused(tmp_path: Path) -> None:
    save_vision(build_vision(VisionSpec(architecture=TINY, pretrained=False)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.backbone.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WlsupError, match="damaged"):
        build_vision(VisionSpec(str(tmp_path)))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 0.3, 0.99])
def test_truncated_files_are_said_to_be(backbone, tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"cut{suffix}"
    (torch.save if suffix == ".pth" else save_file)(backbone.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(WlsupError, match="Copy it again"):
        build_vision(VisionSpec(str(path)))


class Payload:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(Payload.path),))


def test_a_pickles_payload_is_refused_and_does_not_run(backbone, tmp_path: Path) -> None:
    Payload.path = str(tmp_path / "ran")
    torch.save({"model": backbone.state_dict(), "extra": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "older.pth").write_bytes(pickle.dumps({"model": Payload()}))
    for name in ("evil.pth", "older.pth"):
        with pytest.raises(WlsupError, match="more than tensors"):
            build_vision(VisionSpec(str(tmp_path / name)))
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_architecture_name_a_few_keys(backbone, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(backbone.state_dict(), path)
    with pytest.raises(WlsupError, match=r"lacks .*blocks\.2\.norm1\.weight.*architecture"):
        build_vision(VisionSpec(str(path), "vit(img_size=32,patch_size=8,embed_dim=192,depth=3,num_heads=3)"))
    with pytest.raises(WlsupError, match=r"unknown tensors .*blocks\.1\."):
        build_vision(VisionSpec(str(path), "vit(img_size=32,patch_size=8,embed_dim=192,depth=1,num_heads=3)"))
    with pytest.raises(WlsupError, match=r"another shape .*\(384,"):
        build_vision(VisionSpec(str(path), "vit(img_size=32,patch_size=8,embed_dim=384,depth=2,num_heads=3)"))


def test_what_is_not_a_vit_is_said_to_be(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}, tmp_path / "resnet.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    torch.save({}, tmp_path / "bert" / "pytorch_model.bin")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    cases = {
        "resnet.pth": "not a ViT checkpoint.*conv1.weight",
        "list.pth": "holds list",
        "pointer.safetensors": "git lfs pull",
        "empty": "no weight file",
        "bert": "'bert'",
        "broken": "not readable as JSON",
    }
    for name, message in cases.items():
        with pytest.raises(WlsupError, match=message):
            build_vision(VisionSpec(str(tmp_path / name)))


def test_an_unusual_width_asks_for_the_number_of_heads(tmp_path: Path) -> None:
    save_file(
        build_vision(VisionSpec(architecture=TINY.replace("192", "60"), pretrained=False)).backbone.state_dict(),
        tmp_path / "odd.safetensors",
    )
    with pytest.raises(WlsupError, match="num_heads="):
        build_vision(VisionSpec(str(tmp_path / "odd.safetensors")))
    build_vision(VisionSpec(str(tmp_path / "odd.safetensors"), TINY.replace("192", "60")))


def test_values_that_are_not_finite_are_refused(backbone, tmp_path: Path) -> None:
    state = backbone.state_dict()
    state["norm.weight"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(WlsupError, match="damaged.*norm.weight"):
        build_vision(VisionSpec(str(tmp_path / "nan.pth")))


def test_a_fine_tuned_mae_with_its_own_norm_after_pooling_pools_the_mean(tmp_path: Path, images) -> None:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
    model = VisionTransformer(**shape, num_classes=10, global_pool="avg").eval()
    torch.save({"model": model.state_dict()}, tmp_path / "finetuned.pth")
    encoder = build_vision(VisionSpec(str(tmp_path / "finetuned.pth"))).eval()
    assert torch.allclose(encoder.features(images), model.forward_head(model.forward_features(images), pre_logits=True))


def test_pretrained_off_keeps_a_folders_architecture_with_random_weights(tmp_path: Path) -> None:
    encoder = build_vision(VisionSpec(architecture=TINY, pretrained=False))
    save_vision(encoder, tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the configuration is enough
    other = build_vision(VisionSpec(str(tmp_path), pretrained=False))
    assert other.state_dict().keys() == encoder.state_dict().keys() and other.base_sha256 != encoder.base_sha256


def test_a_sharded_folder_loads(backbone, images, tmp_path: Path) -> None:
    state = backbone.state_dict()
    names = sorted(state)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(build_vision(VisionSpec(str(tmp_path))).eval().features(images), backbone(images))
