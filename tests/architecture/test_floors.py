"""`make test-minimum` installs the very versions that setup.cfg promises as the oldest."""

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def floors():
    """Name to version, of what setup.cfg asks for at run time and in tests."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
    return dict(re.findall(r"^\s*([\w-]+)(?:\[\w+\])?>=([\d.]+)", lines, re.MULTILINE))


def test_the_constraints_are_the_floors():
    text = (ROOT / "constraints-minimum.txt").read_text()
    constraints = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))
    assert len(floors()) > 20
    assert {name: constraints.get(name) for name in floors()} == floors()
