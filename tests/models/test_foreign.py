"""Encoders that wlsup only scores: any of timm's, by name or folder, and exported programs; and what goes wrong."""

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from wlsup.batch import ImageSpec
from wlsup.errors import WlsupError
from wlsup.files import write_json
from wlsup.models.foreign import ForeignEncoder, open_encoder
from wlsup.models.vision import VisionEncoder, VisionSpec, build_vision


@pytest.fixture
def resnet(tmp_path):
    """A folder as timm writes it for the hub."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False).eval()
    timm.models.save_for_hf(model, tmp_path / "resnet", safe_serialization="both")
    return model, tmp_path / "resnet"


@torch.no_grad()
def test_a_folder_of_timms_gives_timms_own_features(resnet):
    model, folder = resnet
    encoder = open_encoder(str(folder)).eval()
    images = torch.randn(2, 3, 96, 96)
    assert isinstance(encoder, ForeignEncoder)
    assert torch.equal(encoder.features(images), model.forward_head(model.forward_features(images), pre_logits=True))
    config = resolve_model_data_config(model)
    assert encoder.image_spec.mean == config["mean"]
    assert encoder.image_spec.size == config["input_size"][-1]
    assert encoder.image_spec.interpolation == config["interpolation"]


@torch.no_grad()
def test_a_name_of_timms_is_read_from_the_hubs_files(resnet, monkeypatch):
    model, folder = resnet
    asked = []
    monkeypatch.setattr("wlsup.models.sources.hub_folder", lambda name: asked.append(name) or folder)
    encoder = open_encoder("resnet10t.c3_in1k").eval()
    images = torch.randn(2, 3, 64, 64)
    assert asked == ["timm/resnet10t.c3_in1k"]
    assert torch.equal(encoder.features(images), model.forward_head(model.forward_features(images), pre_logits=True))


@torch.no_grad()
def test_random_weights_are_not_the_folders(resnet):
    model, folder = resnet
    images = torch.randn(2, 3, 64, 64)
    found = open_encoder(str(folder), pretrained=False).eval().features(images)
    assert not torch.allclose(found, model.forward_head(model.forward_features(images), pre_logits=True))


def test_a_vit_is_the_encoder_that_runs_train():
    encoder = open_encoder("mini")
    assert isinstance(encoder, VisionEncoder)
    assert encoder.base_sha256 == build_vision(VisionSpec()).base_sha256


@torch.no_grad()
def test_a_program_computes_what_was_exported(tmp_path):
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(head, (torch.zeros(4, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "encoder.pt2")
    spec = {"size": 8, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize": 9}
    write_json(tmp_path / "config.json", {"format": "wlsup-program", "image": spec})
    encoder = open_encoder(str(tmp_path)).eval()  # as scoring does; a program itself has no modes
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(encoder.features(images), head(images))
    assert encoder.image_spec == ImageSpec(8, (0.5,) * 3, (0.25,) * 3, "bilinear", 9)
    with pytest.raises(WlsupError, match="knows no random weights"):
        open_encoder(str(tmp_path), pretrained=False)
    (tmp_path / "encoder.pt2").write_bytes(b"half")
    with pytest.raises(WlsupError, match="cannot be read"):
        open_encoder(str(tmp_path))


def test_a_damaged_folder_of_timms_is_told_in_one_sentence(resnet):
    _, folder = resnet
    for file in folder.glob("*model*"):
        file.write_bytes(b"")
    with pytest.raises(WlsupError, match="timm could not load"):
        open_encoder(str(folder))


def test_what_is_no_vit_is_refused_for_training_with_names_that_are_accepted():
    with pytest.raises(WlsupError, match="not one of the ViTs that wlsup teaches") as caught:
        build_vision(VisionSpec(weights="convit_tiny.fb_in1k", pretrained=False))
    assert "`wlsup knn` and `wlsup evaluate` score it" in str(caught.value)
    assert "convit" not in str(caught.value).partition("such as")[2]
