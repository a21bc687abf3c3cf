"""`wlsup pretrain`: pictures in, a model folder out that `fit` starts from."""

import json

import pytest
import torch
from PIL import Image

from wlsup.cli import main
from wlsup.models.mae import DecoderSpec, build_mae
from wlsup.models.vision import VisionSpec, build_vision

TINY = [
    "pretrain", "--model.encoder.architecture", "vit(img_size=32,patch_size=8,embed_dim=48,depth=2,num_heads=3)",
    "--model.decoder.width", "32", "--model.decoder.depth", "1", "--model.decoder.heads", "2",
    "--data.batch_size", "16", "--data.pictures", "64", "--model.lr", "1e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    assert main([*TINY, "--run_dir", str(folder), "--trainer.max_epochs", "2"]) == 0
    return folder


def test_encoder_and_decoder_are_saved_and_load(run):
    mae = build_mae(VisionSpec(weights=str(run / "model")), DecoderSpec())
    assert mae.decoder_pretrained
    assert (mae.encoder.embed_dim, mae.decoder_spec.width) == (48, 32)
    images = torch.randn(2, 3, 32, 32)
    alone = build_vision(VisionSpec(weights=str(run / "model"))).eval()
    assert torch.equal(alone.features(images), mae.encoder.eval().features(images))


def test_the_saved_encoder_is_the_trained_one(run):
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    saved = build_mae(VisionSpec(weights=str(run / "model"))).state_dict()
    assert checkpoint
    for name, tensor in checkpoint.items():
        assert torch.equal(saved[name.removeprefix("mae.")], tensor), name


def test_the_run_folder_and_no_knn(run):
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 8
    assert results["samples_seen"] == 128
    assert results["knn"] == {}


def test_a_resumed_run_goes_on_counting(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*TINY, "--run_dir", str(first), "--trainer.max_epochs", "1"]) == 0
    checkpoint = first / "checkpoints" / "last.ckpt"
    assert main([*TINY, "--run_dir", str(second), "--trainer.max_epochs", "2", "--resume", str(checkpoint)]) == 0
    assert json.loads((second / "results.json").read_text())["samples_seen"] == 128


def test_fit_starts_from_it(run, tmp_path):
    options = [
        "fit", "-c", "experiments/base.yaml", "-c", "experiments/film.yaml", "--run_dir", str(tmp_path / "fit"),
        "--model.encoder.weights", str(run / "model"), "--data.pairs", "64", "--data.validation_pairs", "32",
        "--data.eval_sets", "[mini_digits]", "--trainer.max_epochs", "1", "--data.batch_size", "32",
    ]  # fmt: skip
    assert main(options) == 0
    results = json.loads((tmp_path / "fit" / "results.json").read_text())
    assert results["knn"]["mini_digits"]["test"] > 0


def test_pictures_of_several_places(tmp_path):
    places = [tmp_path / "one", tmp_path / "two"]
    for hue, place in enumerate(places):
        place.mkdir()
        for number in range(20):
            Image.new("RGB", (40, 36), (12 * number, 90 * hue, 60)).save(place / f"{number}.png")
    options = ["--data.images", json.dumps([str(place) for place in places]), "--data.pictures", "null"]
    run = ["--run_dir", str(tmp_path / "run"), "--trainer.max_epochs", "1", "--data.validation_pictures", "8"]
    assert main([*TINY, *options, *run]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["captions"]["pairs"] == 32
