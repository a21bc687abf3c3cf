"""`wlsup spectra` and its callback, on one small run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wlsup.callbacks.spectra import Spectra
from wlsup.cli import main
from wlsup.errors import WlsupError

SMALL = [
    "fit", "-c", "experiments/base.yaml", "-c", "experiments/lora.yaml",
    "--data.pairs", "64", "--data.validation_pairs", "0", "--data.eval_sets", "[]", "--data.batch_size", "32",
    "--trainer.max_epochs", "2", "--model.lr", "1e-2", "--model.targets", "[fc1]",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = ["--spectra.enabled", "true", "--spectra.every_n_epochs", "1", "--spectra.randomize", "false"]
    assert main([*SMALL, "--run_dir", str(folder), *options, "--spectra.layers", "backbone.blocks.*.mlp.fc1*"]) == 0
    return folder


@pytest.fixture(scope="module")
def written(run):
    return json.loads((run / "spectra.json").read_text())


def test_the_callback_writes_before_after_and_along(run, written):
    layers = {layer["name"]: layer for layer in written["layers"]}
    assert len(layers) == 12  # six layers, and the update of each
    layer = layers["mae.encoder.backbone.blocks.0.mlp.fc1"]
    assert layer["before"]["power_law"]
    assert layer["before"]["alpha"] != layer["after"]["alpha"]
    update = layers["mae.encoder.backbone.blocks.0.mlp.fc1.update"]
    assert update["before"] is None
    assert update["rank"] == 8
    assert "too few eigenvalues: 8 of 96" in update["after"]["why"]
    assert [(entry["step"], entry["epoch"]) for entry in written["along"]] == [(2, 1), (4, 2)]
    last = written["along"][-1]["layers"]["mae.encoder.backbone.blocks.0.mlp.fc1"]
    assert last["alpha"] == layer["after"]["alpha"]
    assert (run / "spectra.png").stat().st_size > 1000
    assert len(list((run / "spectra").glob("*.png"))) == 12


def test_the_callback_logs_alpha_layer_by_layer(run):
    board = EventAccumulator(str(run), size_guidance={"scalars": 0})
    board.Reload()
    steps = [event.step for event in board.Scalars("spectra/alpha")]
    assert steps == [0, 2, 4]
    assert len(board.Scalars("spectra_alpha/mae.encoder.backbone.blocks.0.mlp.fc1")) == 3
    assert 0 < board.Scalars("spectra/power_law")[-1].value <= 1


def with_power_law(alpha, seed):
    eigenvalues = (1 - np.random.default_rng(seed).random(100)) ** (-1 / (alpha - 1))
    return torch.from_numpy(eigenvalues).float().sqrt().diag()


def test_the_mean_alpha_is_of_the_same_layers_before_and_now():
    module = torch.nn.Module()
    module.encoder = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(2)))
    module.head = torch.nn.Linear(100, 100)
    first, second, head = (module.encoder[0].weight, module.encoder[1].weight, module.head.weight)
    for weight, alpha in ((first, 3.0), (second, 2.5), (head, 6.0)):
        weight.data = with_power_law(alpha, 0)
    logged = []
    board = SimpleNamespace(log_metrics=lambda metrics, step: logged.append(metrics))
    trainer = SimpleNamespace(
        is_global_zero=True, ckpt_path=None, loggers=[board], global_step=0, current_epoch=0, max_epochs=9
    )
    callback = Spectra(enabled=True, every_n_epochs=1, randomize=False, layers="*")
    callback.on_fit_start(trainer, module)
    callback.on_train_epoch_end(trainer, module)  # nothing has moved
    first.data = with_power_law(2.0, 0)
    second.data.zero_()
    callback.on_train_epoch_end(trainer, module)
    start, same, moved = logged
    layers = [f"spectra_alpha/encoder.{i}" for i in range(2)]
    assert start["spectra/alpha"] == pytest.approx(np.mean([start[layer] for layer in layers]))
    assert "spectra_alpha/head" not in start
    assert same["spectra_alpha/head"] > same["spectra/alpha"]
    for key in ("spectra/alpha", "spectra/alpha_before", "spectra/power_law"):
        assert same[key] == pytest.approx(start[key])
    assert layers[1] not in moved
    assert moved["spectra/alpha"] == moved[layers[0]] != start[layers[0]]
    assert moved["spectra/alpha_before"] == start[layers[0]]
    assert (start["spectra/power_law"], moved["spectra/power_law"]) == (1, 0.5)


def test_the_command_finds_what_the_callback_found(run, written, tmp_path, capsys):
    arguments = ["spectra", str(run), "--layers", "backbone.blocks.*.mlp.fc1*", "--no-randomize", "--no-figures"]
    assert main([*arguments, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "spectra.json").read_text())
    assert found["layers"] == written["layers"]
    assert found["summary"] == written["summary"]
    assert found["along"] == written["along"]  # carried over from the run's own


def test_a_look_at_some_layers_leaves_the_runs_file_as_it_is(run, written, capsys):
    before = {path: path.read_bytes() for path in (run / "spectra.json", *(run / "spectra").glob("*.png"))}
    assert main(["spectra", str(run), "--layers", "backbone.blocks.0.mlp.fc1", "--no-randomize"]) == 0
    assert f"{run / 'spectra.json'} was left as it is" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_checkpoints_that_a_run_kept_are_looked_at_along_training(run, tmp_path, capsys):
    copied = tmp_path / "run"
    (copied / "checkpoints").mkdir(parents=True)
    (copied / "config.yaml").write_text((run / "config.yaml").read_text())
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(checkpoint, copied / "checkpoints" / "last.ckpt")
    early = checkpoint | {"global_step": 1, "epoch": 0}
    early["state_dict"] = {
        name: torch.zeros_like(t) if ".B." in name else t for name, t in checkpoint["state_dict"].items()
    }
    torch.save(early, copied / "checkpoints" / "early.ckpt")
    arguments = [
        "spectra",
        str(copied),
        "--layers",
        "backbone.blocks.0.mlp.fc1",
        "--no-randomize",
        "--no-figures",
        "--json",
    ]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    layer = found["layers"][0]
    assert [entry["step"] for entry in found["along"]] == [1]
    along = found["along"][0]["layers"][layer["name"]]
    assert along["alpha"] == pytest.approx(layer["before"]["alpha"], rel=1e-6)  # B is zero there
    assert along["alpha"] != layer["after"]["alpha"]


def test_any_weights_can_be_looked_at_beside_random_ones(capsys, tmp_path, monkeypatch):
    root = tmp_path
    monkeypatch.chdir(root)
    assert main(["spectra", "mini", "--layers", "blocks.5.*", "--random", "--no-randomize"]) == 0
    said = capsys.readouterr().out
    assert "blocks.5.attn.qkv.q" in said
    assert "alpha random" in said
    assert "random: 0 of 6 layers have a power law" in said
    assert "not looked at" in said
    assert not list(root.iterdir())  # nothing is written that was not asked for


def test_a_language_models_folder_can_be_looked_at(capsys):
    arguments = ["spectra", "wlsup/assets/mini/lm", "--layers", "c_attn.k", "--no-randomize", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"]
    assert all(layer["name"].endswith("attn.c_attn.k") for layer in found["layers"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mini", "--min-evals", "5"], "min_evals must be at least 20"),
        (["mini", "--max-distance", "0"], "max_distance must be in (0, 1)"),
        (["mini", "--layers", "nothing.*"], "No layer matches 'nothing.*'"),
        (["mini", "--sets", "x"], "unrecognized arguments"),
        (["no_such_model_at_all"], "no_such_model_at_all"),
        (["experiments/results"], "experiments/results"),
    ],
)
def test_mistakes_are_one_sentence(arguments, said, capsys):
    assert main(["spectra", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_a_run_without_weights_is_told_apart_from_weights(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    assert main(["spectra", str(tmp_path)]) == 2
    assert "a run that keeps no weights" in capsys.readouterr().err


def test_it_is_off_by_default_and_refuses_a_negative_interval():
    assert not Spectra().enabled
    with pytest.raises(WlsupError, match="every_n_epochs"):
        Spectra(every_n_epochs=-1)


def test_a_resumed_run_takes_the_spectra_of_before_over(run):
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    ours = next(value for key, value in state.items() if key.startswith("Spectra"))
    resumed = Spectra(enabled=True)
    resumed.load_state_dict(ours)
    assert len(resumed.before) == 6
    assert all(len(spectrum.eigenvalues) == 96 for spectrum in resumed.before.values())
