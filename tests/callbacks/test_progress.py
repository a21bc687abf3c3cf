"""Progress where there is no terminal: plain lines, with what is done and what remains."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch

from wlsup.callbacks.progress import PlainProgress, progress, training_progress


@pytest.fixture
def lines(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("wlsup"), "propagate", True)
    caplog.set_level(logging.INFO, logger="wlsup")
    return lambda: [record.getMessage() for record in caplog.records]


def trainer(step, total=100):
    return SimpleNamespace(
        global_step=step, estimated_stepping_batches=total, current_epoch=1, world_size=2,
        callback_metrics={"train/loss": torch.tensor(1.5)},
    )  # fmt: skip


def test_long_work_says_at_its_end_what_was_done(lines):
    with progress("features of cifar10, test") as show:
        show(3, 10)
        show(10, 10)
    assert len(lines()) == 1
    assert re.fullmatch(r"features of cifar10, test: 10 of 10 in \d+\.\d s", lines()[0])


def test_training_lines_say_epoch_step_loss_rate_and_what_remains(lines, monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0])
    monkeypatch.setattr("wlsup.callbacks.progress.time.perf_counter", lambda: next(clock))
    plain = PlainProgress(seconds=10.0)
    plain.on_train_start(trainer(0), None)
    for step in (10, 20, 24, 100):  # at 5 s: too soon; at 10 s: a line; at 12 s: too soon; the last step always
        plain.on_train_batch_end(trainer(step), None, None, range(8), 0)
    assert lines() == [
        "epoch 2, step 20 of 100, loss 1.5000, 32 pictures/s, 40 s to go",
        "epoch 2, step 100 of 100, loss 1.5000, 80 pictures/s, 0 s to go",
    ]


def test_a_resumed_run_counts_its_rate_from_where_it_resumed(lines, monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("wlsup.callbacks.progress.time.perf_counter", lambda: next(clock))
    plain = PlainProgress(seconds=10.0)
    plain.on_train_start(trainer(90), None)
    plain.on_train_batch_end(trainer(95), None, None, range(8), 0)
    assert "8 pictures/s, 10 s to go" in lines()[0]


def test_a_bar_only_where_there_is_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert [type(callback) for callback in training_progress()] == [PlainProgress]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert [type(callback).__name__ for callback in training_progress()] == ["RichProgressBar", "PlainProgress"]
