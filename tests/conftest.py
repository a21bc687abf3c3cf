"""Shared by all tests: a small encoder, text encoder and batch, and the suite's registries filled."""

import functools
import importlib
import logging
import os
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from wlsup.draws import unshare

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"

for path in sorted((ROOT / "wlsup" / "adapters").glob("[a-z]*.py")):
    importlib.import_module(f"wlsup.adapters.{path.stem}")


def lacking(what):
    """Skip for want of something; where WLSUP_TEST_ALL says that it is to be there, as in CI, fail."""
    (pytest.fail if os.environ.get("WLSUP_TEST_ALL") else pytest.skip)(what)


@pytest.fixture
def shared_data():
    """The folder of real pictures, where there is one."""
    if not SHARED.is_dir():
        pytest.skip("the real pictures of ../shared/data are not here")
    return SHARED


@pytest.fixture(scope="session")
def in_processes():
    """Run ``work(rank, world, folder)``, a function of a test module, in so many processes, and wait for them.

    They are forked from a server that has imported what all of them need, which takes longer than most of the tests.
    Its environment, and the seed of hashes that all then share, are those of the first call; with ``alike=False`` each
    begins afresh, as a launcher starts it.
    """
    mp.get_context("forkserver").set_forkserver_preload(["wlsup.cli.configuration", "wlsup.data.datamodule"])

    def run(work, world, folder, timeout, alike=True):
        method = "forkserver" if alike else "spawn"
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT)  # where the processes find the test's module, under its full name
            context = mp.start_processes(work, (world, str(folder)), world, join=False, start_method=method)
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


@pytest.fixture(scope="module")
def few_mini_pictures():
    """200 train and 100 test pictures in each mini set, for tests of runs and not of their figures."""
    from wlsup.data import mini_evalsets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini_evalsets, "_TRAIN", 200)
        patch.setattr(mini_evalsets, "_TEST", 100)
        patch.setattr(mini_evalsets, "_pictures", functools.cache(mini_evalsets._pictures.__wrapped__))
        yield


@pytest.fixture(autouse=True)
def logs_captured():
    """A command in one test, or in a fixture of many, sends the suite's lines elsewhere; the next one captures them."""
    logger = logging.getLogger("wlsup")
    logger.propagate = True
    logger.handlers[:] = [handler for handler in logger.handlers if type(handler).__name__ != "_Terminal"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    unshare()  # a test that calls callbacks by hand may have left one
