"""`make results`: the table's figures, and that done runs are not made again."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from wlsup.files import write_json

SCRIPT = Path(__file__).parents[2] / "experiments" / "run_results.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_results", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(approach, seed, delta):
    entry = {"pretrained": 0.5, "finetuned": 0.5 + delta, "delta": delta, "test": 100}
    entry["ci95"] = [delta - 0.01, delta + 0.03]
    return {
        "approach": approach,
        "seed": seed,
        "steps": 3,
        "seconds": 10.0 + seed,
        "processor_seconds": 20.0 + seed,
        "parameters": {"total": 100, "trained": 25},
        "captions": {"pairs": 64},
        "peak_memory_mib": {"resident": 500.0 + seed, "gpu": None},
        "knn": {"near": {"domain": "in", **entry}, "far": {"domain": "out", **entry}},
        "summary": {"in_domain_delta": delta, "out_of_domain_delta": delta},
        "retrieval": {
            "pairs": 64,
            "image_to_text": {"1": 0.1 + delta, "5": 0.2, "10": 0.5},
            "text_to_image": {"1": 0.2 + delta, "5": 0.2, "10": 0.7},
            "chance": {"1": 1 / 64, "5": 5 / 64, "10": 10 / 64},
        },
        "captioning": {
            "pictures": 8,
            "generation": "greedy",
            "scores": {"bleu_4": {"value": 0.1 + delta}, "cider_d": {"value": 1.0 + delta}, "loss": {"value": 2.0}},
        },
        "task": {"title": "T", "rows": [{"what": "loss", "value": 1.5 + delta, "unit": "nats", "chance": None}]},
    }


def test_the_row_holds_what_the_table_shows(script):
    row = script.summarise("film", [results("film", seed, delta) for seed, delta in ((0, 0.01), (1, 0.03))])
    assert row["in_domain_delta"]["mean"] == pytest.approx(0.02)
    assert (row["seconds"], row["processor_seconds"]) == (10.5, 20.5)
    assert (row["peak_resident_mib"], row["peak_gpu_mib"]) == (501.0, None)
    text = script.markdown([row], {"lora, seed 0": "exit code 2: no"}, "mini")
    assert "| `film` | 2 | 3 | +2.0 [-10.7, +14.7] | +2.0 [-10.7, +14.7] | 25 (25.0 %) | 20 | 501 |" in text
    assert "| 20 | 61 | 501 |" in script.markdown([row], {}, "mini", {"film": 61.2})
    assert "| pretrained | 50.0 ± 9.6 | 50.0 ± 9.6 |" in text  # Wilson's of 50 in 100
    assert "Retrieval over 64 held-out pairs, recall in % (chance: R@1 1.6, R@10 15.6):" in text
    assert "| image to text, R@1 | image to text, R@10 | text to image, R@1 | text to image, R@10 |" in text
    assert "| `film` | 12.0 ± 12.7 | 50.0 ± 0.0 | 22.0 ± 12.7 | 70.0 ± 0.0 |" in text
    assert "| loss | 1.520 ± 0.127 nats | - |" in text
    assert "Captions of 8 held-out pictures" in text
    assert "| approach | BLEU-4 | CIDEr-D |" in text
    assert "| `film` | 0.120 ± 0.127 | 1.020 ± 0.127 |" in text
    assert "`lora, seed 0` failed: exit code 2: no" in text


def test_what_only_some_seeds_have_is_of_those_and_said_so(script):
    runs = [results("selective_k", seed, 0.01) for seed in range(3)]
    for run, chosen in zip(runs, ("embed norm", "embed norm", "embed blocks.0"), strict=True):
        run["task"]["rows"] = [
            {"what": f"{name} (trained)" if name in chosen else name, "value": value, "unit": "", "chance": None}
            for name, value in (("embed", 0.3), ("blocks.0", 0.2 + 0.1 * ("blocks" in chosen)), ("norm", 0.1))
        ]
    runs[0].pop("captioning")
    runs[1]["task"]["rows"].append({"what": "head", "value": 0.5, "unit": "", "chance": None})
    row = script.summarise("selective_k", runs)
    assert [entry["what"] for entry in row["task"]["rows"]] == [
        "embed (trained)", "blocks.0 (trained by 1 of 3 seeds)", "norm (trained by 2 of 3 seeds)",
        "head (1 of 3 seeds)",
    ]  # fmt: skip
    assert row["task"]["rows"][1]["value"]["mean"] == pytest.approx((0.2 + 0.2 + 0.3) / 3)
    assert "| `selective_k` (2 of 3 seeds) | 0.110" in script.markdown([row], {}, "mini")


def test_seeds_that_agree_are_said_to(script):
    text = script.markdown([script.summarise("film", [results("film", seed, 0.0) for seed in (0, 1)])], {}, "mini")
    assert "| loss | 1.500 nats (for every seed) | - |" in text
    assert "| `film` | 50.0 ± 9.6 | 50.0 ± 9.6 |" in text  # nothing over seeds: over test pictures


def test_one_seed_has_intervals_over_test_pictures_and_says_so(script):
    text = script.markdown([script.summarise("film", [results("film", 0, 0.02)])], {}, "mini")
    assert "| `film` | 1 | 3 | **+2.0 [+1.0, +5.0] (pictures)** |" in text
    assert "| `film` | 52.0 ± 9.6 | 52.0 ± 9.6 |" in text
    assert "Protocol: knn-dino:v1" in text


def test_only_what_is_missing_is_run_and_the_table_grows(script, tmp_path, monkeypatch, capsys):
    calls = []

    def pretend(approach, seed, folder, preset, options):
        calls.append((approach, seed, options))
        folder.mkdir(parents=True, exist_ok=True)
        if approach == "lit":
            return "exit code 2: broken"
        told = results(approach, seed, 0.02 + seed / 1000)
        cost = {name: told.pop(name) for name in ("peak_memory_mib", "processor_seconds")}
        write_json(folder / "cost.json", cost)
        write_json(folder / "results.json", told)  # last, and whole or not at all: another thread may look
        return None

    monkeypatch.setattr(script, "run", pretend)
    call = ["run_results", "--approaches", "film", "lit", "--seeds", "0", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*call, "--", "--trainer.max_epochs", "1"])
    assert script.main() == 1
    assert sorted(calls) == [(n, s, ["--trainer.max_epochs", "1"]) for n in ("film", "lit") for s in (0, 1)]
    calls.clear()
    monkeypatch.setattr(sys, "argv", [*call, "--jobs", "2"])
    assert script.main() == 1
    assert sorted((name, seed) for name, seed, _ in calls) == [("lit", 0), ("lit", 1)]
    table = json.loads((tmp_path / "mini.json").read_text())
    assert [row["approach"] for row in table["rows"]] == ["film"]
    assert table["rows"][0]["peak_resident_mib"] == 501.0
    assert set(table["failures"]) == {"lit, seed 0", "lit, seed 1"}
    assert "**+2.1 [" in (tmp_path / "mini.md").read_text()
    monkeypatch.setattr(sys, "argv", ["run_results", "--approaches", "full", *call[4:]])
    assert script.main() == 0
    table = json.loads((tmp_path / "mini.json").read_text())
    assert [row["approach"] for row in table["rows"]] == ["film", "full"]  # those that have runs from before stay
    assert set(table["failures"]) == {"lit, seed 0", "lit, seed 1"}


def test_seeds_of_different_recipes_are_no_row(script, tmp_path):
    for seed, steps in ((0, 3), (1, 4)):
        told = results("film", seed, 0.02) | {"steps": steps}
        write_json(tmp_path / "runs" / "mini" / "film" / f"seed{seed}" / "results.json", told)
    assert script.collect(tmp_path, "mini", ["film"], [0, 1], {}) == []
    assert (
        "its runs differ in steps (seed 0: 3 of 64 pairs, seed 1: 4 of 64 pairs)" in (tmp_path / "mini.md").read_text()
    )


def test_an_unknown_approach_is_refused(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_results", "--approaches", "flim"])
    with pytest.raises(ValueError, match="film"):
        script.main()
