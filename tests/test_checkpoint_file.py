"""A checkpoint on disk: whole or not there, a flipped bit is found, code is refused, the one before it stays."""

import os
import pickle
import random

import pytest
import torch

from wlsup import checkpoint_file
from wlsup.checkpoint_file import newest_checkpoint, read_checkpoint, save_checkpoint_file
from wlsup.errors import WlsupError


def saved(folder, value=0.0, name="last.ckpt"):
    path = folder / name
    save_checkpoint_file({"state_dict": {"weight": torch.full((600,), value)}, "global_step": int(value)}, path)
    return path


def test_what_was_saved_is_read(tmp_path):
    path = saved(tmp_path / "new" / "folder", 3.0)
    assert torch.equal(read_checkpoint(path)["state_dict"]["weight"], torch.full((600,), 3.0))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    path = tmp_path / "last.ckpt"
    weight = torch.randn(600, generator=torch.Generator().manual_seed(0))
    save_checkpoint_file({"state_dict": {"weight": weight}}, path)
    whole, draw = path.read_bytes(), random.Random(0)
    start = whole.find(weight.numpy().tobytes()[:64])
    bits = [8 * (start + 100) + bit for bit in range(8)] + [draw.randrange(8 * len(whole)) for _ in range(150)]
    refused = []
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            same = torch.equal(read_checkpoint(path)["state_dict"]["weight"], weight)  # of padding nothing is read
        except WlsupError as error:
            refused.append(bit)
            assert str(path) in str(error)
        else:
            assert same, bit
    assert set(bits[:8]) <= set(refused)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_torn_file_is_refused(share, tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(WlsupError, match="not a whole checkpoint"):
        read_checkpoint(path)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {}, "more": Payload()}, tmp_path / "zip.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Payload()))
    for name in ("zip.ckpt", "plain.ckpt"):
        with pytest.raises(WlsupError):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_the_one_before_stays_as_previous(tmp_path):
    for value in (1.0, 2.0, 3.0):
        saved(tmp_path, value)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3
    assert read_checkpoint(tmp_path / "previous.ckpt")["global_step"] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_file_system_without_hard_links_keeps_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    saved(tmp_path, 1.0)
    saved(tmp_path, 2.0)
    assert read_checkpoint(tmp_path / "previous.ckpt")["global_step"] == 1


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "replace"])
def test_a_crash_while_saving_leaves_a_whole_one(moment, tmp_path, monkeypatch):
    saved(tmp_path, 1.0)

    def crash(*_, **__):
        raise KeyboardInterrupt

    target = {"torch.save": (checkpoint_file.torch, "save"), "os.fsync": (os, "fsync")}
    owner, name = target.get(moment, (checkpoint_file.Path, "replace"))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 2.0)
    path, held, _ = newest_checkpoint(tmp_path)
    assert held["global_step"] == 1
    assert read_checkpoint(path)["global_step"] == 1


def test_a_full_disk_is_told_as_one_and_costs_nothing(tmp_path, monkeypatch):
    saved(tmp_path, 1.0)

    def full(*_, **__):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("[enforce fail] unexpected pos") from error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        saved(tmp_path, 2.0)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_cannot_be_saved_at_all_is_not_told_as_a_full_disk(tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")

    monkeypatch.setattr(torch, "save", wrong)
    with pytest.raises(RuntimeError, match="created explicitly"):
        saved(tmp_path, 2.0)
    assert not list(tmp_path.iterdir())


def test_a_torn_last_one_falls_back_to_the_one_before_and_says_so(tmp_path):
    saved(tmp_path, 1.0)
    last = saved(tmp_path, 2.0)
    last.write_bytes(last.read_bytes()[:-20])
    path, _, passed_over = newest_checkpoint(tmp_path)
    assert path == tmp_path / "previous.ckpt"
    assert len(passed_over) == 1
    assert str(last) in passed_over[0]


def test_no_checkpoint_yet_is_a_start_and_none_that_can_be_read_an_error(tmp_path):
    assert newest_checkpoint(tmp_path) == (None, {}, [])
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(WlsupError, match="No checkpoint in .* can be read"):
        newest_checkpoint(tmp_path)
