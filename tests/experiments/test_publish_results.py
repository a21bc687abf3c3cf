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


def test_an_untouched_encoder_is_said_to_be(script):
    assert "by design" in script.header(row(0.0))["result"]


def test_only_the_table_of_the_readme_changes(script):
    readme = "a\n<!-- results -->\nold\n<!-- end -->\nb\n<!-- real -->\nx\n<!-- end -->\n"
    assert script.with_table(readme, "new") == readme.replace("old", "new")
