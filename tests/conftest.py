"""Shared by all tests: a small encoder, text encoder and batch, and the suite's registries filled."""

import importlib
import logging
import os
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

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


@pytest.fixture(scope="session")
def in_processes():
    """Run ``work(rank, world, folder)``, a function of a test module, in so many processes, and wait for them."""

    def run(work, world, folder, timeout):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT)  # where the processes find the test's module, under its full name
            context = mp.spawn(work, (world, str(folder)), nprocs=world, join=False)
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    pytest.fail(f"{world} processes did not finish within {timeout} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()

    return run


@pytest.fixture(autouse=True)
def logs_as_they_were():
    """A command in one test sends the suite's lines elsewhere; the next test captures them again."""
    logger = logging.getLogger("wlsup")
    before = logger.propagate, logger.level, list(logger.handlers)
    yield
    logger.propagate, logger.level, logger.handlers[:] = before


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
