"""Shared by all tests: a small encoder, text encoder and batch, and the suite's registries filled."""

import importlib
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"

for path in sorted((ROOT / "wlsup" / "adapters").glob("[a-z]*.py")):
    importlib.import_module(f"wlsup.adapters.{path.stem}")


@pytest.fixture
def shared_data():
    """The folder of real pictures, where there is one."""
    if not SHARED.is_dir():
        pytest.skip("the real pictures of ../shared/data are not here")
    return SHARED


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
