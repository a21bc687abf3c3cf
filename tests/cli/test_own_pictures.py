"""A stranger's captions and pictures, one of them corrupt: training goes on, counts it, and says so at the end."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from wlsup.cli import main


@pytest.fixture
def own(tmp_path):
    rng = np.random.default_rng(0)
    images = tmp_path / "photos"
    images.mkdir()
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for index in range(96):
            name = f"{index:03d}.jpg"
            Image.fromarray(rng.integers(0, 255, (40, 52, 3), dtype=np.uint8)).save(images / name)
            rows.writerow([name, f"a small picture number {index}"])
            rows.writerow([name, f"the picture called {index}, again"])
    for split, count in (("train", 12), ("test", 6)):
        for kind in ("cats", "dogs"):
            folder = tmp_path / "labelled" / split / kind
            folder.mkdir(parents=True)
            for index in range(count):
                shade = 60 if kind == "cats" else 190
                pixels = np.clip(rng.normal(shade, 20, (30, 30, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path


def fit(own, *options):
    overlay = own / "mine.yaml"
    overlay.write_text(
        f"data:\n  source: table\n  captions: {own / 'captions.csv'}\n  images: {own / 'photos'}\n  pairs: 64\n"
        "  validation_pairs: 16\n  batch_size: 16\n  eval_sets:\n"
        f"    - {{name: pets, kind: imagefolder, images: {own / 'labelled'}, domain: in}}\n"
        "trainer:\n  max_epochs: 1\n"
    )
    recipes = ["-c", "experiments/base.yaml", "-c", "experiments/film.yaml", "-c", str(overlay)]
    return main(["fit", *recipes, "--run_dir", str(own / "run"), *options])


def test_a_corrupt_jpeg_is_counted_and_named_and_training_goes_on(own, capsys):
    for path in sorted((own / "photos").iterdir())[:2]:
        path.write_bytes(path.read_bytes()[:200])
    assert fit(own, "--data.max_bad_fraction", "0.2") == 0
    results = json.loads((own / "run" / "results.json").read_text())
    assert results["captions"]["skipped"]
    assert set(results["captions"]["skipped"]) <= {"000.jpg", "001.jpg"}
    assert results["knn"]["pets"]["k"] == 20
    said = capsys.readouterr()
    assert "could not be read" in said.err + (own / "run" / "run.log").read_text()


def test_rotten_data_stops_the_run_with_one_message(own, capsys):
    for path in sorted((own / "photos").iterdir())[:40]:
        path.write_bytes(b"")
    assert fit(own) == 2
    error = capsys.readouterr().err
    assert "max_bad_fraction" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: (own / "captions.csv").write_text("image,words\na.jpg,b\n"), "words"),
        (lambda own: (own / "captions.csv").write_text("image,caption\n000.jpg,\n"), "caption"),
        (lambda own: (own / "captions.csv").unlink(), "captions.csv"),
        (lambda own: [path.unlink() for path in (own / "photos").iterdir()], "photos"),
    ],
)
def test_a_broken_table_ends_in_one_message(own, change, said, capsys):
    change(own)
    assert fit(own) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_bare_encoder_is_scored_on_ones_own_sets(own, capsys):
    mine = own / "sets.yaml"
    mine.write_text(
        "data:\n  eval_sets:\n    - mini_digits\n"
        f"    - {{name: pets, kind: imagefolder, images: {own / 'labelled'}, domain: in}}\n"
    )
    assert main(["knn", "mini", "--sets", str(mine), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["knn"]
    assert {name: entry["domain"] for name, entry in found.items()} == {"mini_digits": "out", "pets": "in"}
    assert found["pets"]["test"] == 12
    assert main(["evaluate", "mini", "--sets", str(mine), "--metrics", "classes", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["sets"]) == {"mini_digits", "pets"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {}\n", "names no evaluation sets"),
        ("data: {eval_sets: [{images: x}]}\n", "has no name"),
        ("data: {eval_sets: [{name: x, image: y}]}\n", "Did you mean 'images'"),
    ],
)
def test_a_recipe_of_sets_that_says_too_little_is_one_message(text, said, own, capsys):
    (own / "sets.yaml").write_text(text)
    assert main(["knn", "mini", "--sets", str(own / "sets.yaml")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
