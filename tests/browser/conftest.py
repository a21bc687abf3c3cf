"""A headless Chromium of the system, driven through Playwright; without either the tests skip and say why."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from ..conftest import lacking

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation" / "report"))  # for run_maker

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync",
         "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # WebGL without a GPU  # fmt: skip


@pytest.fixture(scope="session")
def browser():
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        why = f"no browser: none of {', '.join(NAMES)} is installed"
        pytest.skip(why) if os.environ.get("WLSUP_NO_BROWSER") else lacking(why)  # CI, where none can be had
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install '.[test]'")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()
