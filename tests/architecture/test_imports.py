"""The direction of imports, and lightning's confinement, as the design draws them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "wlsup"
BOTTOM = {
    "batch",
    "checkpoint_file",
    "draws",
    "errors",
    "files",
    "moving_average",
    "plan",
    "optim",
    "ranks",
    "sharding",
    "waiting",
}
METHODS = {"objectives", "adapters", "fusion", "moe", "reprogramming", "models", "selection"}
ALLOWED = {
    "cli": {"cli", "approaches", "callbacks", "evaluation", "data", *METHODS, *BOTTOM},
    "approaches": {"approaches", *METHODS, *BOTTOM},
    "callbacks": {"callbacks", "evaluation", "objectives", *BOTTOM},
    "evaluation": {"evaluation", "batch", "errors", "files", "ranks", "waiting"},
    "data": {"data", "batch", "errors", "files", "waiting"},
    "models": {"models", "batch", "draws", "errors", "files", "plan", "sharding"},
    "adapters": {"adapters", "batch", "errors", "plan"},
    "fusion": {"fusion", "adapters", "batch", "errors", "plan"},
    "moe": {"moe", "models", "batch", "draws", "errors", "plan", "ranks"},
    "reprogramming": {
        "reprogramming",
        "models",
        "batch",
        "draws",
        "errors",
        "moving_average",
        "plan",
        "optim",
        "ranks",
    },
    "selection": {"selection", "batch", "errors", "ranks"},
    "objectives": {"objectives", "models", "batch", "draws", "errors", "ranks"},
    "plan": {"errors"},
    "optim": {"errors", "sharding"},
    "sharding": {"errors"},
    "waiting": {"errors"},
    "batch": {"draws"},
    "checkpoint_file": {"errors", "files"},
    "draws": {"ranks"},
    "errors": set(),
    "files": set(),
    "ranks": set(),
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ALLOWED)


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards_only(path):
    part = part_of(path)
    for name in imports_of(path):
        if name.startswith("wlsup."):
            target = name.split(".")[1]
            assert target in ALLOWED[part], f"{path.name} ({part}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lightning_is_imported_only_where_training_is_driven(path):
    relative = path.relative_to(PACKAGE)
    allowed = relative.parts[0] in {"cli", "approaches", "callbacks"} or str(relative) == "data/keyed_datamodule.py"
    named = {name.split(".")[0] for name in imports_of(path)} & {"lightning", "pytorch_lightning"}
    assert allowed or not named, f"{relative} imports {named}"


def test_approaches_never_import_one_another():
    for path in (PACKAGE / "approaches").glob("*.py"):
        others = {name for name in imports_of(path) if name.startswith("wlsup.approaches.")}
        assert others <= {"wlsup.approaches.base", "wlsup.approaches.checkpoint"}, f"{path.name} imports {others}"


def test_the_approach_base_stays_thin():
    assert len((PACKAGE / "approaches" / "base.py").read_text().splitlines()) <= 150


def test_one_name_everywhere():
    from wlsup.adapters.base import ADAPTERS
    from wlsup.approaches import APPROACHES

    for name in APPROACHES:
        assert (PACKAGE / "approaches" / f"{name}.py").is_file()
        assert (ROOT / "experiments" / f"{name}.yaml").is_file()
    for path in (PACKAGE / "adapters").glob("[a-z]*.py"):
        if path.stem != "base":
            __import__(f"wlsup.adapters.{path.stem}")
            assert path.stem in {*ADAPTERS, "language"}  # of a language model, not of an encoder
            assert (ROOT / "tests" / "adapters" / f"test_{path.stem}.py").is_file()


def test_no_assert_and_no_path_of_a_machine_in_the_product():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], path
