"""What is written loads in timm and in torch, and computes what the encoder did: each way, in each pooling."""

import json

import pytest
import timm
import torch
from timm.data import resolve_data_config

from wlsup.approaches import approach_class
from wlsup.approaches.plain import encoder_adapters
from wlsup.errors import WlsupError
from wlsup.models import export
from wlsup.models.backbones import Architecture, create_backbone
from wlsup.models.export import TOLERANCE, timm_config, write_program, write_timm
from wlsup.models.vision import VisionEncoder, VisionSpec, build_vision

SMALL = "vit(img_size=32,patch_size=8,embed_dim=32,depth=2,num_heads=2"


def encoder(pooling="auto", architecture=SMALL + ")"):
    torch.manual_seed(0)
    built = build_vision(VisionSpec(pretrained=False, architecture=architecture, pooling=pooling)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return built


CASES = [
    ("auto", SMALL + ")"),
    ("cls", SMALL + ")"),
    ("mean", SMALL + ")"),
    ("mean", SMALL + ",class_token=False,global_pool='avg')"),
    ("auto", SMALL + ",global_pool='avg')"),
    ("cls", SMALL + ",global_pool='avg')"),
    ("auto", SMALL + ",global_pool='')"),
    ("mean", SMALL + ",reg_tokens=2,init_values=0.1,no_embed_class=True)"),
    ("mean", "vit_tiny_patch16_224"),
    ("auto", "test_eva"),
]


@pytest.mark.parametrize(("pooling", "architecture"), CASES)
def test_timm_alone_gives_the_same_features(pooling, architecture, tmp_path):
    if "(" not in architecture and architecture not in timm.list_models():
        pytest.skip(f"this timm has no {architecture}")
    built = encoder(pooling, architecture)
    assert write_timm(built, tmp_path) <= TOLERANCE
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, built.image_spec.size, built.image_spec.size)
    with torch.no_grad():
        assert torch.allclose(loaded(images), built.features(images), atol=1e-6)
        again = build_vision(VisionSpec(weights=str(tmp_path))).eval()
        assert torch.allclose(again.features(images), built.features(images), atol=1e-6)
    assert again.image_spec == built.image_spec


def test_timm_prepares_pictures_as_the_encoder_wants_them(tmp_path):
    built = build_vision(VisionSpec())
    write_timm(built.eval(), tmp_path)
    data = resolve_data_config({}, model=timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    spec = built.image_spec
    assert tuple(data["input_size"]) == (3, spec.size, spec.size)
    assert (tuple(data["mean"]), tuple(data["std"])) == (spec.mean, spec.std)
    assert data["interpolation"] == spec.interpolation
    assert int(data["input_size"][-1] / data["crop_pct"]) == spec.resize


def test_what_timm_has_no_name_for_is_not_written(tmp_path, monkeypatch):
    shape = Architecture("vit", {"norm_eps": 1e-3, "depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32})
    odd = VisionEncoder(create_backbone(shape), encoder().image_spec, architecture=shape)
    assert timm_config(odd) is None
    assert write_timm(odd, tmp_path) is None
    monkeypatch.setattr(export, "timm_config", lambda built: {**timm_config(built), "model_args": {"depth": 3}})
    assert write_timm(encoder(), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


SLOW = ("asymmetric_attention", "co_attention", "lst")
PROGRAMS = ["bottleneck", "merged_attention", "token_replay"]
PROGRAMS += [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_has_the_adapter_at_work_at_any_batch_size(name, tmp_path):
    torch.manual_seed(0)
    approach = approach_class(name)()
    approach.setup("fit")
    with torch.no_grad():
        for parameter in approach.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    approach.eval()
    assert write_program(approach.encoder, encoder_adapters(approach), tmp_path) <= TOLERANCE
    loaded = torch.export.load(tmp_path / "encoder.pt2")
    kept = sum(tensor.numel() for tensor in loaded.state_dict.values())
    own = sum(p.numel() for module in (approach.encoder, *encoder_adapters(approach)) for p in module.parameters())
    assert kept == own  # each tensor once, and no text encoder
    with torch.no_grad():
        for count in (1, 2, 7):
            images = torch.randn(count, 3, 64, 64)
            assert torch.allclose(loaded.module()(images), approach.features(images), atol=1e-5)


def test_a_program_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "difference_of", lambda *both: 1e-3)
    with pytest.raises(WlsupError, match="differ from the encoder's by 1.0e-03"):
        write_program(encoder(), [], tmp_path)


def test_the_configuration_is_timms_own_form(tmp_path):
    write_timm(encoder("mean"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["global_pool"] == "avg"
    assert config["num_features"] == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
