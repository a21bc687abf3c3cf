"""The talk's three tables: without their weights and sets one sentence lists what to fetch; with stand-ins all runs."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from native import coco_json, write_cc3m, write_coco, write_imagenet_captions, write_published  # noqa: E402

from wlsup.cli import main  # noqa: E402
from wlsup.models.vision import VisionSpec, build_vision  # noqa: E402

SETS = ["cifar10", "cifar100", "svhn", "eurosat", "dtd"]
DOMAINS = ["in", "in", "out", "out", "out"]
TALK = {
    "token_replay_imagenet_captions": (
        "token_replay",
        20_000,
        ["imagenet_captions.json", "data/imagenet/train", "wlsup data fetch imagenet_captions"],
        lambda folder: write_imagenet_captions(folder, each=12),
        ("imagenet_captions/imagenet_captions.json", "imagenet/train"),
    ),
    "token_replay_cc3m": (
        "token_replay",
        20_000,
        ["Train_GCC-training.tsv", "data/cc3m/images", "wlsup data fetch cc3m"],
        write_cc3m,
        ("cc3m/Train_GCC-training.tsv", "cc3m/images"),
    ),
    "film_coco": (
        "film",
        10_000,
        ["captions_train2017.json", "data/coco/train2017", "wlsup data fetch coco"],
        lambda folder: write_coco(folder, coco_json(24)),
        ("coco/annotations/captions_train2017.json", "coco/train2017"),
    ),
}
ARCHITECTURE = "vit(img_size=32,patch_size=8,embed_dim=32,depth=3,num_heads=2)"


def fit(name, *options):
    recipes = ["experiments/base.yaml", f"experiments/{TALK[name][0]}.yaml", f"experiments/talk/{name}.yaml"]
    return main(["fit", *(part for recipe in recipes for part in ("-c", recipe)), *map(str, options)])


def test_there_is_a_recipe_for_each_table_and_it_names_the_talks_setting():
    assert {path.stem for path in Path("experiments/talk").glob("*.yaml")} == set(TALK)
    for name, (approach, pairs, *_) in TALK.items():
        recipe = yaml.safe_load(Path(f"experiments/talk/{name}.yaml").read_text())
        assert (recipe["approach"], recipe["data"]["pairs"]) == (approach, pairs)
        assert recipe["model"]["encoder"]["weights"] == "vit_base_patch16_224.dino"
        assert recipe["data"]["eval_sets"] == SETS


@pytest.mark.parametrize("name", TALK)
def test_without_weights_and_sets_one_sentence_lists_all_there_is_to_fetch(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wlsup.cli.lacking._in_cache", lambda repository: False)
    monkeypatch.setenv("WLSUP_DATA", str(tmp_path / "data"))
    assert fit(name, "--runs", tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    wanted = [*TALK[name][2], ", ".join(SETS), "hf download timm/vit_base_patch16_224.dino"]
    for part in [*wanted, "hf download openai/clip-vit-base-patch16"]:
        assert part in error, part
    assert not (tmp_path / "runs").exists()


def test_what_is_there_is_not_in_the_list(tmp_path, capsys):
    for name in ("cifar10", "svhn"):
        write_published(tmp_path, name)
    paths = TALK["film_coco"][3](tmp_path / "coco")
    (tmp_path / "vit.pt").write_bytes(b"")
    options = ["--data.captions", paths["captions"], "--data.images", paths["images"], "--data.root", tmp_path]
    options += ["--model.encoder.weights", tmp_path / "vit.pt", "--model.text.weights", "mini"]
    assert fit("film_coco", *options, "--runs", tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert "fetch the eval sets cifar100, eurosat, dtd (" in error
    assert "captions" not in error
    assert "weights" not in error


@pytest.mark.slow
@pytest.mark.parametrize("name", TALK)
def test_a_recipe_runs_whole_on_native_stand_ins(name, tmp_path, capsys):
    for eval_set in SETS:
        write_published(tmp_path / "data", eval_set)
    torch.manual_seed(0)
    encoder = build_vision(VisionSpec(weights="vit_tiny_patch16_224", architecture=ARCHITECTURE, pretrained=False))
    torch.save(encoder.backbone.state_dict(), tmp_path / "dino.pt")
    paths, places = TALK[name][3](tmp_path / "source"), TALK[name][4]
    for what, place in zip(("captions", "images"), places, strict=True):  # where `wlsup data fetch` puts them
        (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        Path(paths[what]).rename(tmp_path / "data" / place)
    options = ["--data.root", tmp_path / "data"]
    options += ["--model.encoder.weights", tmp_path / "dino.pt", "--model.encoder.architecture", ARCHITECTURE]
    options += ["--model.text.weights", "mini", "--model.decoder.width", 16, "--model.decoder.depth", 1]
    options += ["--model.decoder.heads", 2, "--data.batch_size", 8, "--data.pairs", 16, "--data.validation_pairs", 4]
    options += ["--data.num_workers", 0, "--trainer.precision", "32-true", "--trainer.max_epochs", 1]
    assert fit(name, *options, "--run_dir", tmp_path / "run") == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["preset"], results["steps"]) == ("talk", 2)
    assert [(set_, entry["domain"]) for set_, entry in results["knn"].items()] == list(zip(SETS, DOMAINS, strict=True))
    assert all(0 <= entry["finetuned"] <= 1 and len(entry["ci95"]) == 2 for entry in results["knn"].values())
    assert results["summary"]["out_of_domain_delta"] is not None
    assert "svhn" in capsys.readouterr().out
