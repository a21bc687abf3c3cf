"""What recipes and README say was measured is what experiments/results holds."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("publish_results", ROOT / "experiments" / "publish_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(delta):
    values = {"pretrained": 0.5, "finetuned": {"mean": 0.5 + delta}, "delta": {"values": [delta, delta]}}
    return {
        "seeds": [0, 1],
        "knn": {"mini_shapes": values},
        "retrieval": {"image_to_text": {"1": {"mean": 0.0625}}},
        "task": None,
        "processor_seconds": 61.2,
        "peak_resident_mib": 1234.5,
    }


def test_recipes_and_readme_are_up_to_date(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["publish_results", "--check"])
    assert script.main() == 0, capsys.readouterr().out + "run `python experiments/publish_results.py`"


def test_a_header_gets_time_and_result_once(script):
    recipe = "# Film.\n# hardware:  two CPU cores\n# time:      old\n# result:    old\napproach: film\n"
    new = script.with_header(recipe, script.header(row(-0.1)))
    assert new.splitlines()[2:] == [
        "# time:      61 s of computing, 1,234 MiB at the peak",
        "# result:    mean of 2 seeds, reproduced here: shapes 50.0 -> 40.0",
        "approach: film",
    ]
    assert script.with_header(new, script.header(row(-0.1))) == new


def test_of_an_untouched_encoder_the_header_says_what_was_measured_instead(script):
    assert script.header(row(0.0))["result"].endswith("image-to-text R@1 6.2 %; k-NN cannot change, by design")
    task = {"rows": [{"what": "loss", "unit": "nats", "value": {"mean": 1.5}}]}
    assert script.header({**row(0.0), "task": task})["result"].endswith(": loss 1.5 nats")


def test_a_single_seed_is_named(script):
    assert script.header({**row(-0.1), "seeds": [2]})["result"].startswith("seed 2, reproduced here:")


def test_only_the_table_of_the_readme_changes(script):
    readme = "a\n<!-- results -->\nold\n<!-- end -->\nb\n<!-- real -->\nx\n<!-- end -->\n"
    assert script.with_table(readme, "new") == readme.replace("old", "new")
