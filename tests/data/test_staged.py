"""A node's own copy of shards is used where it is whole, and only for the shards that it is of."""

import subprocess
from pathlib import Path

import pytest

from wlsup.data.staged import MARK, STAGED, staged

STAGE = Path(__file__).parents[2] / "cluster" / "stage.sh"


@pytest.fixture
def shards(tmp_path, monkeypatch):
    folder, disk = tmp_path / "shared" / "shards", tmp_path / "disk"
    folder.mkdir(parents=True)
    disk.mkdir()
    (folder / "00000.tar").write_bytes(b"pictures")
    monkeypatch.setenv(STAGED, str(disk / "wlsup-1"))
    return folder


def test_the_copy_that_the_script_makes_is_read(shards, tmp_path, monkeypatch):
    assert staged(shards) == shards  # not there yet
    copy = tmp_path / "disk" / "wlsup-1"
    subprocess.run([STAGE, shards, copy], check=True, capture_output=True)
    assert staged(shards) == copy
    assert (copy / "00000.tar").read_bytes() == b"pictures"
    monkeypatch.chdir(tmp_path / "shared")
    assert staged(Path("shards")) == copy  # however it is named
    monkeypatch.delenv(STAGED)
    assert staged(shards) == shards


def test_half_a_copy_and_one_of_other_shards_are_not_read(shards, tmp_path):
    copy = tmp_path / "disk" / "wlsup-1"
    subprocess.run([STAGE, shards, copy], check=True, capture_output=True)
    other = tmp_path / "shared" / "other"
    other.mkdir()
    assert staged(other) == other
    (copy / MARK).unlink()
    assert staged(shards) == shards


def test_removing_takes_only_what_was_staged(shards, tmp_path):
    copy = tmp_path / "disk" / "wlsup-1"
    subprocess.run([STAGE, shards, copy], check=True, capture_output=True)
    subprocess.run([STAGE, "--remove", copy], check=True, capture_output=True)
    subprocess.run([STAGE, "--remove", shards], check=True, capture_output=True)
    assert not copy.exists()
    assert shards.is_dir()
