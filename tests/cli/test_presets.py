"""PRESET=paper of every approach: `make train` names recipes that fit it, and their values are what its recipe says."""

import shlex
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from wlsup.approaches import APPROACHES, approach_class
from wlsup.cli.configuration import configure
from wlsup.data.datamodule import CaptionDataModule


def command(name, preset="paper"):
    """What `make train` would run, without wlsup's own name."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    wanted = ["make", "-n", "train", f"APPROACH={name}", f"PRESET={preset}"]
    lines = subprocess.run(wanted, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    lines = lines.replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if "wlsup fit" in line]
    return shlex.split(line.partition("wlsup fit")[2])


@pytest.mark.parametrize("name", APPROACHES)
def test_the_paper_preset_fits_every_approach(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = command(name)
    assert any("overlays/paper" in argument for argument in arguments)
    given = " ".join((ROOT / one).read_text() for one in arguments if one.endswith(".yaml"))
    for part in ("text", "language", "encoder"):  # here there are the mini models only
        if f"\n  {part}:" in given and (part != "text" or "text" in approach_class(name).__init__.__annotations__):
            arguments += [f"--model.{part}.weights", "mini"]
    cli = configure(approach_class(name), CaptionDataModule, arguments, "fit", build=False)
    assert cli.config.preset == "paper"
    assert cli.config.data.pairs == 20000


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("full", "encoder_lr", 1e-5),
        ("mae_cl", "encoder_lr", 1e-5),
        ("selective_k", "encoder_lr", 1e-5),
        ("mae_lm", "encoder_lr", 1e-5),
        ("mae_cl", "decoder.warmup_batches", 80),
        ("mae_lm", "decoder.warmup_batches", 80),
        ("token_replay", "tokens", 16),
        ("bottleneck", "hidden", 64),
        ("lst", "reduction", 8),
        ("merged_attention", "fusion.width", 192),
        ("co_attention", "fusion.hidden", 384),
    ],
)
def test_an_approach_s_own_values_come_on_top(name, key, value, monkeypatch):
    monkeypatch.chdir(ROOT)
    reads = "language" if name == "mae_lm" else "text"
    mini = ["--model.encoder.weights", "mini", f"--model.{reads}.weights", "mini"]
    cli = configure(approach_class(name), CaptionDataModule, [*command(name), *mini], "fit", build=False)
    assert cli.config.model[key] == value
