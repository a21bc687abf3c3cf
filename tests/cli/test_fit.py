"""One small run, end to end: the folder, the order of things, the same again from one seed."""

import csv
import json

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wlsup.callbacks.retrieval import Retrieval
from wlsup.cli import main

pytestmark = pytest.mark.usefixtures("few_mini_pictures")
SETS = ["mini_shapes", "mini_digits"]
SMALL = [
    "fit", "-c", "experiments/base.yaml", "-c", "experiments/film.yaml",
    "--data.pairs", "128", "--data.validation_pairs", "64", "--data.eval_sets", "[mini_shapes, mini_digits]",
    "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--model.lr", "1e-2",
]  # fmt: skip


def run_small(folder, *options):
    assert main([*SMALL, "--run_dir", str(folder), *options]) == 0
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_mini_pictures):
    folder = tmp_path_factory.mktemp("run")
    run_small(folder)
    return folder


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def board(run):
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def timeless(results):
    return {key: value for key, value in results.items() if key != "seconds"}


def test_the_folder_holds_what_was_promised(run):
    for name in (
        "config.yaml",
        "plan.json",
        "env.json",
        "manifest.txt",
        "metrics.csv",
        "results.json",
        "cost.json",
        "run.log",
    ):
        assert (run / name).stat().st_size > 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert list(run.glob("events.out.tfevents.*"))
    environment = json.loads((run / "env.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["command"]


def test_results_follow_the_contract(results):
    assert (results["approach"], results["preset"], results["seed"]) == ("film", "mini", 0)
    assert results["steps"] == 4
    assert results["samples_seen"] == 256
    assert 0 < results["parameters"]["trained"] < results["parameters"]["total"]
    assert results["captions"]["source"] == "mini"
    assert results["captions"]["pairs"] == 128
    assert len(results["captions"]["manifest_sha256"]) == 64
    assert list(results["knn"]) == SETS
    for entry in results["knn"].values():
        assert entry["k"] == 20
        assert entry["temperature"] == 0.07
        assert 0 <= entry["pretrained"] <= 1
        assert entry["delta"] == pytest.approx(entry["finetuned"] - entry["pretrained"], abs=1e-9)
        assert entry["ci95"][0] <= entry["delta"] <= entry["ci95"][1]
        assert {"10", "20", "100", "200"} == set(entry["accuracy_by_k"])
    knn = results["knn"]
    assert results["summary"]["in_domain_delta"] == pytest.approx(knn["mini_shapes"]["delta"])
    assert results["summary"]["out_of_domain_delta"] == pytest.approx(knn["mini_digits"]["delta"])
    assert "cosine" in results["protocol"]
    assert results["retrieval"]["pairs"] == 64


def test_the_pretrained_score_comes_first_and_is_the_pretrained_encoders(run, results, board):
    from wlsup.callbacks.knn import evaluate_knn
    from wlsup.data.datamodule import CaptionDataModule
    from wlsup.models.vision import VisionSpec, build_vision

    first = board.Scalars("knn/mini_shapes")[0]
    assert first.step == 0
    difference = board.Scalars("knn_delta/mini_shapes")[0]
    assert (difference.step, difference.value) == (0, 0.0)
    assert first.value == pytest.approx(results["knn"]["mini_shapes"]["pretrained"])
    encoder = build_vision(VisionSpec())
    data = CaptionDataModule(eval_sets=["mini_shapes"])
    data.image_spec = encoder.image_spec
    assert evaluate_knn(encoder, data.eval_datasets()[0]).top1 == results["knn"]["mini_shapes"]["pretrained"]
    with (run / "metrics.csv").open() as file:
        assert next(csv.DictReader(file))["knn/mini_shapes"]


def test_tensorboard_has_all_that_was_promised(board):
    scalars = set(board.Tags()["scalars"])
    for name in SETS:
        assert {f"knn/{name}", f"knn_delta/{name}"} <= scalars
    assert {"train/loss", "train/contrastive", "train/reconstruction", "val/loss"} <= scalars
    assert {"summary/in_domain_delta", "summary/out_of_domain_delta"} <= scalars
    assert "retrieval/image_to_text_R@1" in scalars
    assert any(tag.startswith("lr-") for tag in scalars)
    assert len(board.Images("reconstructions")) == 3
    tensors = set(board.Tags()["tensors"])
    assert "plan/text_summary" in tensors
    assert "k-NN/text_summary" in tensors
    assert "custom_scalars__config__" in tensors
    assert "_hparams_/experiment" in board.summary_metadata


@pytest.mark.slow
def test_the_same_seed_gives_the_same_results_and_another_does_not(results, tmp_path):
    assert timeless(run_small(tmp_path / "again")) == timeless(results)
    other = run_small(tmp_path / "other", "--seed_everything", "1")
    assert other["captions"]["manifest_sha256"] == results["captions"]["manifest_sha256"]
    assert other["retrieval"] != results["retrieval"]


def test_the_runs_own_configuration_runs_it_again(run, results, tmp_path):
    folder = tmp_path / "again"
    assert main(["fit", "-c", str(run / "config.yaml"), "--run_dir", str(folder)]) == 0
    assert timeless(json.loads((folder / "results.json").read_text())) == timeless(results)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["approach"] == "film"


def test_a_resumed_run_keeps_the_pretrained_score_and_counts_on(run, results, tmp_path):
    resumed = run_small(
        tmp_path / "resumed", "--trainer.max_epochs", "3", "--resume", str(run / "checkpoints" / "last.ckpt")
    )
    assert resumed["steps"] == 6
    assert resumed["samples_seen"] == 384
    for name in SETS:
        assert resumed["knn"][name]["pretrained"] == results["knn"][name]["pretrained"]


def test_a_run_cut_off_and_resumed_ends_as_the_unbroken_one(results, tmp_path, monkeypatch):
    def cut(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Retrieval, "on_train_epoch_start", cut)
        with pytest.raises(RuntimeError, match="cut off"):
            main([*SMALL, "--run_dir", str(tmp_path / "cut")])
    assert not (tmp_path / "cut" / "results.json").exists()
    resumed = run_small(tmp_path / "resumed", "--resume", str(tmp_path / "cut" / "checkpoints" / "last.ckpt"))
    assert timeless(resumed) == timeless(results)


def test_knn_of_the_run_gives_its_own_figures(run, results, capsys):
    assert main(["knn", str(run), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["knn"]
    for name in SETS:
        assert scored[name]["accuracy"]["20"] == results["knn"][name]["finetuned"]
