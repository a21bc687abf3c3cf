"""Every source and every published set, from its native files to results.json, by the commands a user types."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from data_makers import noise_jpeg, write_tar  # noqa: E402
from native import (  # noqa: E402
    coco_json,
    write_cc3m,
    write_cc3m_shards,
    write_coco,
    write_imagenet_captions,
    write_published,
)

from wlsup.cli import main  # noqa: E402
from wlsup.data.shards import ShardSample, write_shards  # noqa: E402

DOMAINS = {"cifar10": "in", "cifar100": "in", "svhn": "out", "eurosat": "out", "dtd": "out", "imagenet": "in"} | {
    "imagenet_v2": "in",
    "imagenet_a": "out",
    "imagenet_r": "out",
    "imagenet_sketch": "out",
}


def write_table(folder):
    names = [f"{i:03d}.jpg" for i in range(24)]
    folder.mkdir()
    images = write_tar(folder / "photos.tar", {name: noise_jpeg(i) for i, name in enumerate(names)})
    (folder / "captions.csv").write_text("image,caption\n" + "".join(f"{name},picture {name}\n" for name in names))
    return {"captions": str(folder / "captions.csv"), "images": str(images)}


def write_own_shards(folder):
    write_shards(
        [ShardSample(f"{i:03d}.jpg", noise_jpeg(i), ".jpg", [f"picture {i}"]) for i in range(24)],
        folder,
        samples_per_shard=7,
    )
    return {"images": str(folder)}


# what is written where -> (source, its paths), with the published set that is scored beside it
SOURCES = {
    "coco, a folder": ("coco", lambda folder: write_coco(folder, coco_json(24)), "cifar10"),
    "coco, a zip": ("coco", lambda folder: write_coco(folder, coco_json(24), zipfile.ZIP_STORED), "cifar100"),
    "CC-3M, TSV and folder": ("conceptual_captions", write_cc3m, "svhn"),
    "CC-3M, img2dataset's shards": ("conceptual_captions", write_cc3m_shards, "eurosat"),
    "ImageNet-Captions": ("imagenet_captions", lambda folder: write_imagenet_captions(folder, each=12), "dtd"),
    "ImageNet's class names": (
        "imagenet_class_names",
        lambda folder: {"images": write_imagenet_captions(folder, each=12)["images"]},
        "imagenet",
    ),
    "a table and a tar": ("table", write_table, "cifar10"),
    "our own shards": ("shards", write_own_shards, "dtd"),
}


def fit(folder, source, paths, *options, eval_sets=(), root=None, approach="film"):
    """Train two steps; return the exit code and results.json."""
    arguments = ["fit", "-c", "experiments/base.yaml", "-c", f"experiments/{approach}.yaml"]
    arguments += ["--data.source", source, "--run_dir", str(folder), "--trainer.max_epochs", "1"]
    for option, path in paths.items():
        arguments += [f"--data.{option}", path]
    if "--data.manifest" not in options:
        arguments += ["--data.pairs", "16"]
    arguments += ["--data.validation_pairs", "4", "--data.batch_size", "8", "--data.eval_sets", json.dumps(eval_sets)]
    if root is not None:
        arguments += ["--data.root", str(root)]
    code = main([*arguments, *map(str, options)])
    results = folder / "results.json"
    return code, json.loads(results.read_text()) if results.exists() else None


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_and_a_set_go_from_their_native_files_to_results(case, tmp_path, capsys):
    source, write, eval_set = SOURCES[case]
    write_published(tmp_path / "data", eval_set)
    code, results = fit(
        tmp_path / "run", source, write(tmp_path / "source"), eval_sets=[eval_set], root=tmp_path / "data"
    )
    assert code == 0, capsys.readouterr().err
    assert results["captions"]["source"] == source
    assert (results["captions"]["pairs"], results["steps"], results["samples_seen"]) == (16, 2, 16)
    assert results["captions"]["skipped"] == {}
    entry = results["knn"][eval_set]
    assert entry["domain"] == DOMAINS[eval_set]
    assert 0 <= entry["finetuned"] <= 1
    assert results["retrieval"]["pairs"] == 4


def test_all_published_sets_are_scored_without_training(tmp_path, capsys):
    for name in DOMAINS:
        write_published(tmp_path, name)
    assert main(["knn", "mini", "--sets", ",".join(DOMAINS), "--root", str(tmp_path), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["knn"]
    assert {name: entry["domain"] for name, entry in scored.items()} == DOMAINS
    assert (scored["cifar10"]["train"], scored["cifar10"]["test"]) == (100, 20)
    assert scored["eurosat"]["train"] + scored["eurosat"]["test"] == 150


def test_the_environment_names_the_root_and_a_run_is_scored_on_other_sets(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WLSUP_DATA", str(write_published(write_published(tmp_path / "data", "dtd"), "cifar10")))
    code, results = fit(tmp_path / "run", "table", write_table(tmp_path / "table"), eval_sets=["dtd"])
    assert code == 0
    capsys.readouterr()
    assert main(["knn", str(tmp_path / "run"), "--sets", "cifar10,dtd", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["knn"]
    assert list(scored) == ["cifar10", "dtd"]
    k = str(results["knn"]["dtd"]["k"])
    assert scored["dtd"]["accuracy"][k] == results["knn"]["dtd"]["finetuned"]
    monkeypatch.delenv("WLSUP_DATA")
    assert main(["knn", str(tmp_path / "run"), "--root", str(tmp_path / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["knn"] == {"dtd": scored["dtd"]}


@pytest.mark.parametrize("case", ["coco, a folder", "CC-3M, img2dataset's shards", "a table and a tar"])
def test_a_run_keeps_its_manifest_and_another_replays_it(case, tmp_path):
    source, write, _ = SOURCES[case]
    paths = write(tmp_path / "source")
    _, results = fit(tmp_path / "run", source, paths)
    manifest = tmp_path / "run" / "manifest.txt"
    assert results["captions"]["manifest_sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    keys = manifest.read_text().splitlines()
    assert len(keys) == len(set(keys)) == 16
    code, again = fit(tmp_path / "again", source, paths, "--data.manifest", manifest, "--seed_everything", 1)
    assert code == 0
    assert (tmp_path / "again" / "manifest.txt").read_bytes() == manifest.read_bytes()
    assert again["captions"] == results["captions"]
    fewer = tmp_path / "fewer.txt"
    fewer.write_text("".join(f"{key}\n" for key in keys[::2]))
    _, half = fit(tmp_path / "half", source, paths, "--data.manifest", fewer)
    assert half["captions"]["pairs"] == 8
    assert (tmp_path / "half" / "manifest.txt").read_text().splitlines() == keys[::2]


def test_env_json_says_which_decoder_read_the_pictures(tmp_path):
    paths = write_table(tmp_path / "table")
    fit(tmp_path / "run", "table", paths)
    decoder = json.loads((tmp_path / "run/env.json").read_text())["image_decoder"]
    from wlsup.data.decoders import available_decoders, decoders_used

    assert decoder == {"asked": "auto", **decoders_used(), "available": list(available_decoders())}
    fit(tmp_path / "exact", "table", paths, "--data.decoder", "pil")
    decoder = json.loads((tmp_path / "exact/env.json").read_text())["image_decoder"]
    assert (decoder["asked"], decoder["whole"], decoder["reduced"]) == ("pil", "pil", "pil")


def test_prepared_shards_train_as_the_source_they_came_from(tmp_path, capsys):
    paths = write_coco(tmp_path / "coco", coco_json(24))
    _, whole = fit(tmp_path / "run", "coco", paths)
    capsys.readouterr()
    arguments = ["--captions", paths["captions"], "--images", paths["images"], "--shard-size", "5"]
    assert main(["data", "prepare", "coco", *arguments, "--out", str(tmp_path / "shards"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == 5
    assert main(["data", "check", "shards", "--images", str(tmp_path / "shards")]) == 0
    shards = {"images": str(tmp_path / "shards")}
    code, results = fit(tmp_path / "sharded", "shards", shards)
    assert code == 0
    assert results["captions"] == {**whole["captions"], "source": "shards"}
    assert results["retrieval"] == whole["retrieval"]  # the same pairs, the same crops, the same captions
    code, results = fit(tmp_path / "window", "shards", shards, "--data.shuffle_window", 2, "--data.num_workers", 2)
    assert (code, results["captions"]["manifest_sha256"]) == (0, whole["captions"]["manifest_sha256"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.eval_sets", "[cifar11]"], "Did you mean 'cifar10'?"),
        (["--data.eval_sets", "[svhn]"], "wlsup data fetch svhn"),
        (["--data.eval_sets", "[{name: x, kind: imagefolder, images: /nowhere/x}]"], "/nowhere/x"),
        (["--data.eval_sets", "[{name: x, images: ., labels: /nowhere.csv}]"], "labels of eval set 'x'"),
        (["--data.eval_sets", "[mini_digits, {name: mini_digits, images: .}]"], "Two eval sets are called"),
        (["--data.source", "cocoo"], "Did you mean 'coco'?"),
        (["--data.source_options", "{colour: 1}"], "option of source 'table'"),
        (["--data.captions", "/nowhere/captions.csv"], "data.captions: no such file"),
        (["--data.images", "/nowhere/photos"], "data.images: no such file"),
        (["--data.manifest", "/nowhere/manifest.txt"], "data.manifest: no such file"),
        (["--data.decoder", "jpegli"], "Unknown decoder"),
    ],
)
def test_what_is_wrong_before_the_run_leaves_no_folder(options, said, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    paths = write_table(tmp_path / "table")
    recipe.write_text(yaml.safe_dump({"data": {"source": "table", "root": str(tmp_path / "data"), **paths}}))
    recipes = ["-c", "experiments/base.yaml", "-c", "experiments/film.yaml", "-c", str(recipe)]
    assert main(["fit", *recipes, "--runs", str(tmp_path / "runs"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: target"),
        (["mini", "--sets", "cifar11"], "Did you mean 'cifar10'?"),
        (["mini", "--sets", "dtd", "--root", "/nowhere"], "Looked in /nowhere/dtd and /nowhere"),
        (["mini", "--set", "dtd"], "`wlsup knn --help`"),
        (["mini", "--batch-size", "0"], "--batch-size 0: give a positive number"),
        (["mini", "--workers", "-1"], "--workers -1: give 0 or a positive number"),
        (["mini", "--sets", "dtd,dtd"], "Two eval sets are called 'dtd'"),
    ],
)
def test_mistakes_of_knn_end_in_one_message(arguments, said, capsys):
    assert main(["knn", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
