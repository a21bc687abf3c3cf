"""WiSE-FT as a callback and as a command: the same curve, the run's own figures at its ends, and mistakes."""

import csv
import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wlsup.cli import main

from .conftest import fit

pytestmark = pytest.mark.usefixtures("few_pictures")


@pytest.fixture(scope="module")
def curve(curve_run):
    return json.loads((curve_run / "wise_ft.json").read_text())


def test_the_curve_ends_at_the_runs_own_figures(curve_run, curve):
    results = json.loads((curve_run / "results.json").read_text())
    assert curve["alphas"] == [0, 0.5, 1]
    for name, entry in results["knn"].items():
        mine = curve["sets"][name]
        assert mine["domain"] == entry["domain"]
        assert (mine["accuracy"][0], mine["accuracy"][-1]) == (entry["pretrained"], entry["finetuned"])
        assert mine["delta"][-1] == pytest.approx(entry["delta"])
    assert curve["validation"]["sets"] == ["mini_shapes"]
    assert curve["start"]["checked"]
    for ending in ("png", "svg"):
        assert (curve_run / f"wise_ft.{ending}").stat().st_size > 1000


def test_the_vote_is_the_runs_own(tmp_path):
    options = ["--wise_ft.enabled", "true", "--wise_ft.alphas", "[0, 1]", "--knn.k", "10", "--knn.temperature", "0.1"]
    fit("film", tmp_path, *options)
    results = json.loads((tmp_path / "results.json").read_text())
    assert main(["wise-ft", str(tmp_path), "--alphas", "0,1", "--out", str(tmp_path / "command")]) == 0
    for folder in (tmp_path, tmp_path / "command"):
        curve = json.loads((folder / "wise_ft.json").read_text())
        assert "knn-dino:v1 cosine T=0.1 k=10 weighted" in curve["protocol"]
        for name, entry in results["knn"].items():
            assert curve["sets"][name]["accuracy"] == [entry["pretrained"], entry["finetuned"]]


def test_tensorboard_shows_the_curve_the_picture_and_the_choice(curve_run, curve):
    board = EventAccumulator(str(curve_run), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    board.Reload()
    for name, entry in curve["sets"].items():
        points = board.Scalars(f"wise_ft/{name}")
        assert [point.step for point in points] == [0, 50, 100]
        assert [point.value for point in points] == pytest.approx(entry["accuracy"])
    assert board.Scalars("wise_ft/chosen_alpha")[0].value == curve["chosen_alpha"]
    assert len(board.Images("wise_ft")) == 1
    assert "wise_ft/text_summary" in board.Tags()["tensors"]
    with (curve_run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["wise_ft/chosen_alpha"] for row in rows if row["wise_ft/chosen_alpha"]] != []
    assert "wise_ft/mini_shapes" not in rows[0]


def test_the_command_gives_what_the_callback_gave(curve_run, curve, tmp_path, capsys):
    arguments = ["wise-ft", str(curve_run), "--alphas", "1,0.5,0", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "out" / "wise_ft.json").read_text())
    for name, entry in curve["sets"].items():
        for key in ("accuracy", "delta", "train", "test", "k"):
            assert said["sets"][name][key] == entry[key]
    assert said["validation"]["accuracy"] == curve["validation"]["accuracy"]
    assert (said["chosen_alpha"], said["start"]) == (curve["chosen_alpha"], curve["start"])
    assert json.loads((curve_run / "wise_ft.json").read_text()) == curve
    assert main([*arguments, "--sets", "mini_digits"]) == 0
    shown = capsys.readouterr().out
    assert "WiSE-FT: film, mini, seed 0" in shown
    assert "mini_digits (out)" in shown
    assert "mini_shapes" not in shown
    assert "no in-domain set" in shown


def test_a_probe_has_columns_of_its_own(curve_run, tmp_path, capsys):
    arguments = ["wise-ft", str(curve_run), "--alphas", "0,1", "--probe", "--out", str(tmp_path)]
    assert main(arguments) == 0
    head, _, first, last = capsys.readouterr().out.splitlines()[1:5]
    sets = json.loads((tmp_path / "wise_ft.json").read_text())["sets"]
    for name, domain in (("mini_shapes", "in"), ("mini_digits", "out")):
        assert f"{name} ({domain}), probe" in head
        (start, end), (_, (low, high)) = sets[name]["probe"], sets[name]["probe_ci95"]
        assert f"{100 * start:.1f} +-" in first
        assert f"{100 * end:.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" in last
    assert (first.count("+-"), last.count("[")) == (5, 5)


@pytest.mark.parametrize("choice", [["--sets", "mini_digits"], ["--alphas", "0,1"]])
def test_a_look_at_a_part_leaves_the_runs_curve_as_it_is(choice, curve_run, capsys):
    files = [curve_run / f"wise_ft.{ending}" for ending in ("json", "png", "svg")]
    before = [file.read_bytes() for file in files]
    assert main(["wise-ft", str(curve_run), "--alphas", "0,0.5,1", *choice]) == 0
    captured = capsys.readouterr()
    assert "mini_digits (out)" in captured.out
    assert f"{files[0]} was left as it is, since it also has the {choice[0][2:]}" in captured.err
    assert "--out DIR" in captured.err
    assert "wrote" not in captured.err
    assert [file.read_bytes() for file in files] == before


def test_a_look_at_a_part_is_kept_where_it_loses_nothing(curve_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(curve_run, run)
    (run / "wise_ft.json").unlink()
    assert main(["wise-ft", str(run), "--sets", "mini_digits", "--alphas", "0,1"]) == 0
    assert list(json.loads((run / "wise_ft.json").read_text())["sets"]) == ["mini_digits"]
    assert main(["wise-ft", str(run), "--alphas", "0,0.5,1"]) == 0
    found = json.loads((run / "wise_ft.json").read_text())
    assert (found["alphas"], set(found["sets"])) == ([0, 0.5, 1], {"mini_shapes", "mini_digits"})
    assert "was left" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["/nowhere"], "No finished run in /nowhere: it has no config.yaml"),
        (["{run}", "--alphas", "0.5"], "both ends"),
        (["{run}", "--alphas", "0,x,1"], "--alphas '0,x,1': give numbers"),
        (["{run}", "--sets", "mini_shape"], "Did you mean 'mini_shapes'?"),
        (["{run}", "--batch-size", "0"], "--batch-size 0"),
        (["{run}", "--alpha", "0,1"], "`wlsup wise-ft --help`"),
        (["{other}"], "is not the one that this run was trained from"),
    ],
)
def test_mistakes_are_one_message(options, said, curve_run, tmp_path, capsys):
    other = tmp_path / "other"
    if "{other}" in options:
        shutil.copytree(curve_run, other)
        checkpoint = torch.load(other / "checkpoints" / "last.ckpt", weights_only=True)
        checkpoint["wlsup"]["start_sha256"] = "0" * 64
        torch.save(checkpoint, other / "checkpoints" / "last.ckpt")
    before = (curve_run / "wise_ft.json").read_bytes()
    assert main(["wise-ft", *(option.format(run=curve_run, other=other) for option in options)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    assert (curve_run / "wise_ft.json").read_bytes() == before


def test_a_run_that_leaves_its_encoder_alone_is_refused_before_it_begins(tmp_path, capsys):
    arguments = ["fit", "-c", "experiments/base.yaml", "-c", "experiments/lit.yaml", "--data.eval_sets", "[]"]
    arguments += ["--data.pairs", "32", "--run_dir", str(tmp_path / "lit"), "--wise_ft.enabled", "true"]
    assert main(arguments) == 2
    assert "'lit' leaves the encoder as it was pretrained" in capsys.readouterr().err
    assert not (tmp_path / "lit").exists()


def test_a_resumed_run_has_the_first_start_and_another_seed_is_refused(curve_run, tmp_path, capsys):
    resume = ["fit", "-c", str(curve_run / "config.yaml"), "--trainer.max_epochs", "2"]
    resume += ["--resume", str(curve_run / "checkpoints" / "last.ckpt")]
    assert main([*resume, "--run_dir", str(tmp_path / "other"), "--seed_everything", "1"]) == 2
    assert "is not the one that this run was trained from" in capsys.readouterr().err
    assert main([*resume, "--run_dir", str(tmp_path / "same")]) == 0
    mine = json.loads((tmp_path / "same" / "wise_ft.json").read_text())
    first = json.loads((curve_run / "wise_ft.json").read_text())
    assert mine["start"] == first["start"]
    for name, entry in mine["sets"].items():
        assert entry["accuracy"][0] == first["sets"][name]["accuracy"][0]
