"""What the study of the cure promises: its files agree, over enough seeds, and it runs."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("reprogrammer_cure", ROOT / "experiments" / "reprogrammer_cure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_runs_and_each_arm_has_five_seeds(study):
    record = json.loads((RESULTS / "reprogrammer_cure.json").read_text())
    for arm in study.ARMS:
        assert len({run["seed"] for run in record["runs"] if run["arm"] == arm}) >= 5
    assert json.loads(json.dumps(study.summary(record["runs"]))) == record["summary"]
    assert (RESULTS / "reprogrammer_cure.md").read_text() == study.markdown(record)
    assert (RESULTS / "reprogrammer_cure.png").stat().st_size > 10_000


def test_shut_gates_are_the_cure_that_it_shows(study):
    rows = json.loads((RESULTS / "reprogrammer_cure.json").read_text())["summary"]
    mean, half = rows["shut gates"]["against_none"]
    assert mean + half < 0
    page = (ROOT / "docs" / "approaches" / "cross_modal_reprogramming.md").read_text()
    assert f"{-mean:.3f} ± {half:.3f} lower" in page
    mean, half = rows["warm-up"]["against_none"]
    assert f"{mean:.3f} ± {half:.3f} higher" in page


def test_an_interval_is_students(study):
    mean, half = study.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3.0, pytest.approx(2.776 * math.sqrt(2.5 / 5)))


def test_adapters_start_as_strong_as_what_they_are_added_to_or_shut(study):
    from wlsup.batch import CaptionBatch

    torch.manual_seed(0)
    batch = CaptionBatch(torch.randn(4, 3, 64, 64), ["a red square", "green", "a star", "two"], list("abcd"))
    for arm, expected in (("none", 1.0), ("shut gates", 0.0)):
        approach = study.build(arm, 8, 1e-3)
        study.start(approach, arm, batch)
        condition = approach.reprogrammer(batch.captions, approach.text(batch.captions))
        ratios = []

        def note(module, inputs, output, ratios=ratios):
            ratios.append(float((output - inputs[0]).square().mean().sqrt() / inputs[0].square().mean().sqrt()))

        for site in approach.adapter.replay_sites:
            site.register_forward_hook(note)
        with torch.no_grad():
            approach.encoder(batch.images, condition)
        assert ratios == pytest.approx([expected] * len(ratios), abs=0.02)


@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_stopped(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        study, "ARMS", {arm: study.ARMS[arm] for arm in ("none", "shut gates", "all three, warm-up on top")}
    )
    arguments = ["cure", "--steps", "4", "--batch-size", "8", "--out", str(tmp_path / "cure")]
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "1"])
    monkeypatch.setattr(study, "COLOURS", study.COLOURS[:3])
    study.main()
    assert len(json.loads((tmp_path / "cure.json").read_text())["runs"]) == 3
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "2"])
    study.main()
    assert capsys.readouterr().out.count("seed 1") == 3
    assert (tmp_path / "cure.png").is_file()
    assert "2 |" in (tmp_path / "cure.md").read_text()
