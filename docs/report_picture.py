"""Photograph the head of a real report for the README: ``python docs/report_picture.py RUN..`` writes docs/report.png.

Needs ``pip install ".[test]"`` and a Chromium. Give it runs of at least three approaches with three seeds each, such as
``experiments/results/runs/mini``.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from wlsup.cli import main

HERE = Path(__file__).parent
WIDTH = 1180


def photograph(runs: list[str], picture: Path) -> None:
    """Write the report over ``runs`` from its title to the end of the scatter of both domains."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"this needs one of {', '.join(names)}")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder) / "report.html"
        if code := main(["report", *runs, "-o", str(page_file)]):
            sys.exit(code)
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": WIDTH, "height": 1000})
        page.goto(page_file.as_uri())
        end = page.evaluate("document.querySelector('#front').getBoundingClientRect().bottom + window.scrollY")
        page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": end + 20})
        chromium.close()


if __name__ == "__main__":
    photograph(sys.argv[1:] or sys.exit(__doc__), HERE / "report.png")
