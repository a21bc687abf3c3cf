"""The table of faults names tests that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_line_of_the_table_names_a_test_that_there_is():
    lines = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 15
    for line in lines:
        (file, name) = re.search(r"`(tests/[\w/]+\.py)::(\w+)` \|$", line).groups()
        assert re.search(rf"def {name}\(", (ROOT / file).read_text()), line
