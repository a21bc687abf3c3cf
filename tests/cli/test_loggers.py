"""metrics.csv and run.log on a disk that is full, and metrics.csv of a run that goes on: no row is lost."""

import csv
import errno
import logging
import os
from pathlib import Path

import pytest

from wlsup.cli.loggers import run_loggers
from wlsup.cli.logs import log_to_file


def test_a_log_that_cannot_be_written_says_nothing(tmp_path, capfd):
    with log_to_file(tmp_path / "run.log"):
        (handler,) = [one for one in logging.getLogger("wlsup").handlers if isinstance(one, logging.FileHandler)]
        handler.stream.close()
        handler.stream = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115
        logging.getLogger("wlsup").warning("a line")
    assert "Logging error" not in capfd.readouterr().err


def test_no_row_of_the_metrics_is_lost_when_a_column_cannot_be_added(tmp_path, monkeypatch):
    def refuse(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (_, table) = run_loggers(tmp_path, None)
    table.log_metrics({"loss": 1.0, "epoch": 0}, 0)
    table.save()
    before = (tmp_path / "metrics.csv").read_text()
    table.log_metrics({"loss": 0.5, "epoch": 0, "new": 2.0}, 1)
    monkeypatch.setattr("wlsup.cli.loggers.write_text", refuse)
    with pytest.raises(OSError, match="No space left"):
        table.save()
    assert (tmp_path / "metrics.csv").read_text() == before
    monkeypatch.undo()
    table.save()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch,loss,new,step", "0,1.0,,0", "0,0.5,2.0,1"]


def test_no_row_of_the_metrics_is_lost_when_a_resumed_run_is_killed_at_its_start(tmp_path, monkeypatch):
    (_, table) = run_loggers(tmp_path, None)
    for step in range(3):
        table.log_metrics({"loss": 1.0 - step, "epoch": 0}, step)
    table.save()
    (_, again) = run_loggers(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr("lightning.fabric.loggers.csv_logs._ExperimentWriter.save", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again.log_metrics({"loss": 7.0, "epoch": 0}, 3)
    (_, once_more) = run_loggers(tmp_path, 3)
    once_more.log_metrics({"loss": 7.0, "epoch": 0}, 3)
    once_more.save()
    with (tmp_path / "metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [1.0, 0.0, -1.0, 7.0]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv"}
