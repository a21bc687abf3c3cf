"""Wrong input ends in one message with the valid choices, and leaves nothing behind."""

import json

import pytest
import torch

from wlsup.checkpoint_file import read_checkpoint
from wlsup.cli import main
from wlsup.cli.configuration import build_model
from wlsup.errors import WlsupError

BASE = ["fit", "-c", "experiments/base.yaml", "-c", "experiments/film.yaml"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.embeding_width", "3"], "Did you mean 'model.embedding_width'?"),
        (["--trainer.max_epoch", "3"], "Did you mean 'trainer.max_epochs'?"),
        (["--model.lr", "fast"], "model.lr cannot be 'fast'. Allowed: float"),
        (["--model.objective.contrastive", "triplet"], "Allowed: infonce, siglip"),
        (["--model.objective.mask_ratio", "1.5"], "mask_ratio must be in [0, 1)"),
        (["stray"], "Unexpected argument 'stray'"),
        (["--data.source", "cocoa"], "Unknown"),
        (["--data.eval_sets", "[mini_shape]"], "mini_shapes"),
        (["--data.source", "table"], "captions"),
        (["--data.source", "table", "--data.captions", "nowhere.csv", "--data.images", "."], "nowhere.csv"),
        (["--model.encoder.weights", "/nowhere/model.safetensors"], "/nowhere/model.safetensors"),
        (["--model.text.weights", "/nowhere/text"], "/nowhere/text"),
        (["--resume", "/nowhere/last.ckpt"], "No checkpoint /nowhere/last.ckpt"),
    ],
)
def test_one_message_no_traceback_no_results(options, said, capsys, tmp_path):
    code = main([*BASE, "--runs", str(tmp_path), "--data.pairs", "64", *options])
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("model:\n  encodr: {weights: x}\n", "Did you mean 'model.encoder.weights'?"),
        ("modl:\n  lr: 1.0\n", "Unknown key 'modl.lr'"),
    ],
)
def test_a_mistyped_key_in_a_recipe(recipe, said, capsys, tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(recipe)
    assert main([*BASE, "-c", str(path), "--runs", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


class Payload:
    def __reduce__(self):
        return (open, ("/tmp/wlsup-payload-ran", "w"))


def test_a_checkpoint_with_code_damaged_or_foreign_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "evil": Payload()}, path)
    with pytest.raises(WlsupError, match="holds code"):
        read_checkpoint(path)
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(WlsupError, match="damaged"):
        read_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(WlsupError, match="no state_dict"):
        read_checkpoint(path)


def test_inspect_shows_the_plan(capsys):
    assert main(["inspect", "film", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    rules = {row["pattern"]: row["trains"] for row in shown["rules"]}
    assert rules["adapter.*"]
    assert rules["mae.*"] is False
    assert main(["inspect", "film"]) == 0
    assert "adapter.*" in capsys.readouterr().out


def test_inspect_looks_at_batches_where_they_decide_what_trains(capsys):
    arguments = ["--model.criterion", "rgn", "--model.k", "2", "--data.pairs", "64", "--data.batch_size", "16"]
    assert main(["inspect", "selective_k", *arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert 0 < shown["trained"] < shown["total"] / 2
    assert any(row["trains"] and row["pattern"].startswith("mae.encoder") for row in shown["rules"])


def test_overlays_override_and_options_override_overlays(tmp_path):
    from wlsup.approaches import approach_class

    overlay = tmp_path / "mine.yaml"
    overlay.write_text("model:\n  lr: 0.5\n  embedding_width: 8\n")
    arguments = ["-c", "experiments/base.yaml", "-c", "experiments/film.yaml", "-c", str(overlay), "--model.lr", "0.25"]
    model = build_model(approach_class("film"), arguments, "inspect")
    assert model.lr == 0.25
    assert model.adapter.generators[0].in_features == 8
