"""What `wlsup export` writes: used without wlsup it scores as the run did; the card says what it is; and mistakes."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cli.conftest import QUERIES, fit
from wlsup.batch import ImageSpec
from wlsup.cli import configuration, main
from wlsup.data.mini import mini_eval_set

pytestmark = pytest.mark.usefixtures("few_pictures")

# Runs with wlsup out of reach: the card's own lines load the encoder, and a k-NN written here scores it.
ALONE = """
import json, sys
import torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "wlsup":
            raise ImportError("wlsup is out of reach")

sys.meta_path.insert(0, Refuse())
saved, lines, scores = torch.load(sys.argv[1]), sys.argv[2], {}

def unit_features(images):
    scope = {"images": images}
    with torch.no_grad():
        exec(lines, scope)
    return torch.nn.functional.normalize(scope["features"].detach(), dim=1)

for name, (bank, bank_labels, queries, labels) in saved.items():
    similarity, nearest = (unit_features(queries) @ unit_features(bank).T).topk(20)
    votes = torch.zeros(len(queries), 10).scatter_add_(1, bank_labels[nearest], (similarity / 0.07).exp())
    scores[name] = (votes.argmax(1) == labels).double().mean().item()
assert not [name for name in sys.modules if name.partition(".")[0] == "wlsup"]
print(json.dumps(scores))
"""


def lines_of(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


def scored_alone(folder):
    spec = ImageSpec(64, (0.5,) * 3, (0.25,) * 3, resize=64)
    saved = {}
    for name in ("mini_shapes", "mini_digits"):
        made = mini_eval_set(name, spec)
        saved[name] = (*made.train.tensors(), *made.test.tensors())
    torch.save(saved, folder.parent / "pictures.pt")
    lines = lines_of((folder / "README.md").read_text())
    assert len(lines.strip().splitlines()) == 3
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "pictures.pt", lines],
        cwd=folder.parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def exported(curve_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "film-encoder"
    assert main(["export", str(curve_run), "-o", str(folder), "--licence", "cc-by-4.0"]) == 0
    return folder


def finetuned(run):
    return {name: e["finetuned"] for name, e in json.loads((run / "results.json").read_text())["knn"].items()}


@pytest.mark.slow
def test_timm_without_wlsup_gives_the_runs_own_figures(curve_run, exported):
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert scored_alone(exported) == finetuned(curve_run)


@pytest.mark.slow
def test_torch_without_wlsup_gives_the_runs_own_figures(bottleneck_run, tmp_path, capsys):
    folder = tmp_path / "program"
    assert main(["export", str(bottleneck_run), "-o", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["files"]) == ("program", ["README.md", "config.json", "encoder.pt2"])
    assert said["max_difference"] <= 1e-5
    assert scored_alone(folder) == finetuned(bottleneck_run)


@pytest.mark.slow
def test_an_adapted_run_of_peft_becomes_a_plain_encoder_with_its_figures(tmp_path, capsys):
    run, folder = fit("lora", tmp_path / "run"), tmp_path / "encoder"
    assert main(["export", str(run), "-o", str(folder), "--json"]) == 0
    assert (folder / "model.safetensors").is_file()
    capsys.readouterr()
    # merged, each weight is rounded once more than in the run: a picture may change sides
    for name, accuracy in scored_alone(folder).items():
        assert accuracy == pytest.approx(finetuned(run)[name], abs=1.01 / QUERIES)


def test_knn_reads_an_export_too(curve_run, exported, capsys):
    assert main(["knn", str(exported), "--sets", "mini_shapes", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["knn"]["mini_shapes"]
    assert scored["accuracy"]["20"] == finetuned(curve_run)["mini_shapes"]


def test_any_place_on_the_curve_is_the_curves_own(curve_run, tmp_path, capsys):
    curve = json.loads((curve_run / "wise_ft.json").read_text())
    for position, alpha in enumerate(curve["alphas"][:2]):
        folder = tmp_path / f"at-{alpha:g}"
        assert main(["export", str(curve_run), "--alpha", f"{alpha:g}", "-o", str(folder)]) == 0
        capsys.readouterr()
        assert main(["knn", str(folder), "--sets", "mini_shapes,mini_digits", "--json"]) == 0
        scored = json.loads(capsys.readouterr().out)["knn"]
        for name, entry in curve["sets"].items():
            assert scored[name]["accuracy"]["20"] == entry["accuracy"][position]
        card = (folder / "README.md").read_text()
        assert f"alpha {alpha:g}" in card
        assert ("from before it was taught" in card) == ("is not in these weights" in card) == (alpha == 0)
    assert main(["export", str(curve_run), "--alpha", "chosen", "-o", str(tmp_path / "chosen"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["alpha"] == curve["chosen_alpha"]


def test_the_card_says_data_licence_scores_and_limits(curve_run, exported):
    card, results = (exported / "README.md").read_text(), json.loads((curve_run / "results.json").read_text())
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["library_name"]) == ("cc-by-4.0", "timm")
    assert results["captions"]["manifest_sha256"] in card
    assert "64 pictures" in card
    for name, entry in results["knn"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        low, high = (f"{100 * edge:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0") for edge in entry["ci95"])
        assert f"[{low}, {high}]" in row
        if entry["ci95"][1] < 0:
            assert f"{name} ({100 * entry['delta']:+.1f} points" in card.split("## Limits")[1]
    assert results["protocol"] in card
    assert "## Licence" in card
    assert str(exported.parent) not in card
    assert str(curve_run) not in card


def test_at_an_alpha_that_nobody_scored_the_card_says_so(curve_run, tmp_path):
    assert main(["export", str(curve_run), "--alpha", "0.25", "-o", str(tmp_path / "out")]) == 0
    assert "not measured at alpha 0.25" in (tmp_path / "out" / "README.md").read_text()


def test_a_start_that_nobody_wrote_down_is_told(curve_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(curve_run, run)
    for path in (run / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["wlsup"]["start_sha256"]
        torch.save(checkpoint, path)
    assert main(["export", str(run), "--alpha", "0.5", "-o", str(tmp_path / "half")]) == 0
    assert "unchecked" in capsys.readouterr().err
    assert main(["export", str(run), "-o", str(tmp_path / "whole")]) == 0
    assert "unchecked" not in capsys.readouterr().err  # it needs no start


def test_the_adapter_alone_stands_on_its_base_and_scores_as_the_run(curve_run, tmp_path, capsys):
    folder = tmp_path / "adapter"
    assert main(["export", str(curve_run), "--adapter-only", "-o", str(folder)]) == 0
    capsys.readouterr()
    config = json.loads((folder / "adapter_config.json").read_text())
    checkpoint = torch.load(curve_run / "checkpoints" / "last.ckpt", weights_only=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == checkpoint["state_dict"].keys()
    assert all(torch.equal(tensor, checkpoint["state_dict"][name]) for name, tensor in tensors.items())
    assert config["bases"] == checkpoint["wlsup"]["bases"]
    assert len(config["sha256"]) == 64
    assert main(["knn", str(folder), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["knn"]
    assert {name: entry["accuracy"]["20"] for name, entry in scored.items()} == finetuned(curve_run)
    scope = {"images": torch.randn(2, 3, 64, 64)}
    lines = lines_of((folder / "README.md").read_text()).replace('"adapter"', repr(str(folder)))
    exec(lines, scope)
    assert scope["features"].shape == (2, 96)
    for change, said in (({"sha256": "0"}, "is damaged"), ({"bases": {"encoder": {"id": "x", "sha256": "0"}}}, "x")):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        assert main(["knn", str(folder)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["/nowhere"], "No finished run in /nowhere"),
        (["{run}", "--alpha", "1.5"], "--alpha 1.5: give a number in [0, 1]"),
        (["{run}", "--alpha", "much"], "--alpha 'much': give numbers"),
        (["{uncurved}", "--alpha", "chosen"], "run `wlsup wise-ft"),
        (["{run}", "-o", "{taken}"], "is there already"),
        (["{run}", "--licence", "mine: all\nof it"], "give an identifier such as mit"),
        (["{run}", "-o", "{run}/results.json/x"], "Cannot write"),
    ],
)
def test_mistakes_are_one_message(options, said, curve_run, bottleneck_run, exported, capsys):
    before = sorted(curve_run.rglob("*"))
    places = {"run": curve_run, "uncurved": bottleneck_run, "taken": exported}
    assert main(["export", *(option.format(**places) for option in options)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    assert sorted(curve_run.rglob("*")) == before


@pytest.mark.parametrize("text", ["{half", "[]"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("results.json", ["export", "{run}"]),
        ("results.json", ["wise-ft", "{run}"]),
        ("wise_ft.json", ["export", "{run}", "--alpha", "0.5"]),
        ("wise_ft.json", ["export", "{run}", "--alpha", "chosen"]),
    ],
)
def test_a_damaged_file_of_the_runs_is_one_message(name, call, text, curve_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(curve_run, run)
    (run / name).write_text(text)
    assert main([part.format(run=run) for part in call]) == 2
    captured = capsys.readouterr()
    assert "copy it again" in captured.err
    assert "Traceback" not in captured.err
    assert not (run / "export").exists()


def test_a_damaged_curve_is_no_hindrance_to_who_does_not_need_it(curve_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(curve_run, run)
    (run / "wise_ft.json").write_text("{half")
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 0


def test_a_program_and_an_adapter_are_scored_as_their_run(bottleneck_run, tmp_path, capsys):
    own = finetuned(bottleneck_run)
    for form, place in ((["--adapter-only"], "adapter"), ([], "program")):
        assert main(["export", str(bottleneck_run), "-o", str(tmp_path / place), *form]) == 0
        capsys.readouterr()
        assert main(["knn", str(tmp_path / place), "--sets", "mini_shapes,mini_digits", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["knn"]
        assert {name: entry["accuracy"]["20"] for name, entry in found.items()} == pytest.approx(own)
        call = ["evaluate", str(tmp_path / place), "--metrics", "classes", "--sets", "mini_digits", "--json"]
        assert main(call) == 0
        judged = json.loads(capsys.readouterr().out)["sets"]["mini_digits"]["knn"]
        assert judged["pretrained"] == pytest.approx(own["mini_digits"])
    assert main(["spectra", str(tmp_path / "adapter")]) == 2
    assert "holds an adapter alone" in capsys.readouterr().err


def test_an_untouched_encoder_is_not_exported_but_what_trained_beside_it_is(curve_run, tmp_path, capsys, monkeypatch):
    from wlsup.approaches import approach_class

    lit = approach_class("lit")().eval()
    lit.start.remember(lit)
    monkeypatch.setattr(configuration, "load_run", lambda folder: (lit, None))
    assert main(["export", str(curve_run), "-o", str(tmp_path / "no")]) == 2
    assert "there is no encoder to export" in capsys.readouterr().err
    assert main(["export", str(curve_run), "-o", str(tmp_path / "yes"), "--adapter-only"]) == 0
    assert all(name.startswith("head.") for name in load_file(tmp_path / "yes" / "adapter_model.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["yes"]


def test_a_failure_leaves_nothing_behind(curve_run, tmp_path, monkeypatch):
    from wlsup.cli import model_card

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_card, "model_card", fail)
    assert main(["export", str(curve_run), "-o", str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
