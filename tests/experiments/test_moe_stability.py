"""What the stability study promises: breaking is what its text says, its table is that of its runs, and it goes on."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("moe_stability", ROOT / "experiments" / "moe_stability.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["moe_stability"] = module  # its processes find what they are to run by this name
    spec.loader.exec_module(module)
    yield module
    del sys.modules["moe_stability"]


def a_run(arm="all measures", seed=0, router="top_k", scale=0.02, rate=1e-1, **changes):
    found = {"first": 2.5, "last": 2.0, "dead": 1, "experts": 32, "max_logit": 3.0, "skipped": 0, "spikes": 1}
    return {"arm": arm, "router": router, "scale": scale, "rate": rate, "seed": seed, "seconds": 1.0} | found | changes


class TestBroken:
    def test_by_each_of_the_three_and_not_otherwise(self, study):
        assert study.broke(a_run()) == ""
        assert study.broke(a_run(last=None)) == "not finite"
        assert study.broke(a_run(last=2.5)) == "not below its start"
        assert study.broke(a_run(dead=16)) == ""
        assert study.broke(a_run(dead=17)) == "dead experts"
        # of upcycled MLPs the dense model is what is to be beaten, wherever the run began
        assert study.broke(a_run(first=4.5, last=2.4, dense=2.3)) == "not below the dense model"
        assert study.broke(a_run(first=4.5, last=2.2, dense=2.3)) == ""

    def test_a_number_that_json_does_not_know_is_none(self, study):
        assert study._number(math.nan) is None
        assert study._number(math.inf) is None
        assert study._number(1.5) == 1.5


class TestSummary:
    def test_shares_means_and_paired_differences(self, study):
        runs = [a_run(seed=seed, last=2.0 + 0.1 * seed) for seed in range(3)]
        runs += [a_run("no measure", seed, last=last) for seed, last in enumerate([2.2, 2.6, None])]
        every, none = study.summary(study.ADAPTERS, runs)
        assert (every["broken"], every["why"], every["difference"]) == (0, [], None)
        assert (none["broken"], none["why"]) == (2, ["not below its start", "not finite"])
        assert none["loss"][0] == pytest.approx(2.4)
        assert none["difference"][0] == pytest.approx((0.2 + 0.5) / 2)  # the seed without a number is left out
        assert none["spikes"] == 3

    def test_an_interval_is_students(self, study):
        mean, half = study.interval([1.0, 2.0, 3.0, 4.0, 5.0])
        assert (mean, half) == (3.0, pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3))
        assert study.interval([]) is None
        assert study.interval([1.0]) == [1.0, None]

    def test_findings_do_not_hide_that_a_measure_harms(self, study):
        runs = [a_run(seed=seed, last=2.3 + 0.01 * seed) for seed in range(3)]
        runs += [a_run("no measure", seed, last=2.0 + 0.01 * seed) for seed in range(3)]
        runs += [a_run("without jitter", seed, last=2.1 + 0.01 * seed) for seed in range(3)]
        said = "\n".join(study.findings(study.ADAPTERS, study.summary(study.ADAPTERS, runs)))
        assert "higher in 0, lower in 1, and not distinguishable in 0" in said
        assert "without jitter, in the harsh cell: the final loss is lower (-0.200" in said

    def test_table_and_picture_are_of_the_runs(self, study, tmp_path):
        runs = [a_run(arm, seed) for arm in study.ARMS for seed in range(2)] + [a_run("no measure", 2, last=None)]
        record = {
            "command": "c",
            "settings": {"mixture": "adapters", "steps": 1, "batch_size": 2, "pairs": 8, "held_out": 4},
            "runs": runs,
        }
        study.write(record, tmp_path / "study")
        read = json.loads((tmp_path / "study.json").read_text())
        assert read["summary"] == study.summary(study.ADAPTERS, read["runs"])
        page = study.markdown(read)
        assert "| top_k | 0.02 | 0.1 | no measure | 1/3 | not finite |" in page
        study.draw(read, tmp_path / "study.png")
        assert Image.open(tmp_path / "study.png").size[0] > 800


class TestArms:
    def test_each_single_arm_leaves_out_one_measure(self, study):
        full = vars(study.Measures())
        for name, measures in study.SINGLE.items():
            assert sum(vars(measures)[key] != full[key] for key in full) == 1, name
        assert not any(vars(study.NONE).values())

    def test_measures_are_what_is_built(self, study):
        torch.manual_seed(0)
        with_all = study.build("adapters", study.Measures(), "top_k", 0.02, 1e-3)
        without = study.build("adapters", study.NONE, "noisy_top_k", 0.5, 1e-3)
        for layer in study.moe_layers(with_all):
            spec = layer.spec
            assert (spec.router_dtype, spec.z_weight, spec.balance, spec.jitter) == ("float32", 1e-3, "loss", 1e-2)
            assert spec.combine == "straight_through"
            assert not any(expert.up.weight.any() for expert in layer.experts)
        for layer in study.moe_layers(without):
            spec = layer.spec
            assert (spec.router_dtype, spec.z_weight, spec.balance, spec.jitter) == ("model", 0.0, "none", 0.0)
            assert (spec.combine, spec.router, spec.init_std) == ("raw", "noisy_top_k", 0.5)
            assert all(expert.up.weight.any() for expert in layer.experts)
            assert float(layer.router.weight.detach().std()) == pytest.approx(0.5, rel=0.1)

    def test_upcycled_mlps_are_copies_and_without_the_start_weighted_by_the_probability(self, study):
        torch.manual_seed(0)
        for measures, combine in ((study.Measures(), "straight_through"), (study.NONE, "raw")):
            approach = study.build("ffn", measures, "top_k", 0.02, 1e-3)
            layers = study.moe_layers(approach)
            assert len(layers) == len(approach.language.blocks)
            for layer, block in zip(layers, approach.language.blocks, strict=True):
                assert layer.router.spec.combine == combine
                x = torch.randn(2, 5, 128)
                with approach._without(), torch.no_grad():
                    dense = block.mlp(x)
                with torch.no_grad():
                    mixed = layer.eval()(x)
                share = float(mixed.norm() / dense.norm())
                assert share == pytest.approx(1.0, abs=1e-5) if combine != "raw" else 0.1 < share < 0.2

    def test_what_lacks_is_what_is_not_there(self, study):
        every = study.lacking(study.ADAPTERS, [], 2)
        assert len(every) == len(set(every)) == 2 * len(list(study.cells(study.ADAPTERS)))
        assert [key[-1] for key in every] == sorted(key[-1] for key in every)
        assert study.ADAPTERS.harsh in {key[1:4] for key in every}
        left = study.lacking(study.ADAPTERS, [a_run()], 2)
        assert set(every) - set(left) == {("all measures", "top_k", 0.02, 1e-1, 0)}


def test_the_same_seed_gives_the_same_run(study, monkeypatch):
    monkeypatch.setattr(study, "PAIRS", 64)
    monkeypatch.setattr(study, "HELD_OUT", 16)
    study.pairs.cache_clear()
    threads = torch.get_num_threads()
    one, again, other = (study.run("adapters", "no measure", "top_k", 0.5, 1e-2, seed, 3, 8) for seed in (0, 0, 1))
    torch.set_num_threads(threads)
    study.pairs.cache_clear()
    assert one["last"] != one["first"]
    assert {**one, "seconds": 0} == {**again, "seconds": 0}
    assert other["curve"] != one["curve"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_it_runs_and_goes_on_where_it_stopped(study, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setattr(study, "ROUTERS", ("top_k",))
    monkeypatch.setattr(study, "SCALES", (0.02,))
    small = replace(study.ADAPTERS, rates=(1e-1,))
    monkeypatch.setattr(study, "ADAPTERS", small)
    monkeypatch.setitem(study.STUDIES, "adapters", small)
    monkeypatch.setattr(study, "SINGLE", {})
    arguments = [
        "study",
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--jobs",
        "1",
        "--pairs",
        "8",
        "--held-out",
        "4",
        "--out",
        str(tmp_path / "study"),
    ]
    for seeds, expected in (("1", "0 runs done already, 2 to do"), ("2", "2 runs done already, 2 to do")):
        monkeypatch.setattr("sys.argv", [*arguments, "--seeds", seeds])
        study.main()
        assert expected in capsys.readouterr().out
    assert len(json.loads((tmp_path / "study.json").read_text())["runs"]) == 4
    assert (tmp_path / "study.png").is_file()
    assert "/2 |" in (tmp_path / "study.md").read_text()


@pytest.mark.parametrize("mixture", ["adapters", "ffn"])
def test_the_results_that_are_kept_are_those_of_the_runs(study, mixture):
    asked = study.STUDIES[mixture]
    path = RESULTS / f"{asked.name}.json"
    record = json.loads(path.read_text())
    assert study.lacking(asked, record["runs"], 5) == []
    assert record["seconds"] <= 60 * 60  # of one core without bfloat16 units
    again = json.loads(json.dumps(study.summary(asked, record["runs"])), parse_float=lambda x: round(float(x), 6))
    kept = json.loads(json.dumps(record["summary"]), parse_float=lambda x: round(float(x), 6))
    assert again == kept  # to six digits: quantiles of Student's t are each scipy's own
    assert path.with_suffix(".md").read_text() == study.markdown(record)
    assert path.with_suffix(".png").stat().st_size > 5_000
