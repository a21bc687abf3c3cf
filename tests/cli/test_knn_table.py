"""`wlsup knn`'s table: an interval beside every accuracy, the protocol below, and nothing cut short."""

import io

import pytest
from rich.console import Console

from wlsup.cli.knn import _show

ENTRIES = {
    "mini_digits": {
        "domain": "out",
        "train": 1000,
        "test": 500,
        "accuracy": {"10": 0.158, "20": 0.15, "200": 0.1},
        "ci95": {"10": [0.129, 0.193], "20": [0.121, 0.184], "200": [0.077, 0.129]},
    },
    "tiny": {"domain": "in", "train": 40, "test": 10, "accuracy": {"10": 1.0}, "ci95": {"10": [0.722, 1.0]}},
}


@pytest.mark.parametrize("width", [40, 200])
def test_every_accuracy_has_its_interval_whatever_the_width(width, capsys):
    console = Console(file=io.StringIO(), width=width)
    _show("mini", ENTRIES, console)
    lines = console.file.getvalue().splitlines()
    (row,) = [line for line in lines if "mini_digits" in line]
    for shown in ("out", "1000", "500", "15.8 [12.9, 19.3]", "15.0 [12.1, 18.4]", "10.0 [7.7, 12.9]"):
        assert shown in row
    (row,) = [line for line in lines if "tiny" in line]
    assert row.count("[") == 1 and "100.0 [72.2, 100.0]" in row
    assert "knn-dino:v1 cosine T=0.07 weighted" in capsys.readouterr().out
