"""Checkpoints while a run goes on: every epoch, every so many minutes, and when the run is told to stop."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer import call

from wlsup.checkpoint_file import LAST, PASSED_OVER, PREVIOUS, read_checkpoint, save_checkpoint_file
from wlsup.errors import WlsupError
from wlsup.files import write_text

__all__ = ["STOPPED", "STOPPED_FILE", "CheckpointFiles", "Checkpoints", "StoppedEarly", "parse_time_limit"]

logger = logging.getLogger("wlsup")

STOPPED = 75
"""Exit code of a run that stopped with a checkpoint because it was told to: try again (EX_TEMPFAIL of sysexits.h)."""

STOPPED_FILE = "stopped"
"""Beside the checkpoint until the run goes on: a launcher may give another process's code than `STOPPED`."""

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, name)
)
"""What schedulers send before they kill: SLURM and torchrun SIGTERM, LSF SIGUSR2 at the run limit, users SIGUSR1."""


class StoppedEarly(BaseException):  # noqa: N818 (nothing went wrong)
    """A run was told to stop, and has saved where it stands.

    Not an Exception: raised out of a signal while a run evaluates, it is not to be taken for a picture's fault.

    Args:
        why: what told it.
        step: optimizer steps taken.
        path: the checkpoint.
    """

    def __init__(self, why: str, step: int, path: Path) -> None:
        super().__init__(f"stopped after step {step} ({why}); the checkpoint is {path}")
        self.why, self.step, self.path = why, step, path


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's way to disk through `wlsup.checkpoint_file`: atomic, verified, never running code of a file.

    Attributes:
        failures: None: an error is raised where it occurs. A list: errors are put there. Of several ranks one writes
            while the others wait for it, and would wait for ever if it left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[OSError] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write it whole, or leave what was there.

        Raises:
            OSError: it could not be written.
        """
        try:
            save_checkpoint_file(checkpoint, Path(path))
        except OSError as error:
            if self.failures is None:
                raise
            self.failures.append(error)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it, with checksums compared; ``weights_only`` is True whatever was asked for.

        Raises:
            WlsupError: it is damaged, or holds code.
        """
        return read_checkpoint(Path(path))


class Checkpoints(Checkpoint):
    """Save last.ckpt at every epoch's end, every few minutes, and at a signal or a time limit; then stop there.

    SIGTERM, SIGUSR1, SIGUSR2 and SIGXCPU, which schedulers send before they kill, let the step in progress end; all
    ranks then save together and the run ends with `StoppedEarly`. A second signal changes nothing. After the last step,
    whose checkpoint is there, a signal ends the evaluation at once; the resumed run makes it. A checkpoint that cannot
    be written on the way is told and does not end the run; one that was asked for by a signal does, since what was
    trained since the one before is lost.

    Args:
        every_minutes: save so often within an epoch, in minutes of a clock that never jumps; 0: at epochs' ends only.
        time_limit: save and stop after this long, as "HH:MM", "HH:MM:SS" or "2h", "110m", "90s"; None: no limit. It
            counts from the start of the process.
        folder: where to; None: ``checkpoints`` of the run's folder.

    Raises:
        WlsupError: a time that cannot be read, or not positive.
    """

    def __init__(self, every_minutes: float = 10.0, time_limit: str | None = None, folder: str | None = None) -> None:
        if every_minutes < 0:
            raise WlsupError(f"checkpoints.every_minutes must be at least 0, not {every_minutes:g}.")
        self.every_minutes, self.folder = every_minutes, folder
        self.time_limit = None if time_limit is None else parse_time_limit(time_limit)
        self._began = self._saved = time.monotonic()
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        self._trained = False
        self._stopped: StoppedEarly | None = None
        self._ended: StoppedEarly | None = None  # what a signal after the last step raises
        self._first: Path | None = None  # of rank 0 the folder of checkpoints
        self._had_folder = False
        self._process = os.getpid()

    @property
    def state_key(self) -> str:
        """One key whatever the options, so that a resumed run may have others."""
        return "Checkpoints"

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """See to it that a run cut off between its last step and its results still gets them."""
        loop, self._trained = trainer.fit_loop, False
        train = loop.run

        def train_or_finish() -> None:
            train()
            if trainer.ckpt_path and trainer.limit_train_batches and not self._trained:
                # Lightning finds nothing to train and skips the end of training too, where everything is evaluated
                self._listen(trainer)
                self._evaluate_on_notice(trainer, Path(trainer.ckpt_path))
                call._call_callback_hooks(trainer, "on_train_end")
                call._call_lightning_module_hook(trainer, "on_train_end")

        loop.run = train_or_finish

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen to signals, in place of Lightning's own handlers, which were put there just before; count minutes.

        Lightning gives the loader its place in the epoch back when it first makes it. A schedule that asks how many
        steps there will be has it made before that place is read, and it would begin the epoch again: so, here.
        """
        loop = trainer.fit_loop
        places, loop._combined_loader_states_to_load = loop._combined_loader_states_to_load, []
        if places and loop._combined_loader is not None:
            loop._combined_loader._load_state_dicts(places)
        self._saved, self._trained = time.monotonic(), True
        self._had_folder = trainer.is_global_zero and not _is_gone(Path(trainer.default_root_dir))
        if trainer.world_size > 1:  # each rank found its checkpoint by itself
            first = trainer.strategy.broadcast((trainer.global_step, trainer.current_epoch))
            differs = tuple(first) != (trainer.global_step, trainer.current_epoch)
            if trainer.strategy.reduce_boolean_decision(differs, all=False):
                raise WlsupError(
                    f"The processes do not go on from one step: this one from {trainer.global_step}, the first from "
                    f"{first[0]}. They read different checkpoints; see to it that all nodes see the same "
                    f"{self._folder(trainer)}, and start again."
                )
        if trainer.is_global_zero:
            folder = self._folder(trainer)
            if trainer.ckpt_path and Path(trainer.ckpt_path).absolute() == (folder / PREVIOUS).absolute():
                with suppress(FileNotFoundError):  # or saving would put it in the place of the one that is whole
                    (folder / LAST).replace(folder / PASSED_OVER)
        self._listen(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, or if the run is to stop."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # half of a step's gradients cannot be saved
        why = self._stop_reason()
        due = bool(self.every_minutes) and time.monotonic() - self._saved >= 60 * self.every_minutes
        if trainer.world_size > 1:  # a signal, or a clock, may reach one rank only
            stop = trainer.strategy.reduce_boolean_decision(why is not None, all=False)
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
            why = why or ("another process of the run was told to stop" if stop else None)
        if why is not None:
            path = self._save(trainer, needed=True)
            if trainer.is_global_zero:
                write_text(path.with_name(STOPPED_FILE), f"step {trainer.global_step}: {why}\n")
            self._stopped = StoppedEarly(why, trainer.global_step, path)
        elif due:
            self._save(trainer, needed=False)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop, if the run is to: only now, for Lightning logs a step after the hooks at its end.

        Raises:
            StoppedEarly: saved, and told to stop.
        """
        self._stop(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop, if the run is to, after the last step of an epoch.

        Raises:
            StoppedEarly: saved, and told to stop.
        """
        self._stop(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save; the last one of a run must succeed.

        Raises:
            StoppedEarly: the last step was to be the last of all, and there is no validation after it.
        """
        self._stop(trainer)
        last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        path = self._save(trainer, needed=last or trainer.should_stop)
        if last or trainer.should_stop:
            self._evaluate_on_notice(trainer, path)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Give the signals back; other callbacks have evaluated by now."""
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back; of a run that stops ignore them until Lightning does, for others are ending too."""
        self._restore()
        if isinstance(exception, StoppedEarly) and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _listen(self, trainer: lightning.Trainer) -> None:
        if trainer.is_global_zero:
            (self._folder(trainer) / STOPPED_FILE).unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        if trainer.received_sigterm:  # since Lightning began to listen
            self._note(signal.SIGTERM, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number
        if self._ended is None or os.getpid() != self._process:  # loader processes inherit this
            return
        stopped, self._ended = self._ended, None
        if self._first is not None:
            write_text(self._first / STOPPED_FILE, f"step {stopped.step}: {stopped.why}\n")
        raise stopped

    def _evaluate_on_notice(self, trainer: lightning.Trainer, path: Path) -> None:
        """From now on a signal ends the run at once; one that came during the last validation does so here."""
        self._first = self._folder(trainer) if trainer.is_global_zero else None
        self._ended = StoppedEarly("told to while it was evaluating", trainer.global_step, path)
        if self._signal is not None:
            self._note(self._signal, None)

    def _stop(self, trainer: lightning.Trainer) -> None:
        if self._stopped is None:
            return
        stopped, self._stopped = self._stopped, None
        for sink in trainer.loggers:
            sink.save()
        trainer.strategy.barrier()  # a launcher kills the others once one has ended
        raise stopped

    def _stop_reason(self) -> str | None:
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self.time_limit is not None and time.monotonic() - self._began >= self.time_limit:
            return f"time limit of {self.time_limit:.0f} s"
        return None

    def _folder(self, trainer: lightning.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints" if self.folder is None else Path(self.folder)

    def _save(self, trainer: lightning.Trainer, *, needed: bool) -> Path:
        removed = self._had_folder and _is_gone(Path(trainer.default_root_dir))
        if trainer.world_size > 1:
            removed = trainer.strategy.broadcast(removed)  # the first rank has looked
        if removed:  # a checkpoint alone cannot go on, and nobody would look for it
            raise WlsupError(
                f"The run's folder {trainer.default_root_dir} has been removed: training stops at step "
                f"{trainer.global_step}, and there is nothing to go on from."
            )
        folder = self._folder(trainer)
        path = folder / LAST
        self._saved = time.monotonic()
        files = trainer.strategy.checkpoint_io
        error: OSError | None = None
        try:
            for sink in trainer.loggers:
                sink.save()  # what was logged until here is not logged again
        except OSError as failure:
            logger.warning("What was logged until step %d cannot be written: %s.", trainer.global_step, failure)
        if isinstance(files, CheckpointFiles):
            files.failures = []
        try:
            trainer.save_checkpoint(path, weights_only=False)  # whole, the optimizer too
            if isinstance(files, CheckpointFiles) and files.failures:
                error = files.failures[0]
        except OSError as failure:
            error = failure
        finally:
            if isinstance(files, CheckpointFiles):
                files.failures = None
        reason = None
        if error is not None:
            reason = f"The checkpoint of step {trainer.global_step} cannot be written to {folder}: {error}."
        if trainer.world_size > 1:
            reason = trainer.strategy.broadcast(reason)  # the first rank wrote; all go on, or none
        if reason is not None and needed:
            raise WlsupError(f"{reason} Make room, and go on with --resume auto from the one before.") from error
        if reason is not None and trainer.is_global_zero:
            logger.warning("%s Training goes on; the one before it stays.", reason)
        return path

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._ended = {}, None


def _is_gone(folder: Path) -> bool:
    """Whether there is nothing of this name any more; a file system that does not answer is not that."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def parse_time_limit(text: str) -> float:
    """Return seconds of "HH:MM", "HH:MM:SS", "2h", "110m" or "90s".

    Raises:
        WlsupError: another form, or nothing left of it.
    """
    clock = re.fullmatch(r"(\d+):(\d\d)(?::(\d\d))?", text.strip())
    unit = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hms])", text.strip())
    if clock:
        hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        limit = 3600.0 * hours + 60 * minutes + seconds
    elif unit:
        limit = float(unit[1]) * {"h": 3600, "m": 60, "s": 1}[unit[2]]
    else:
        limit = 0.0
    if limit <= 0:
        raise WlsupError(
            f'checkpoints.time_limit cannot be {text!r}. Write "1:50" (hours and minutes), "110m" or "2h".'
        )
    return limit
