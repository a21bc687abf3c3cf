"""Two runs in one folder, a folder that cannot be written or is gone, a torn checkpoint: one sentence, nothing lost."""

import errno
import os
import shutil
import subprocess

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from wlsup.approaches.base import Approach
from wlsup.checkpoint_file import read_checkpoint
from wlsup.cli import main
from wlsup.cli.training import _forgotten_unbegun, _held, _is_of
from wlsup.errors import WlsupError

from ..conftest import lacking


def command(folder, *options):
    return [
        "fit", "-c", "experiments/base.yaml", "-c", "experiments/lit.yaml", "--run_dir", str(folder),
        "--data.pairs", "32", "--data.validation_pairs", "0", "--data.batch_size", "8", "--data.eval_sets", "[]",
        "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main(command(folder)) == 0
    return folder


def test_a_folder_that_holds_a_run_is_not_written_over(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(command(finished)) == 2
    assert "There is a run in" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_finished_run_is_finished_whatever_has_become_of_its_checkpoint(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    assert main(command(folder, "--resume", "auto")) == 0
    said = "".join(capsys.readouterr())
    assert "this run is finished" in said and "going on from" not in said


def test_a_second_run_does_not_enter_a_folder_that_another_one_is_writing(tmp_path):
    message = r"Another run \(process \d+ on .*\) is writing into"
    with _held(tmp_path / "run"), pytest.raises(WlsupError, match=message), _held(tmp_path / "run"):
        pass
    with _held(tmp_path / "run"):  # the first has ended
        pass


def test_a_second_run_that_is_turned_away_takes_nothing_of_the_first_with_it(tmp_path, capsys):
    with _held(tmp_path / "run"), _forgotten_unbegun(tmp_path / "run"):  # which has no config.yaml yet
        files = sorted(path.name for path in (tmp_path / "run").iterdir())
        assert main(command(tmp_path / "run")) == 2
        assert "Another run" in capsys.readouterr().err
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == files


def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(command(tmp_path / "file" / "run")) == 2
    assert "run's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (lambda folder: OSError(errno.EACCES, "denied", str(folder / "metrics.csv")), True),
        (lambda folder: FileNotFoundError(errno.ENOENT, "gone", str(folder.parent / "pictures.tar")), False),
        (lambda folder: OSError(errno.ENOSPC, "No space left on device"), True),
        (lambda folder: ConnectionRefusedError(errno.ECONNREFUSED, "refused"), False),
        (lambda folder: folder.rmdir() or OSError("a writer failed"), True),
    ],
)
def test_only_errors_of_the_runs_folder_are_told_as_such(error, ours, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert _is_of(folder, error(folder)) is ours


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer dies quietly
def test_a_folder_that_vanishes_ends_the_run_with_a_sentence(tmp_path, monkeypatch, capsys):
    step = Approach.training_step

    def vanish(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").write_text("something else")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Approach, "training_step", vanish)
    assert main(command(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "wlsup: error:" in error
    assert "Traceback" not in error


def test_a_folder_that_is_removed_in_mid_run_is_not_made_again(tmp_path, monkeypatch, capsys):
    step = Approach.training_step

    def vanish(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            shutil.rmtree(tmp_path / "run")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Approach, "training_step", vanish)
    rarely = ["--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1000"]  # no log notices it first
    assert main(command(tmp_path / "run", *rarely)) == 2
    captured = capsys.readouterr()
    assert f"The run's folder {tmp_path / 'run'} has been removed" in captured.err
    assert "Traceback" not in captured.err
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB of its own."""
    if os.geteuid() != 0:
        lacking("a file system of its own needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "wlsup", folder], capture_output=True, text=True)
    if made.returncode:
        lacking(f"a file system cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_without_a_byte_left_ends_the_run_with_a_sentence_and_it_goes_on_when_there_is_room(
    small_disk, monkeypatch, capsys
):
    step, folder, filler = Approach.training_step, small_disk / "run", small_disk / "filler"

    def fill(self, batch, batch_idx):
        if self.trainer.global_step == 4:  # the second epoch has begun, the first one's checkpoint is there
            with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Approach, "training_step", fill)
    assert main(command(folder)) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "Traceback" not in error
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 4
    monkeypatch.undo()
    filler.unlink()
    assert main(command(folder, "--resume", "auto")) == 0
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 8
    assert (folder / "results.json").stat().st_size


def test_a_folder_that_turns_read_only_ends_the_run_with_a_sentence_and_keeps_what_is_in_it(
    tmp_path, monkeypatch, capsys
):
    step, folder = Approach.training_step, tmp_path / "run"

    def refuse(content, path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def turn(self, batch, batch_idx):
        if self.trainer.global_step == 4:  # the second epoch has begun, the first one's checkpoint is there
            monkeypatch.setattr("wlsup.callbacks.checkpoints.save_checkpoint_file", refuse)
            monkeypatch.setattr("wlsup.callbacks.run_folder.write_json", lambda path, content: refuse(content, path))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Approach, "training_step", turn)
    assert main(command(folder)) == 2
    error = capsys.readouterr().err
    assert "Read-only file system" in error
    assert "Traceback" not in error
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert not (folder / "results.json").exists()


def test_a_torn_last_checkpoint_is_passed_over_with_a_sentence(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "results.json").unlink()
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-50])
    assert main(command(folder, "--resume", "auto")) == 0
    error = capsys.readouterr().err
    assert "is not a whole checkpoint" in error
    assert "previous.ckpt" in error
    assert read_checkpoint(last)["global_step"] == 8
    assert (folder / "results.json").read_text()


def test_what_killed_saves_left_is_cleared_when_the_run_goes_on(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "results.json").unlink()
    (folder / "checkpoints" / ".last.ckpt.123.abcd").write_bytes(b"half")
    assert main(command(folder, "--resume", "auto")) == 0
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_configuration_that_is_moved_away_costs_nothing(tmp_path, monkeypatch):
    step, folder = Approach.training_step, tmp_path / "run"

    def move(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            (folder / "config.yaml").replace(folder / "config.bak")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Approach, "training_step", move)
    assert main(command(folder)) == 0
    assert (folder / "results.json").is_file() and list(folder.glob("events.out.tfevents.*"))


def test_terminated_before_the_first_step_it_says_so_by_its_code(tmp_path, monkeypatch):
    def fit(*args, **kwargs):
        raise SIGTERMException

    monkeypatch.setattr("lightning.Trainer.fit", fit)
    assert main(command(tmp_path / "run")) == 143
