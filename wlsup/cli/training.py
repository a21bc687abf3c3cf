"""The training of a configured run: where it goes on from, who else writes there, and how it ends."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning.pytorch.utilities.exceptions import SIGTERMException

from wlsup.callbacks.checkpoints import STOPPED, STOPPED_FILE, StoppedEarly
from wlsup.checkpoint_file import LAST, PREVIOUS, newest_checkpoint, read_checkpoint
from wlsup.cli.logs import log_to_file
from wlsup.errors import WlsupError

if TYPE_CHECKING:
    from wlsup.cli.configuration import WlsupCLI

__all__ = ["RUN_DIR", "Resumption", "resumption", "train"]

RUN_DIR = "WLSUP_RUN_DIR"
"""The environment's variable by which the processes of one run agree on its folder."""

_TERMINATED = 128 + 15

logger = logging.getLogger("wlsup")


class Resumption(NamedTuple):
    """Where a run goes on from: the checkpoint, and the optimizer steps that it holds; None and None for a start."""

    path: Path | None = None
    step: int | None = None


def resumption(resume: str | None, run_dir: Path) -> Resumption:
    """Find the checkpoint that ``--resume`` means; ``auto`` is the newest one of the run's folder that can be read.

    Raises:
        WlsupError: it is missing, damaged, or not a checkpoint; or the folder holds another run's work.
    """
    folder = run_dir / "checkpoints"
    if resume is None:
        if (folder / LAST).exists() or (run_dir / "results.json").exists():
            raise WlsupError(
                f"There is a run in {run_dir} already. Go on with it (--resume auto), or give another --run_dir; "
                "nothing that a run has written is written over."
            )
        return Resumption()
    if resume == "auto" and (run_dir / "results.json").is_file():
        return Resumption()  # finished: `train` says so, whatever has become of its checkpoints
    if resume == "auto":
        path, checkpoint, passed_over = newest_checkpoint(folder)
        for sentence in passed_over:
            logger.warning("%s", sentence)
        if path is None:
            return Resumption()
        logger.info("going on from %s", path)
    else:
        path = Path(resume)
        checkpoint = read_checkpoint(path)
    return Resumption(path, int(checkpoint.get("global_step", 0)))


def train(cli: WlsupCLI) -> int:
    """Fit, resuming where asked; the run's log file receives what the terminal does.

    Returns:
        0, `STOPPED` for a run that was told to stop and has saved where it stands, or 143 for one that was terminated
        before there was something to save.

    Raises:
        WlsupError: the run cannot be made, in one message.
    """
    first = cli.trainer.is_global_zero
    folder = cli.run_dir
    if cli.config.resume == "auto" and (folder / "results.json").is_file():
        logger.info("this run is finished: its results are in %s", folder)
        return 0
    before = os.environ.get(RUN_DIR)
    os.environ[RUN_DIR] = str(folder)  # the processes that fit() starts inherit it; the next run does not
    path = cli.resumption.path
    try:
        with (
            _told_once(),
            _held(folder) if first else nullcontext(),
            _forgotten_unbegun(folder) if first else nullcontext(),
        ):
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=None if path is None else str(path), weights_only=True)
    except StoppedEarly as stopped:
        if first:
            logger.warning("%s; go on with --run_dir %s --resume auto", stopped, folder)
        return STOPPED
    except SIGTERMException:  # Lightning's, of a signal that came before the first step
        return STOPPED if (folder / "checkpoints" / STOPPED_FILE).is_file() else _TERMINATED
    except OSError as error:
        if not _is_of(folder, error):
            raise
        raise WlsupError(
            f"The run's folder {folder} can no longer be written ({error.strerror or error}); what is in it stays. "
            "Mend that, and go on with --resume auto."
        ) from error
    finally:
        os.environ.pop(RUN_DIR) if before is None else os.environ.update({RUN_DIR: before})
    return 0


@contextmanager
def _told_once() -> Iterator[None]:
    """Leave out the traceback of TensorBoard's writer thread: it hands its error to whoever logs next, who tells it."""
    before = threading.excepthook

    def tell(arguments: threading.ExceptHookArgs) -> None:
        of_writer = type(arguments.thread).__name__ == "_AsyncWriterThread"
        if not (of_writer and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = before


def _is_of(folder: Path, error: OSError) -> bool:
    """Whether an error is about the run's folder: it names a file there, or nothing can be written there any more."""
    if isinstance(error.filename, str | bytes):
        return Path(os.fsdecode(error.filename)).absolute().is_relative_to(folder.absolute())
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE)
    return full or not (folder.is_dir() and os.access(folder, os.W_OK))


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the run's folder, so that a second run does not write into it; a killed run holds nothing.

    Raises:
        WlsupError: another run holds it, or it cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # not POSIX
        yield
        return
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise WlsupError(
            f"Cannot write into the run's folder {folder}: {error.strerror}. Set --runs or --run_dir."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise WlsupError(
                f"Another run ({file.read().strip() or 'unknown'}) is writing into {folder}. Wait for it, or give "
                "another --run_dir."
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): nothing keeps a second run out of it.", folder, error.strerror)
        else:
            _clear_half_written(folder / "checkpoints")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield  # the file stays: a lock is on a file, and another run may hold it by now


@contextmanager
def _forgotten_unbegun(folder: Path) -> Iterator[None]:
    """Keep run.log; take away the folder of a run that is refused before it has written its configuration."""
    try:
        with log_to_file(folder / "run.log"):
            yield
    except WlsupError:
        own = {folder / "run.log", folder / ".lock", *folder.glob("events.out.tfevents.*")}
        with suppress(OSError):
            if set(folder.iterdir()) <= own:  # else something lies in it: then all stays
                for file in own:
                    file.unlink(missing_ok=True)
                folder.rmdir()
        raise


def _clear_half_written(folder: Path) -> None:
    """Remove what runs that were killed while they saved have left, each as large as a checkpoint."""
    for name in (LAST, PREVIOUS):
        for file in folder.glob(f".{name}.*"):
            with suppress(OSError):
                file.unlink()
