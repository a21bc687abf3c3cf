"""A checkpoint on disk: written whole or not at all, checked before it is believed, the one before it kept."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from wlsup.errors import WlsupError
from wlsup.files import written_whole

__all__ = ["LAST", "PASSED_OVER", "PREVIOUS", "newest_checkpoint", "read_checkpoint", "save_checkpoint_file"]

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
PASSED_OVER = "last.ckpt.passed_over"
"""What a last.ckpt becomes when its run has gone on from the one before it."""


def save_checkpoint_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Write ``checkpoint`` to ``path`` so that a crash at any moment leaves a whole one there.

    It is written beside ``path``, brought to the disk, and only then takes its name. What was there becomes
    ``previous.ckpt``, if ``path`` is a ``last.ckpt``. The format is torch's own zip file, which carries a CRC-32 of
    every record: `read_checkpoint` compares them, `torch.load` alone does not.

    Args:
        checkpoint: tensors and plain values.
        path: of the file.

    Raises:
        OSError: it could not be written (no space, no right to); what was there before still is.
    """
    keep = (lambda: _keep_as_previous(path)) if path.name == LAST and path.exists() else None
    with written_whole(path, before=keep) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer answers a full disk with an error of its own
            if not isinstance(_cause(error), OSError) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(f"cannot write {path}: {_told(_cause(error))}") from error
    _bring_to_disk(path.parent)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; code inside it never runs, and a damaged one is not believed.

    Raises:
        WlsupError: missing, damaged (a single flipped bit is enough), or holding more than tensors and plain values.
    """
    if not path.is_file():
        raise WlsupError(f"No checkpoint {path.absolute()}. Give the path of a run's checkpoints/{LAST}.")
    _check_records(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's, zipfile's and its own by turns
        raise WlsupError(
            f"{path} is not a checkpoint that can be trusted and read ({type(error).__name__}): it is damaged, or "
            f"holds code. {_instead(path)}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise WlsupError(f"{path} is not a checkpoint of wlsup: it has no state_dict.")
    return checkpoint


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Return the newest checkpoint in ``folder`` that can be read, what it holds, and why newer ones cannot.

    Args:
        folder: a run's ``checkpoints``.

    Returns:
        (path, or None where there is no checkpoint yet; its content; one sentence for each that was passed over).

    Raises:
        WlsupError: there are checkpoints, and none can be read.
    """
    there = [folder / name for name in (LAST, PREVIOUS) if (folder / name).is_file()]
    passed_over = []
    for path in there:
        try:
            return path, read_checkpoint(path), passed_over
        except WlsupError as error:
            passed_over.append(str(error))
    if there:
        raise WlsupError(f"No checkpoint in {folder} can be read: {' '.join(passed_over)}")
    return None, {}, []


def _check_records(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError, ValueError) as error:
        raise WlsupError(
            f"{path} is not a whole checkpoint ({type(error).__name__}: {error}): its writing was broken off, or it is "
            f"damaged. {_instead(path)}"
        ) from error
    if damaged is not None:
        raise WlsupError(f"{path} is damaged: the checksum of its record {damaged} differs. {_instead(path)}")


def _instead(path: Path) -> str:
    before = path.with_name(PREVIOUS)
    if path.name == LAST and before.is_file():
        return f"Use the one before it, {before}, or --resume auto, which does."
    return "Use an earlier checkpoint, or start again."


def _keep_as_previous(path: Path) -> None:
    """Give what ``path`` holds a second name, so that there is a whole last.ckpt at every moment."""
    before = path.with_name(PREVIOUS)
    link = path.with_name(f".{PREVIOUS}.{os.getpid()}")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        link.replace(before)
    except OSError:  # a file system without hard links: for a moment there is a previous.ckpt only
        with suppress(OSError):
            link.unlink(missing_ok=True)
        path.replace(before)


def _bring_to_disk(folder: Path) -> None:
    with suppress(OSError):  # not every system can open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return error


def _told(error: BaseException) -> str:
    return getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
