"""A captioner from Flickr8k's own layout to scores over five references, and `wlsup caption` with what it trained."""

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from data_makers import noise_jpeg, write_tar  # noqa: E402

from wlsup.cli import main  # noqa: E402
from wlsup.cli.caption import _generation  # noqa: E402
from wlsup.evaluation.captions import score_captions  # noqa: E402
from wlsup.models.language import GenerationSpec  # noqa: E402

WORDS = "a dog cat runs sleeps on in the grass bed red small two people ball".split()  # noqa: SIM905


def flickr8k(folder):
    """Pictures in Images/ of a tar and five captions each, ended by a full stop, as published."""
    rng, names = random.Random(0), [f"{1000 + i}_{i:08x}.jpg" for i in range(24)]
    rows = [f"{name},{' '.join(rng.choices(WORDS, k=7)).capitalize()} ." for name in names for _ in range(5)]
    (folder / "captions.txt").write_text("image,caption\n" + "\n".join(rows) + "\n")
    write_tar(folder / "images.tar", {f"Images/{name}": noise_jpeg(i) for i, name in enumerate(names)})
    return rows


def fit(run, folder, *options, approach="mae_lm"):
    assert (
        main(
            ["fit", "-c", "experiments/base.yaml", "-c", f"experiments/{approach}.yaml", "--data.source", "table",
             "--data.captions", str(folder / "captions.txt"), "--data.images", str(folder / "images.tar"),
             "--data.pairs", "16", "--data.validation_pairs", "8", "--data.batch_size", "8", "--data.eval_sets", "[]",
             "--trainer.max_epochs", "1", "--run_dir", str(run), *options]
        )
        == 0
    )  # fmt: skip
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flickr8k")
    flickr8k(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("run")
    fit(folder, source, "--captioning.pictures", "6", "--captioning.samples", "6")
    return folder


@pytest.fixture(scope="module")
def hashed_run(tmp_path_factory, source):
    """A run whose table of hash routing is made of its own captions, and whose experts differ enough for it to tell."""
    folder = tmp_path_factory.mktemp("hashed_run")
    moe = ["--model.moe.router", "hash", "--model.moe.hash", "balanced", "--model.moe.k", "1"]
    fit(folder, source, *moe, "--model.lr", "3e-2", "--captioning.pictures", "6", "--captioning.samples", "6",
        "--captioning.every_n_epochs", "0", approach="magma_moe")  # fmt: skip
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "one.jpg"
    path.write_bytes(noise_jpeg(1))
    return path


def test_all_five_references_of_each_picture_are_scored_against(run, source):
    captioning = json.loads((run / "results.json").read_text())["captioning"]
    assert (captioning["pictures"], captioning["references"]) == (6, 30)
    written = {}
    for row in (source / "captions.txt").read_text().splitlines()[1:]:
        name, _, caption = row.partition(",")
        written.setdefault(name, []).append(caption)
    samples = captioning["samples"]
    assert len(samples) == 6
    assert all(sample["references"] == written[sample["key"]] for sample in samples)
    expected = score_captions([sample["generated"] for sample in samples], [written[s["key"]] for s in samples])
    for name, entry in expected["scores"].items():
        assert captioning["scores"][name] == entry
    assert captioning["scores"]["loss"]["value"] > 0
    assert captioning["protocol"] == expected["protocol"]


def test_the_same_seed_gives_the_same_scores_and_a_table_is_shown(run, source, tmp_path, capsys):
    again = fit(tmp_path / "run", source, "--captioning.pictures", "6", "--captioning.samples", "6")
    assert again["captioning"] == json.loads((run / "results.json").read_text())["captioning"]
    shown = capsys.readouterr().out
    assert "Captions of 6 held-out pictures, 30 human captions: mae_lm, greedy" in shown
    assert "CIDEr-D" in shown


def test_fewer_pictures_are_some_of_more(source):
    from wlsup.data.datamodule import CaptionDataModule

    data = CaptionDataModule(
        source="table", captions=str(source / "captions.txt"), images=str(source / "images.tar"), pairs=8,
        validation_pairs=12,
    )  # fmt: skip
    from wlsup.batch import ImageSpec

    data.image_spec = ImageSpec(size=16, resize=16)
    few, many = (data.held_out(pictures)[1] for pictures in (4, 8))
    assert len(few) == 4
    assert few.items() < many.items()
    loader, everything = data.held_out(100)
    batches = list(loader)
    assert [key for batch in batches for key in batch.keys] == list(everything) == sorted(everything)
    assert batches[0].images.shape == (12, 3, 16, 16)
    assert data.held_out(0) == ([], {})


@pytest.mark.parametrize(("approach", "which"), [("mae_lm", "run"), ("magma_moe", "hashed_run")])
def test_a_picture_is_captioned_as_the_run_captions_its_own(approach, which, source, tmp_path, capsys, request):
    import tarfile

    run = request.getfixturevalue(which)
    capsys.readouterr()
    samples = json.loads((run / "results.json").read_text())["captioning"]["samples"]
    with tarfile.open(source / "images.tar") as tar:
        for sample in samples:
            (tmp_path / sample["key"]).write_bytes(tar.extractfile(f"Images/{sample['key']}").read())
    assert main(["caption", str(run), str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {Path(row["image"]).name: row["caption"] for row in said["captions"]} == {
        sample["key"]: sample["generated"] for sample in samples
    }
    assert (said["approach"], said["generation"]["method"], said["skipped"]) == (approach, "greedy", {})


def test_one_line_a_picture_and_what_a_folder_holds_of_other_files_is_left_out(run, picture, capsys):
    (picture.parent / "broken.png").write_bytes(b"nothing")
    (picture.parent / "notes.txt").write_text("x")
    assert main(["caption", str(run), str(picture.parent), str(picture)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"{picture}: ")
    assert "broken.png" in captured.err
    assert "notes" not in captured.err


def test_the_method_is_the_one_asked_for(run, picture, capsys):
    def said(*options):
        assert main(["caption", str(run), str(picture), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    seeds = [said("--method", "nucleus", "--temperature", "3", "--seed", str(seed)) for seed in (1, 1, 2)]
    captions = [result["captions"][0]["caption"] for result in seeds]
    assert captions[0] == captions[1] != captions[2]
    beam = said("--method", "beam", "--beams", "2", "--max-tokens", "3")
    assert (beam["generation"]["method"], beam["generation"]["beams"]) == ("beam", 2)
    assert len(beam["captions"][0]["caption"].split()) <= 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["{run}"], "IMAGE"),
        (["/nowhere", "{picture}"], "No finished run in /nowhere: it has no config.yaml"),
        (["{unfinished}", "{picture}"], "it has no checkpoints/last.ckpt"),
        (["{film}", "{picture}"], "does not caption. Those that do: mae_lm, linear_map"),
        (["{run}", "/nowhere.jpg"], "No picture /nowhere.jpg"),
        (["{run}", "{empty}"], "No picture in"),
        (["{run}", "{broken}"], "broken.png cannot be read"),
        (["{run}", "{broken_folder}"], "None of the 1 pictures can be read"),
        (["{run}", "{picture}", "--method", "beem"], "Did you mean 'beam'?"),
        (["{run}", "{picture}", "--beams", "3"], "--beams is of --method beam"),
        (["{run}", "{picture}", "--method", "nucleus", "--top-p", "2"], "top_p in (0, 1]"),
        (["{run}", "{picture}", "--batch-size", "0"], "--batch-size 0"),
    ],
)
def test_mistakes_are_one_message(options, said, run, picture, tmp_path, capsys):
    places = {"run": run, "picture": picture}
    for name in ("unfinished", "film", "empty", "broken_folder"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        places[name] = tmp_path / name
    for name in ("unfinished", "film"):
        (tmp_path / name / "config.yaml").write_text("approach: film\n")
    (tmp_path / "film" / "checkpoints" / "last.ckpt").write_bytes(b"x")
    places["broken"] = tmp_path / "broken_folder" / "broken.png"
    places["broken"].write_bytes(b"nothing")
    assert main(["caption", *(option.format(**places) for option in options)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert len([line for line in captured.err.splitlines() if "error" in line]) == 1
    assert not captured.out


def test_a_decoder_of_its_own_takes_no_method(run, picture, tmp_path, capsys, monkeypatch):
    import torch

    from wlsup.approaches.mae_lm import MaeLM
    from wlsup.cli import configuration
    from wlsup.objectives.captioning import CaptioningSpec

    torch.manual_seed(0)
    model = MaeLM(objective=CaptioningSpec(captioning="parallel")).eval()
    monkeypatch.setattr(configuration, "load_run", lambda folder: (model, None))
    assert main(["caption", str(run), str(picture), "--method", "beam"]) == 2
    assert "always takes the likeliest words" in capsys.readouterr().err
    assert main(["caption", str(run), str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generation"] is None


def test_a_damaged_checkpoint_is_refused(run, picture, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "checkpoints" / "last.ckpt").write_bytes(b"x")
    assert main(["caption", str(tmp_path / "copy"), str(picture)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_another_method_leaves_what_the_run_says_of_its_own():
    model = SimpleNamespace(language=object(), generation=GenerationSpec("nucleus", max_tokens=9, top_p=0.5))
    asked = dict.fromkeys(("method", "max_tokens", "beams", "top_p", "temperature", "seed"))
    assert _generation(model, SimpleNamespace(**asked)) == model.generation
    assert _generation(model, SimpleNamespace(**asked | {"method": "greedy"})) == GenerationSpec(max_tokens=9)
    beam = _generation(model, SimpleNamespace(**asked | {"method": "beam", "beams": 3}))
    assert beam == GenerationSpec("beam", max_tokens=9, beams=3)
