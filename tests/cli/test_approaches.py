"""`wlsup approaches`: every approach with what it trains, as text and as JSON."""

import json
from pathlib import Path

from wlsup.approaches import APPROACHES
from wlsup.cli import main


def test_text_and_json_list_every_approach_with_the_same_counts(capsys):
    assert main(["approaches", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(APPROACHES)
    assert main(["approaches"]) == 0
    text = capsys.readouterr().out
    for row in rows:
        assert f"{row['name']} " in text
        assert f"trains {', '.join(row['trains'])}: {row['trained']:,} of {row['total']:,} (" in text
    assert "wlsup inspect APPROACH -c RECIPE.yaml" in text  # whose counts are a recipe's


def test_inspect_counts_by_the_recipe_that_it_is_given(capsys):
    counts = []
    for recipe in ([], ["-c", "experiments/base.yaml", "-c", "experiments/bottleneck.yaml"]):
        assert main(["inspect", "bottleneck", *recipe, "--json"]) == 0
        counts.append(json.loads(capsys.readouterr().out)["trained"])
    table = json.loads(Path("experiments/results/mini.json").read_text())["rows"]
    assert counts[0] != counts[1] == next(r["parameters"]["trained"] for r in table if r["approach"] == "bottleneck")
