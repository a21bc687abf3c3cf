"""The light front: help at once, commands and approaches checked before anything heavy is imported."""

import subprocess
import sys
import time

import pytest

from wlsup.approaches import APPROACHES
from wlsup.cli import COMMANDS, main


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["knn", "--help"], ["pretrain", "--help"]])
def test_help_imports_no_torch_and_takes_under_a_second(arguments):
    code = (
        "import sys; from wlsup.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(3 if {'torch', 'lightning', 'transformers', 'timm'} & set(sys.modules) else code)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "usage" in done.stdout or "commands" in done.stdout
    assert time.perf_counter() - started < 5  # the promise is one second; CI machines are slow and shared


def test_an_unknown_approach_is_refused_without_torch():
    code = (
        "import sys; from wlsup.cli import main; c = main(sys.argv[1:]); sys.exit(3 if 'torch' in sys.modules else c)"
    )
    arguments = ["fit", "-c", "experiments/base.yaml", "-c", "experiments/flim.yaml"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean 'film'?" in done.stderr
    assert all(name in done.stderr for name in APPROACHES)
    assert len(done.stderr.strip().splitlines()) == 1


def test_every_command_has_help_and_a_module(capsys):
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fti"], "Did you mean 'fit'?"),
        (["fit"], "No approach is named"),
        (["fit", "--approach", "x"], f"Valid: {', '.join(APPROACHES)}"),
        (["fit", "-c", "nowhere/x.yaml"], "No recipe nowhere/x.yaml"),
        (["inspect"], "Name an approach"),
        (["inspect", "fillm"], "Did you mean 'film'?"),
    ],
)
def test_one_message_and_exit_2(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_recipe_that_is_no_mapping_or_no_yaml_is_refused(tmp_path, capsys):
    for text, said in (("- a\n- b\n", "must be a YAML mapping"), ("a: [b\n", "not valid YAML")):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        assert main(["fit", "-c", str(path)]) == 2
        assert said in capsys.readouterr().err
