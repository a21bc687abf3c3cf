"""``wlsup upcycle``: a dense checkpoint in, an MoE checkpoint out, and back; one message for what is wrong."""

import json
import shutil

import pytest
import torch

from wlsup.cli import main
from wlsup.models.caption_tokens import MINI_LANGUAGE
from wlsup.models.language import LanguageModel, LanguageSpec
from wlsup.models.saving import save_vision
from wlsup.models.sources import MINI_FOLDER
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.moe.checkpoint import load_moe, read_expert
from wlsup.moe.upcycle import moe_layers


def report(capsys, *arguments):
    assert main(["upcycle", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def test_the_mini_encoder_there_and_back(tmp_path, capsys):
    said = report(capsys, "mini", tmp_path / "moe", "--experts", 4, "--k", 2)
    assert said["kind"] == "vision"
    assert said["layers"] == [f"backbone.blocks.{index}.mlp" for index in (1, 3, 5)]
    assert said["relative_error"] <= 1e-5
    dense, upcycled = build_vision(VisionSpec()).eval(), load_moe(tmp_path / "moe").eval()
    images = torch.randn(2, 3, 64, 64)
    assert (upcycled.features(images) - dense.features(images)).abs().max() <= 1e-6
    mlp, router = 2 * 96 * 384 + 96 + 384, 4 * 96
    count = sum(parameter.numel() for parameter in dense.parameters())
    assert said["parameters"] == {
        "dense": count,
        "moe": count + 3 * (3 * mlp + router),
        "active": count + 3 * (mlp + router),
    }
    # weights alone: the optimizer's state starts from scratch
    assert {path.name for path in (tmp_path / "moe").iterdir()} == {"config.json", "model.safetensors"}
    assert set(read_expert(tmp_path / "moe", 3, 1)) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    back = report(capsys, tmp_path / "moe", tmp_path / "dense", "--dense")
    assert back["parameters"] == count
    again = build_vision(VisionSpec(weights=str(tmp_path / "dense"))).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize(
    ("options", "layers"), [(["--every", 3], [2, 5]), (["--last", 2], [4, 5]), (["--blocks", "0,4"], [0, 4])]
)
def test_which_blocks(options, layers, tmp_path, capsys):
    said = report(capsys, "mini", tmp_path / "moe", "--experts", 2, *options)
    assert said["layers"] == [f"backbone.blocks.{index}.mlp" for index in layers]


def test_a_local_safetensors_file_and_a_folder(tmp_path, capsys):
    folder = save_vision(build_vision(VisionSpec()), tmp_path / "own")
    for weights in (folder, folder / "model.safetensors"):
        out = tmp_path / f"moe{weights.suffix}"
        said = report(capsys, weights, out, "--experts", 2, "--last", 1, "--dtype", "float16")
        assert said["relative_error"] <= 1e-5
        assert moe_layers(load_moe(out))


@torch.no_grad()
def test_a_language_model_by_name_or_by_what_its_folder_says(tmp_path, capsys):
    named = report(capsys, "mini", tmp_path / "a", "--kind", "language", "--experts", 2, "--router", "hash")
    assert named["kind"] == "language"
    assert named["layers"] == ["model.transformer.h.1.mlp", "model.transformer.h.3.mlp"]
    assert named["relative_error"] <= 1e-5
    report(capsys, "mini", tmp_path / "s", "--kind", "language", "--experts", 2, "--router", "hash", "--seed", 1)
    tables = [moe_layers(load_moe(tmp_path / name))["model.transformer.h.1.mlp"].router.table for name in ("a", "s")]
    assert not torch.equal(*tables)
    copied = shutil.copytree(MINI_LANGUAGE, tmp_path / "lm")
    assert report(capsys, copied, tmp_path / "b", "--experts", 2)["kind"] == "language"
    report(capsys, tmp_path / "b", tmp_path / "dense", "--dense")
    one = LanguageModel(LanguageSpec()).state_dict()
    two = LanguageModel(LanguageSpec(weights=str(tmp_path / "dense"))).state_dict()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("kind", ["vision", "language"])
def test_clusters(kind, tmp_path, capsys):
    said = report(
        capsys, "mini", tmp_path / "moe", "--kind", kind, "--experts", 3, "--clusters", "--tokens", 2000, "--last", 2
    )
    assert set(said["clusters"]) == set(said["layers"])
    for made in said["clusters"].values():
        assert sum(made["shares"]) == pytest.approx(1)
        assert 0 < made["error"] < 0.3
    assert 0 < said["relative_error"] < 0.5
    layer = next(iter(moe_layers(load_moe(tmp_path / "moe")).values()))
    assert torch.allclose(layer.router.weight.norm(dim=1), torch.ones(3), atol=1e-5)
    assert main(["upcycle", str(tmp_path / "moe"), str(tmp_path / "dense"), "--dense"]) == 2
    assert "its experts differ" in capsys.readouterr().err


@torch.no_grad()
def test_noise_comes_on_top_of_clusters(tmp_path, capsys):
    options = ["--experts", 2, "--last", 2, "--clusters", "--tokens", 500]
    plain = report(capsys, "mini", tmp_path / "plain", *options)
    noisy = report(capsys, "mini", tmp_path / "noisy", *options, "--noise", 0.1)
    assert noisy["clusters"] == plain["clusters"]  # whose error is against the MLP without noise
    assert noisy["relative_error"] != plain["relative_error"]
    draws = []
    layers = [moe_layers(load_moe(tmp_path / name)).values() for name in ("plain", "noisy")]
    for before, after in zip(*layers, strict=True):
        assert torch.equal(after.router.weight, before.router.weight)
        for old, new in zip(before.experts, after.experts, strict=True):
            assert torch.equal(new.fc1.bias, old.fc1.bias)
            for name in ("fc1", "fc2"):
                weight = getattr(old, name).weight
                draw = (getattr(new, name).weight - weight) / weight.std()
                assert float(draw.std()) == pytest.approx(0.1, rel=0.05)
                draws.append(draw.flatten())
    assert (torch.stack(draws).corrcoef() - torch.eye(len(draws))).abs().max() < 0.1  # each its own


def test_clusters_of_own_pictures_and_texts(tmp_path, capsys):
    from torchvision.io import write_png

    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(4):
        write_png(torch.randint(256, (3, 70, 80), dtype=torch.uint8), str(folder / f"{index}.png"))
    own = shutil.copytree(MINI_FOLDER, tmp_path / "own")
    options = ["--experts", 2, "--last", 1, "--clusters", "--tokens", 200]
    assert report(capsys, own, tmp_path / "a", *options, "--images", folder)["clusters"]
    texts = tmp_path / "texts.txt"
    texts.write_text("a red square\n\na blue circle left of a dog\n" * 20)
    lm = shutil.copytree(MINI_LANGUAGE, tmp_path / "lm")
    assert report(capsys, lm, tmp_path / "b", *options, "--text", texts)["clusters"]
    for weights, said in ((own, "give --images"), (lm, "give --text")):
        assert main(["upcycle", str(weights), str(tmp_path / "c"), *map(str, options)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_the_table_says_layers_counts_and_the_error(tmp_path, capsys):
    assert main(["upcycle", "mini", str(tmp_path / "moe"), "--experts", "2", "--last", "1"]) == 0
    said = capsys.readouterr().out
    assert "backbone.blocks.5.mlp" in said
    assert "active a token" in said
    assert "relative error against the dense model" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--combine", "raw"], "--allow-change"),
        (["--router", "soft"], "mixes tokens"),
        (["--router", "hash"], "patches do not have"),
        (["--router", "topk"], "Did you mean 'top_k'?"),
        (["--every", "2", "--last", "1"], "every and last together"),
        (["--blocks", "1,x"], "--blocks 1,x: give numbers"),
        (["--blocks", "6"], "0 to 5"),
        (["--experts", "0"], "--experts 0"),
        (["--k", "9"], "k between 1 and experts"),
        (["--kind", "audio"], "Valid: vision, language"),
        (["--dtype", "int8"], "float32, bfloat16, float16"),
        (["--images", "x"], "nothing reads --images: add --clusters"),
        (["--text", "x"], "nothing reads --text: add --clusters"),
        (["--energy", "0.99", "--tokens", "16384"], "nothing reads --tokens, --energy: add --clusters"),
        (["--noise", "-0.1", "--clusters"], "--noise -0.1: give 0 or a positive number"),
        (["--clusters", "--images", "nowhere"], "--images: no such file or folder"),
        (["--clusters", "--text", "x"], "--text is for language models"),
        (["--kind", "language", "--router", "soft", "--allow-change"], "not causal"),
        (["--dense"], "No such file"),
        *(
            (["--dense", *option.split()], f"takes --json alone: leave {option.split()[0]} out")
            for option in (
                "--kind vision",
                "--experts 8",
                "--k 1",
                "--every 2",
                "--last 1",
                "--blocks 1",
                "--router top_k",
                "--combine straight_through",
                "--capacity 1",
                "--noise 0",
                "--seed 0",
                "--clusters",
                "--energy 0.9",
                "--images x",
                "--text x",
                "--tokens 9",
                "--allow-change",
                "--dtype float16",
            )
        ),
        (["--what"], "wlsup upcycle --help"),
    ],
)
def test_wrong_input_is_one_message_and_writes_nothing(options, said, tmp_path, capsys):
    assert main(["upcycle", "mini", str(tmp_path / "moe"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "moe").exists()


@torch.no_grad()
def test_in_half_precision_the_error_is_that_of_the_file(tmp_path, capsys):
    said = report(capsys, "mini", tmp_path / "moe", "--kind", "language", "--experts", 2, "--dtype", "bfloat16")
    dense, again = LanguageModel(LanguageSpec()), load_moe(tmp_path / "moe")
    ids = torch.randint(dense.vocabulary, (4, 16))
    wanted = dense(dense.embed(ids))
    assert float((again(again.embed(ids)) - wanted).norm() / wanted.norm()) == pytest.approx(
        said["relative_error"], rel=0.3
    )
    assert said["relative_error"] > 1e-4


def test_a_folder_that_cannot_be_upcycled_is_told_apart(tmp_path, capsys):
    report(capsys, "mini", tmp_path / "moe", "--experts", 2)
    assert main(["upcycle", str(tmp_path / "moe"), str(tmp_path / "again")]) == 2
    assert "is upcycled already. Give a dense model, or get it back with --dense." in capsys.readouterr().err
    (tmp_path / "phi").mkdir()
    config = {"model_type": "phi", "architectures": ["PhiForCausalLM"]}
    (tmp_path / "phi" / "config.json").write_text(json.dumps(config))
    assert main(["upcycle", str(tmp_path / "phi"), str(tmp_path / "again")]) == 2
    assert "of the family 'phi', which is not known here. Those that are: gpt2," in capsys.readouterr().err


def test_unknown_weights_and_a_full_folder(tmp_path, capsys):
    assert main(["upcycle", "vit_tinyy", str(tmp_path / "moe")]) == 2
    assert "Unknown vision weights 'vit_tinyy'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["upcycle", "mini", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_change_that_was_allowed_is_told(tmp_path, capsys):
    said = report(capsys, "mini", tmp_path / "moe", "--combine", "raw", "--allow-change")
    assert said["relative_error"] > 1e-2
