"""Checkpoints on the way: when they are written, what a signal does, and how a resumed run ends."""

import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

import wlsup.callbacks.checkpoints as module
from wlsup.callbacks.checkpoints import STOPPED_FILE, CheckpointFiles, Checkpoints, StoppedEarly, parse_time_limit
from wlsup.checkpoint_file import read_checkpoint, save_checkpoint_file
from wlsup.data.loader import make_loader
from wlsup.data.sampler import EpochSampler
from wlsup.errors import WlsupError

BATCHES = 6


class Rows:
    """24 rows of numbers; batches by the list, as the suite's own data sets give them."""

    rows = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, items):
        return self.rows[[index for _, index in items]]


class Model(lightning.LightningModule):
    """Does something in the step ``at``, or, where that is "end", when it is trained."""

    def __init__(self, at=None, do=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)
        self.at, self.do, self.losses, self.ended = at, do, [], 0

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.losses.append(float(loss.detach()))
        if self.trainer.global_step == self.at:
            self.do()
        return loss

    def on_train_end(self):
        self.ended += 1

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches  # as a schedule asks; it makes the loaders
        optimizer = torch.optim.AdamW(self.parameters(), 0.1)
        return {"optimizer": optimizer, "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12), "interval": "step"}}  # fmt: skip


def rows():
    return make_loader(Rows(), EpochSampler(24, batch_size=4), 4, 0, None)


def trainer_of(folder, epochs, checkpoints=None, **options):
    options = {"logger": False} | options
    return lightning.Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, plugins=[CheckpointFiles()],
        callbacks=[Checkpoints(**(checkpoints or {}))], **options,
    )  # fmt: skip


def fit(folder, model, resume=None, epochs=2, accumulate=1, **options):
    trainer_of(folder, epochs, options, accumulate_grad_batches=accumulate).fit(model, rows(), ckpt_path=resume)
    return model


def signalled(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("unbroken"), Model())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("step", [2, BATCHES - 1, BATCHES + 3])
def test_a_signal_saves_after_the_step_and_the_resumed_run_ends_bit_for_bit_as_the_unbroken_one(
    number, step, unbroken, tmp_path
):
    cut = Model(step, signalled(number))
    with pytest.raises(StoppedEarly) as stopped:
        fit(tmp_path, cut)
    assert stopped.value.step == step + 1
    assert number.name in stopped.value.why
    assert cut.ended == 0  # nothing is evaluated in a run that must be gone soon
    told = stopped.value.path.with_name(STOPPED_FILE)  # what the scripts of a cluster go by
    assert told.read_text() == f"step {step + 1}: {number.name}\n"
    resumed = fit(tmp_path, Model(), resume=str(stopped.value.path))
    assert not told.exists()
    assert cut.losses + resumed.losses == unbroken.losses
    assert torch.equal(resumed.layer.weight, unbroken.layer.weight)


def test_a_second_signal_changes_nothing(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedEarly) as stopped:
        fit(tmp_path, Model(1, twice))
    assert read_checkpoint(stopped.value.path)["global_step"] == 2


class Evaluating(lightning.pytorch.callbacks.Callback):
    """Evaluates when all is trained, and is told to stop while it does."""

    def __init__(self, number=None):
        self.number, self.evaluated = number, False

    def on_train_end(self, trainer, pl_module):
        if self.number is not None:
            os.kill(os.getpid(), self.number)
        self.evaluated = True


def test_a_signal_while_it_evaluates_ends_it_at_once_and_the_resumed_run_evaluates(tmp_path):
    def evaluate(number, resume=None):
        trainer, callback = trainer_of(tmp_path, 2), Evaluating(number)
        trainer.callbacks.insert(0, callback)
        with pytest.raises(StoppedEarly) if number else nullcontext():
            trainer.fit(Model(), rows(), ckpt_path=resume)
        return callback.evaluated

    told, last = tmp_path / "checkpoints" / STOPPED_FILE, str(tmp_path / "checkpoints" / "last.ckpt")
    assert not evaluate(signal.SIGUSR2)
    assert told.read_text() == "step 12: told to while it was evaluating\n"
    assert not evaluate(signal.SIGTERM, last)  # nothing to train, and told again
    assert told.exists() and read_checkpoint(Path(last))["global_step"] == 12
    assert evaluate(None, last)
    assert not told.exists()


def test_a_signal_that_lightning_heard_before_the_first_step_is_heeded_after_it(tmp_path):
    class Early(lightning.pytorch.callbacks.Callback):
        def on_train_start(self, trainer, pl_module):  # before that of the checkpoints, which are last
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = trainer_of(tmp_path, 2)
    trainer.callbacks.insert(0, Early())
    with pytest.raises((StoppedEarly, SIGTERMException)):
        trainer.fit(Model(), rows())
    assert (tmp_path / "checkpoints" / STOPPED_FILE).read_text() == "step 1: SIGTERM\n"
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 1


def test_ranks_that_read_different_checkpoints_do_not_train(tmp_path):
    strategy = SimpleNamespace(broadcast=lambda value: (8, 1), reduce_boolean_decision=lambda one, all: one)
    loop = SimpleNamespace(_combined_loader_states_to_load=[], _combined_loader=None)
    trainer = SimpleNamespace(fit_loop=loop, world_size=2, strategy=strategy, global_step=4, current_epoch=0,
                              default_root_dir=tmp_path, is_global_zero=False)  # fmt: skip
    with pytest.raises(WlsupError, match="this one from 4, the first from 8"):
        Checkpoints().on_train_start(trainer, None)


def test_the_one_before_goes_on_being_whole_when_a_run_has_gone_on_from_it(tmp_path):
    fit(tmp_path, Model())
    folder = tmp_path / "checkpoints"
    (folder / "last.ckpt").write_bytes(b"torn")
    cut = Model(BATCHES, signalled(signal.SIGTERM))
    with pytest.raises(StoppedEarly):
        fit(tmp_path, cut, resume=str(folder / "previous.ckpt"))
    assert (folder / "last.ckpt.passed_over").read_bytes() == b"torn"
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == BATCHES + 1
    assert read_checkpoint(folder / "previous.ckpt")["global_step"] == BATCHES


@pytest.mark.parametrize("end", ["stopped", "finished"])
def test_the_handlers_that_were_there_are_put_back(end, tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    if end == "stopped":
        with pytest.raises(StoppedEarly):
            fit(tmp_path, Model(1, signalled(signal.SIGUSR1)))
    else:
        fit(tmp_path, Model())
    assert {number: signal.getsignal(number) for number in before} == before


def test_with_accumulation_it_stops_between_steps_not_within_one(tmp_path):
    whole = fit(tmp_path / "whole", Model(), accumulate=2)
    cut = Model(1, signalled(signal.SIGTERM))
    with pytest.raises(StoppedEarly) as stopped:
        fit(tmp_path, cut, accumulate=2)
    resumed = fit(tmp_path, Model(), resume=str(stopped.value.path), accumulate=2)
    assert cut.losses + resumed.losses == whole.losses


def test_the_time_limit_stops_by_a_clock_that_does_not_jump(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: 1e12)  # a jump of the wall clock is no reason

    def later():
        clock[0] = 121.0

    with pytest.raises(StoppedEarly, match="time limit") as stopped:
        fit(tmp_path, Model(3, later), time_limit="2m")
    assert stopped.value.step == 4


def test_within_an_epoch_it_saves_every_few_minutes(tmp_path, monkeypatch):
    clock, steps = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    save = CheckpointFiles.save_checkpoint

    def counted(self, checkpoint, *args, **kwargs):
        steps.append(checkpoint["global_step"])
        save(self, checkpoint, *args, **kwargs)

    monkeypatch.setattr(CheckpointFiles, "save_checkpoint", counted)
    model = Model()
    model.on_train_batch_start = lambda batch, index: clock.__setitem__(0, clock[0] + 40)
    fit(tmp_path, model, every_minutes=1.5, epochs=1)
    assert steps == [3, 6, 6]  # after 120 s, after 240 s, at the epoch's end
    steps.clear()
    fit(tmp_path, Model(), every_minutes=0, epochs=1)
    assert steps == [6]


def test_a_run_cut_off_after_its_last_step_still_gets_its_end(tmp_path):
    first = fit(tmp_path, Model())
    again = fit(tmp_path, Model(), resume=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert (first.ended, again.ended) == (1, 1)
    assert again.losses == []
    assert torch.equal(first.layer.weight, again.layer.weight)


def test_a_full_disk_on_the_way_is_told_and_training_goes_on_but_the_end_must_be_saved(tmp_path, monkeypatch, caplog):
    save, broken = CheckpointFiles.save_checkpoint, {BATCHES}

    def full(self, checkpoint, *args, **kwargs):
        if checkpoint["global_step"] in broken:
            raise OSError(28, "No space left on device")
        save(self, checkpoint, *args, **kwargs)

    monkeypatch.setattr(CheckpointFiles, "save_checkpoint", full)
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    assert len(fit(tmp_path, Model()).losses) == 2 * BATCHES
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2 * BATCHES
    broken.add(2 * BATCHES)
    with pytest.raises(WlsupError, match="No space left"):
        fit(tmp_path, Model())
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2 * BATCHES  # of the run before


class Full(lightning.pytorch.loggers.CSVLogger):
    """A logger whose disk is full whenever a checkpoint is due."""

    def save(self):
        if sys._getframe(1).f_code.co_name == "_save":
            raise OSError(28, "No space left on device")


def test_a_logger_that_cannot_write_is_told_and_the_checkpoint_is_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    trainer = trainer_of(tmp_path, epochs=2, logger=Full(tmp_path))
    trainer.fit(Model(), rows())
    assert "What was logged until step 12 cannot be written: [Errno 28] No space left on device" in caplog.text
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2 * BATCHES


def rank_whose_disk_is_full(rank, world, folder):
    """Train over ranks of which the first cannot write at step 3."""
    os.environ |= {
        "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "MASTER_PORT": "29577",
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    save = save_checkpoint_file

    def full(checkpoint, path):
        if checkpoint["global_step"] == 3:
            raise OSError(28, "No space left on device")
        save(checkpoint, path)

    module.save_checkpoint_file = full
    model = Model()
    ranks = {"devices": world, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = trainer_of(folder, 1, {"every_minutes": 1e-9}, **ranks)  # after each step
    trainer.fit(model, rows())
    assert trainer.global_step == BATCHES
    asked = Model(at=2, do=signalled(signal.SIGUSR1) if rank == 0 else lambda: None)  # the save after step 3 is needed
    with pytest.raises(WlsupError, match="No space left"):
        trainer_of(folder, 1, **ranks).fit(asked, rows())
    Path(folder, f"{rank}.done").touch()


@pytest.mark.multiprocess
def test_ranks_agree_on_a_checkpoint_that_could_not_be_written(tmp_path, in_processes):
    in_processes(rank_whose_disk_is_full, 2, tmp_path, 120)
    assert len(list(tmp_path.glob("*.done"))) == 2


def test_a_damaged_checkpoint_is_not_trained_on(tmp_path):
    fit(tmp_path, Model(), epochs=1)
    path = tmp_path / "checkpoints" / "last.ckpt"
    damaged = bytearray(path.read_bytes())
    place = damaged.find(read_checkpoint(path)["state_dict"]["layer.weight"].numpy().tobytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(WlsupError, match="checksum"):
        fit(tmp_path, Model(), resume=str(path))


@pytest.mark.parametrize(
    ("text", "seconds"), [("1:50", 6600), ("0:01:05", 65), ("2h", 7200), ("110m", 6600), ("90s", 90), ("1.5h", 5400)]
)
def test_time_limits_are_read(text, seconds):
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize("text", ["", "0:00", "two hours", "1:5", "-3m", "50"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(WlsupError, match="time_limit"):
        parse_time_limit(text)
