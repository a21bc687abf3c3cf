"""What configuring a run leaves behind: its own folder, and nothing for the next run in the same process."""

import os
from types import SimpleNamespace

import pytest
from jsonargparse import Namespace

from wlsup.cli import configuration, main, training

SMALL = [
    "fit", "-c", "experiments/base.yaml", "-c", "experiments/film.yaml", "--data.pairs", "32",
    "--data.validation_pairs", "16", "--data.batch_size", "16", "--data.eval_sets", "[mini_digits]",
    "--trainer.max_steps", "1",
]  # fmt: skip


def test_two_runs_in_one_process_get_a_folder_each(tmp_path, few_mini_pictures):
    for _ in range(2):
        assert main([*SMALL, "--runs", str(tmp_path)]) == 0
    folders = list((tmp_path / "film" / "mini" / "seed0").iterdir())
    assert len(folders) == 2
    assert all((folder / "results.json").is_file() for folder in folders)
    assert "WLSUP_RUN_DIR" not in os.environ


def test_the_processes_of_one_run_are_told_its_folder(tmp_path, monkeypatch):
    seen = []
    fit = SimpleNamespace(
        run_dir=tmp_path,
        config=Namespace(resume=None),
        resumption=training.Resumption(),
        model=None,
        datamodule=None,
        trainer=SimpleNamespace(
            is_global_zero=False, fit=lambda *args, **kwargs: seen.append(os.environ["WLSUP_RUN_DIR"])
        ),
    )
    training.train(fit)
    assert seen == [str(tmp_path)]
    monkeypatch.setenv("WLSUP_RUN_DIR", "/given/from/outside")
    training.train(fit)
    assert os.environ["WLSUP_RUN_DIR"] == "/given/from/outside"


def test_runs_begun_in_one_second_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(configuration.time, "strftime", lambda _: "20260101-000000")
    config = Namespace(run_dir=None, runs=str(tmp_path), approach="film", preset="mini", seed_everything=3)
    names = [configuration._run_dir(config).name for _ in range(3)]
    assert names == ["20260101-000000", "20260101-000000-1", "20260101-000000-2"]


def test_hyperparameters_are_what_changes_the_training_and_what_tells_runs_apart_comes_first():
    config = Namespace(
        config=["a.yaml"], runs="runs", run_dir=None, resume=None, preset="mini", approach="film", seed_everything=3,
        model=Namespace(betas=(0.9, 0.95), lr=0.1, train_decoder=None, objective=Namespace(mask_ratio=0.75)),
        data=Namespace(batch_size=8, pairs=64, root="/data", num_workers=2, seed=3),
        trainer=Namespace(max_epochs=2, logger=None, enable_progress_bar=False), captioning=Namespace(samples=4),
        optimizer=None, lr_scheduler=None,
    )  # fmt: skip
    told = configuration._hyperparameters(config)
    assert list(told)[:5] == ["approach", "seed", "model.lr", "data.pairs", "trainer.max_epochs"]
    assert told == {
        "approach": "film",
        "seed": 3,
        "model.lr": 0.1,
        "data.pairs": 64,
        "trainer.max_epochs": 2,
        "preset": "mini",
        "model.betas": "(0.9, 0.95)",
        "model.objective.mask_ratio": 0.75,
        "data.batch_size": 8,
    }


@pytest.mark.parametrize("folder", ["/proc/nowhere"])
def test_a_folder_that_cannot_be_made_ends_in_one_message(folder, capsys):
    assert main([*SMALL, "--runs", folder]) == 2
    assert "Cannot make the run's folder" in capsys.readouterr().err


def test_a_run_refused_for_its_captions_leaves_no_folder(tmp_path, capsys):
    captions = tmp_path / "captions.csv"
    captions.write_text("picture,text\na.jpg,a red star\n")
    (tmp_path / "a.jpg").write_bytes(b"")
    options = ["--data.source", "table", "--data.captions", str(captions), "--data.images", str(tmp_path)]
    assert main([*SMALL, *options, "--runs", str(tmp_path / "runs")]) == 2
    assert "column" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert list((tmp_path / "runs" / "film" / "mini" / "seed0").iterdir()) == []


def test_processes_wait_long_enough_for_what_the_first_measures_alone(tmp_path):
    from wlsup.approaches import approach_class
    from wlsup.data.datamodule import CaptionDataModule

    several = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    arguments = [*SMALL[1:], *several, "--run_dir", str(tmp_path / "run")]
    cli = configuration.configure(approach_class("film"), CaptionDataModule, arguments, "fit")
    assert cli.trainer.strategy._timeout == configuration.TOGETHER
    assert configuration.TOGETHER.total_seconds() >= 12 * 3600
