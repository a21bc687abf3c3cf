"""`wlsup knn`: its table, and what an encoder stands beside: random weights, and pixels."""

import io
import json

import pytest
import torch
from rich.console import Console
from sklearn.neighbors import KNeighborsClassifier

from wlsup.batch import ImageSpec
from wlsup.callbacks.knn import evaluate_knn
from wlsup.cli import main
from wlsup.cli.knn import _show
from wlsup.data.mini_evalsets import mini_eval_set
from wlsup.models.vision import VisionSpec, build_vision

ENTRIES = {
    "mini_digits": {
        "domain": "out",
        "temperature": 0.07,
        "train": 1000,
        "test": 500,
        "accuracy": {"10": 0.158, "20": 0.15, "200": 0.1},
        "ci95": {"10": [0.129, 0.193], "20": [0.121, 0.184], "200": [0.077, 0.129]},
    },
    "tiny": {
        "domain": "in",
        "temperature": 0.07,
        "train": 40,
        "test": 10,
        "accuracy": {"10": 1.0},
        "ci95": {"10": [0.722, 1.0]},
    },
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


@pytest.mark.usefixtures("few_mini_pictures")
def test_random_weights_and_pixels_stand_beside_the_encoder(capsys):
    def scored(*options):
        assert main(["knn", "mini", "--sets", "mini_shapes", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["knn"]["mini_shapes"]["accuracy"]["20"]

    spec = build_vision(VisionSpec(weights="mini")).image_spec
    shapes = mini_eval_set("mini_shapes", ImageSpec(size=spec.size, mean=spec.mean, std=spec.std))
    torch.manual_seed(0)
    untrained = build_vision(VisionSpec(weights="mini", pretrained=False))
    assert scored("--random") == evaluate_knn(untrained, shapes).top1
    vote = KNeighborsClassifier(
        20, weights=lambda far: torch.exp((1 - torch.from_numpy(far)) / 0.07).numpy(), metric="cosine"
    )
    (bank, queries) = (
        torch.stack([part[i][0] for i in range(len(part))]).flatten(1) for part in (shapes.train, shapes.test)
    )
    vote.fit(bank, shapes.train.labels)
    assert scored("--pixels") == pytest.approx(vote.score(queries, shapes.test.labels), abs=0.011)  # ties: one query
    assert scored() not in (scored("--random"), scored("--pixels"))
