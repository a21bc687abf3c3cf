"""What the README says is what there is."""

import re
from pathlib import Path

import pytest

from wlsup.approaches import APPROACHES
from wlsup.cli import COMMANDS
from wlsup.cli.approaches import approaches_markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", README, re.DOTALL).group(1).strip()


def test_the_table_of_approaches_is_the_plans():
    assert block("approaches") == approaches_markdown(), "run `wlsup approaches --markdown` and paste it"


def test_every_make_target_and_command_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for command in set(re.findall(r"`wlsup ([a-z-]+)", README)):
        assert command in COMMANDS, command


def test_every_file_it_names_exists():
    for name in set(re.findall(r"`((?:wlsup|experiments|benchmarks|tests|docs)/[\w/.]+)`", README)):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(((?!http)[\w/.]+)\)", README):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", APPROACHES)
def test_each_approach_has_a_page_that_says_what_when_at_what_cost_and_whence(name):
    page = (ROOT / "docs" / "approaches" / f"{name}.md").read_text(encoding="utf-8")
    headings = [line for line in page.splitlines() if line.startswith("#")]
    expected = [f"# {name}", "## What it is", "## When to use it", "## What it costs", "## Source"]
    assert [heading.split(":")[0] for heading in headings if heading.split(":")[0] in expected] == expected


def test_no_table_is_left_empty():
    for name in re.findall(r"<!-- ([\w:]+) -->", README):
        if name != "end":
            assert block(name), name
