"""`wlsup evaluate`, and the callback that makes the same file: one small run, judged by all there is."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.conftest import few, fit
from wlsup.batch import ImageSpec
from wlsup.cli import evaluate, main
from wlsup.cli.configuration import load_run
from wlsup.data.mini_evalsets import mini_eval_set
from wlsup.evaluation.judgement import METRICS, MetricSpec

FIT = [
    "fit", "-c", "experiments/base.yaml", "-c", "experiments/film.yaml", "--data.pairs", "64",
    "--data.validation_pairs", "32", "--trainer.max_epochs", "1", "--data.batch_size", "32", "--model.lr", "3e-2",
]  # fmt: skip


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """The first of the mini digits, as a folder of one's own: quick to judge by."""
    folder = tmp_path_factory.mktemp("digits")
    whole = mini_eval_set("mini_digits", ImageSpec(size=64))
    for split, part, count in (("train", whole.train, 200), ("test", whole.test, 100)):
        for position in range(count):
            path = folder / split / str(int(part.labels[position])) / f"{position:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(part.pictures[position].permute(1, 2, 0).numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_digits):
    """A run that judged itself by all metrics at its end."""
    folder = tmp_path_factory.mktemp("run")
    sets = json.dumps([{"name": "mini_digits", "kind": "imagefolder", "images": str(few_digits)}])
    options = ["--evaluation.metrics", json.dumps(list(METRICS)), "--evaluation.draws", "3", "--data.eval_sets", sets]
    options += ["--knn.k", "10"]  # every figure of the run is of its own vote
    assert main([*FIT, "--run_dir", str(folder), *options]) == 0
    return folder


def test_knn_of_a_run_takes_its_own_vote(run, capsys):
    assert main(["knn", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    own = json.loads((run / "results.json").read_text())
    assert found["protocol"] == own["protocol"]
    assert "k=10" in own["protocol"]
    assert found["knn"]["mini_digits"]["accuracy"]["10"] == own["knn"]["mini_digits"]["finetuned"]


@pytest.fixture(scope="module")
def by_callback(run):
    return json.loads((run / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def by_command(run, by_callback):
    """The same run by the command."""
    assert main(["evaluate", str(run), "--draws", "3"]) == 0
    return json.loads((run / "evaluation.json").read_text())


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for position, child in enumerate(value):
            yield from leaves(child, (*path, position))
    else:
        yield path, value


@pytest.mark.slow
def test_every_metric_is_there_with_its_protocol(by_callback):
    assert set(by_callback["protocol"]) == {"knn", *METRICS}
    entry = by_callback["sets"]["mini_digits"]
    assert {"domain", "knn", "probe", "few_shot", "calibration", "drift", "zero_shot", "classes"} <= set(entry)
    assert set(entry["calibration"]) == {"knn", "probe"}
    assert by_callback["retrieval"]["pairs"] == 32


@pytest.mark.slow
def test_the_command_finds_what_the_run_found_of_itself(by_callback, by_command):
    ours, theirs = dict(leaves(by_command)), dict(leaves(by_callback))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        numbers = isinstance(value, list) and value and isinstance(value[0], float)
        near = numbers or isinstance(value, float)
        assert ours[path] == (pytest.approx(value, abs=1e-6) if near else value), path


def test_the_k_nn_rows_are_those_of_results_json(run, by_callback):
    knn = json.loads((run / "results.json").read_text())["knn"]["mini_digits"]
    for key in ("pretrained", "finetuned", "delta"):
        assert by_callback["sets"]["mini_digits"]["knn"][key] == pytest.approx(knn[key])
    assert by_callback["sets"]["mini_digits"]["knn"]["ci95"] == knn["ci95"]  # one change has one interval


def test_every_figure_has_an_interval_beside_it(by_callback):
    def holds(one, estimate, interval):
        low, high = one[interval]
        assert low <= high, (estimate, one)

    entry = by_callback["sets"]["mini_digits"]
    figures = [entry["knn"], entry["probe"], *entry["classes"]]
    figures += [one for by_shots in entry["few_shot"].values() for one in by_shots.values()]
    figures += [one for scores in entry["calibration"].values() for key, one in scores.items() if key != "reliability"]
    for one in figures:
        for estimate, interval in (
            ("pretrained", "pretrained_ci95"),
            ("finetuned", "finetuned_ci95"),
            ("delta", "ci95"),
        ):
            assert estimate in one
            holds(one, estimate, interval)
        assert one["delta"] == pytest.approx(one["finetuned"] - one["pretrained"], abs=1e-9)
    for key in ("cka", "knn_overlap", "cosine"):
        holds(entry["drift"], key, f"{key}_ci95")
        assert entry["drift"][key] < 0.999  # this run did move the features
    holds(entry["zero_shot"], "accuracy", "ci95")
    assert entry["zero_shot"]["chance"] == 0.1
    for direction in ("image_to_text", "text_to_image"):
        assert set(by_callback["retrieval"]["ci95"][direction]) == set(by_callback["retrieval"][direction])


def test_zero_shot_is_made_of_the_runs_own_head(run, by_callback):
    module, data = load_run(run)
    data.image_spec = module.image_spec
    (digits,) = data.eval_datasets()
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    rows = []
    with torch.no_grad():
        for word in words:
            sentences = [f"a picture of the number {word}", f"there is a {word}"]
            rows.append(module.head.embed_captions(module.text(sentences).pooled).mean(0))
        classes = torch.nn.functional.normalize(torch.stack(rows), dim=1)
        images = torch.stack([digits.test[i][0] for i in range(len(digits.test))])
        labels = torch.tensor(digits.test.labels)
        pictures = module.head.embed_images(module.encoder(images).pooled)
    expected = float(((pictures @ classes.T).argmax(1) == labels).float().mean())
    assert by_callback["sets"]["mini_digits"]["zero_shot"]["accuracy"] == pytest.approx(expected, abs=1.1e-2)


def test_zero_shot_takes_other_templates(run, by_command, tmp_path):
    (tmp_path / "mine.txt").write_text("elephants beside {}\n")
    call = ["evaluate", str(run), "--metrics", "zero_shot", "--templates", str(tmp_path / "mine.txt")]
    assert main([*call, "--draws", "3", "--out", str(tmp_path)]) == 0
    entry = json.loads((tmp_path / "evaluation.json").read_text())["sets"]["mini_digits"]["zero_shot"]
    ours = by_command["sets"]["mini_digits"]["zero_shot"]
    assert (entry["templates"], entry["prompts"]) == (1, str(tmp_path / "mine.txt"))
    assert entry["accuracy"] != ours["accuracy"] and ours["templates"] > 1


def test_pictures_of_the_classes_that_changed_most_are_the_sets_own(run, by_callback, few_digits):
    files = sorted((run / "classes" / "mini_digits").glob("*.png"))
    assert any(file.name.startswith("helped-1-") for file in files)
    assert any(file.name.startswith("hurt-1-") for file in files)
    rows = by_callback["sets"]["mini_digits"]["classes"]
    assert [row["delta"] for row in rows] == sorted((row["delta"] for row in rows), reverse=True)
    assert files[0].name == f"helped-1-{rows[0]['class']}-1.png"
    pictures = (few_digits / "test" / rows[0]["class"]).glob("*.png")
    assert any(np.array_equal(np.asarray(Image.open(files[0])), np.asarray(Image.open(path))) for path in pictures)


def test_a_run_whose_features_were_cached_is_evaluated_on_pictures(tmp_path, few_digits, capsys):
    fit = [word.replace("film", "lit") for word in FIT]
    sets = json.dumps([{"name": "mini_digits", "kind": "imagefolder", "images": str(few_digits)}])
    options = ["--data.cache_features", "true", "--data.eval_sets", sets]
    assert main([*fit, "--run_dir", str(tmp_path / "run"), *options]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--metrics", "retrieval"]) == 0
    assert "R@1" in capsys.readouterr().out


def test_the_terminal_shows_a_table_and_where_the_file_is(run, tmp_path, capsys):
    assert main(["evaluate", str(run), "--metrics", "drift", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "CKA with pretrained" in out and "drift:v1" in out and "knn-dino:v1" in out
    assert f"In {tmp_path}: evaluation.json" in out
    assert set(json.loads((tmp_path / "evaluation.json").read_text())["protocol"]) == {"knn", "drift"}
    for line in out.splitlines()[3:5]:
        assert "[" in line


def files_of(run):
    return {path: path.read_bytes() for path in (run / "evaluation.json", *(run / "classes").rglob("*.png"))}


@pytest.mark.slow
def test_a_look_at_a_part_leaves_the_runs_file_as_it_is(run, by_command, capsys):
    (run / "classes" / "mini_digits" / "mine.png").write_bytes(b"")  # pictures written anew would take its place
    before = files_of(run)
    for choice, lost in (
        (["--metrics", "drift,classes"], "metrics probe, few_shot, calibration, zero_shot, retrieval"),
        (["--metrics", "classes", "--sets", "mini_shapes"], "sets mini_digits and metrics probe"),
    ):
        assert main(["evaluate", str(run), *choice]) == 0
        captured = capsys.readouterr()
        assert "k-NN" in captured.out and f"In {run}" not in captured.out
        assert f"{run / 'evaluation.json'} was left as it is, since it also has the {lost}" in captured.err
        assert "--out DIR" in captured.err
        assert files_of(run) == before
    (run / "classes" / "mini_digits" / "mine.png").unlink()


@pytest.mark.parametrize(("shots", "kept"), [((2,), False), ((1, 5), True), ((1, 2, 5), True), (None, True)])
def test_other_shots_do_not_take_the_place_of_the_runs(shots, kept, run, by_callback):
    assert by_callback["shots"] == [1, 5]
    options = SimpleNamespace(out=None, sets=None, metrics=None, shots=shots and str(shots))
    place = evaluate._out(run, MetricSpec(METRICS, shots or (1, 5)), ["mini_digits"], options)
    assert place == (run if kept else None)


@pytest.mark.slow
def test_weights_alone_have_figures_and_no_changes(capsys):
    call = ["evaluate", "mini", "--sets", "mini_digits", "--metrics", "probe,classes", "--json"]
    assert main(call) == 0
    found = json.loads(capsys.readouterr().out)
    entry = found["sets"]["mini_digits"]
    assert set(found["protocol"]) == {"knn", "probe", "classes"}
    assert 0.2 < entry["probe"]["pretrained"] < 1
    assert "finetuned" not in entry["probe"] and "delta" not in entry["classes"][0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metrics", "prob"], "Did you mean 'probe'"),
        (["--shots", "a"], "give numbers"),
        (["--draws", "1"], "2 draws or more"),
        (["--templates", "none.txt"], "cannot be read"),
        (["--metrics", "drift,zero_shot"], "an encoder alone has no such figures"),
        (["--sets", "mini_digit"], "Did you mean 'mini_digits'"),
    ],
)
def test_a_mistake_is_one_message(arguments, said, capsys):
    assert main(["evaluate", "mini", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_run_that_does_not_begin_as_the_encoder_is_compared_with_the_encoder(tmp_path, capsys):
    """The paper's ladder takes the encoder's place: before step 1 it is a random network, and no line leads to it."""
    folder = fit("lst", tmp_path / "run", "--model.form", "replace", "--data.eval_sets", "[mini_digits]")
    own = json.loads((folder / "results.json").read_text())["knn"]["mini_digits"]
    with few():
        assert main(["evaluate", str(folder), "--metrics", "drift", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    knn = found["sets"]["mini_digits"]["knn"]
    assert (knn["pretrained"], knn["delta"]) == (own["pretrained"], own["delta"])
    assert main(["wise-ft", str(folder)]) == 2
    assert "does not begin as the pretrained encoder" in capsys.readouterr().err
    assert main(["export", str(folder), "--alpha", "0"]) == 2
    assert "does not begin as the pretrained encoder" in capsys.readouterr().err
