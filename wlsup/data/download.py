"""One file from a server, whole and verified: in parallel pieces, resumed after any interruption.

While it comes, a file ``x`` is ``x.part``, and ``x.part.json`` says which pieces of it are there and which version of
the file they belong to; `os.replace` gives it its name at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from http.client import HTTPResponse
from pathlib import Path

from wlsup.data.catalog import RemoteFile
from wlsup.data.download_state import DownloadState, Piece
from wlsup.data.transport import (
    Stopped,
    TransferError,
    TransferPolicy,
    content_range,
    open_url,
    read_chunks,
    version_of,
    wait_or_stop,
)
from wlsup.errors import WlsupError
from wlsup.files import write_text

__all__ = ["Download", "WrongBytes", "file_matches"]

PIECE = 16 << 20
"""Least bytes of a piece; a smaller file comes in one."""

_SAVE_EVERY = 2.0
_log = logging.getLogger("wlsup.data")


class WrongBytes(WlsupError):  # noqa: N818
    """A file that came whole and is not the file it should be."""


class _Restart(Exception):  # noqa: N818
    """What is there cannot be continued; begin again."""


class Download:
    """Fetches one file.

    Args:
        remote: address, and checksum if there is one.
        target: where it shall lie.
        connections: at most so many at once.
        policy: time-outs and retries.
        report: called with (bytes there, bytes in all or None), from several threads.
        stop: set to end early; what has come stays for the next time.
        check_size: called with the bytes still to come once the server has said how many; raises to refuse.
    """

    def __init__(
        self,
        remote: RemoteFile,
        target: Path,
        *,
        connections: int = 4,
        policy: TransferPolicy | None = None,
        report: Callable[[int, int | None], None] = lambda done, total: None,
        stop: threading.Event | None = None,
        check_size: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.remote = remote
        self.target = target
        self.connections = connections
        self.policy = policy or TransferPolicy()
        self.report = report
        self.stop = stop or threading.Event()
        self.check_size = check_size
        self._part = target.with_name(target.name + ".part")
        self._state_path = target.with_name(target.name + ".part.json")
        self._lock = threading.Lock()
        self._saved = 0.0

    def run(self) -> Path:
        """Fetch the file, or what is missing of it, verify it, and give it its name.

        Raises:
            TransferError: if the server does not give it, all retries spent.
            WrongBytes: if what came twice does not match the checksum; it is left as ``x.wrong``.
            Stopped: if ``stop`` was set.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WlsupError(f"Another process is downloading {self.target}. Wait for it, or end it.") from None
            resumed = self._fetch(handle)
            why = file_matches(self.remote, self._part)
            if why is not None and resumed:
                # The pieces may be of two versions of the file: once more, from the beginning.
                _log.warning("%s: %s after a resumed download; downloading it again", self.target.name, why)
                self._state_path.unlink(missing_ok=True)
                self._fetch(handle)
                why = file_matches(self.remote, self._part)
            os.fsync(handle)
            if why is not None:
                wrong = self.target.with_name(self.target.name + ".wrong")
                os.replace(self._part, wrong)
                self._state_path.unlink(missing_ok=True)
                raise WrongBytes(
                    f"{self.remote.url} gave a file that is not {self.target.name} ({why}). It is left as {wrong} for "
                    "you to look at (an error page, perhaps, or a new version). Try again, or use --mirror URL."
                )
            os.replace(self._part, self.target)
            self._state_path.unlink(missing_ok=True)
        finally:
            os.close(handle)
        return self.target

    def _fetch(self, handle: int) -> bool:
        """Bring in all bytes; return whether some were there from an earlier time."""
        state = self._usable_state()
        resumed = state is not None
        for _ in range(3):
            try:
                if state is None:
                    os.ftruncate(handle, 0)
                    state = self._begin(handle)
                if state.total is not None:
                    self._all_pieces(handle, state)
                os.ftruncate(handle, self._there(state))
                return resumed
            except _Restart as reason:
                _log.warning("%s: %s; starting again from the beginning", self.target.name, reason)
                self._state_path.unlink(missing_ok=True)
                state = None
        raise TransferError("broken", "the file changes while it is downloaded, or the server mixes versions of it")

    def _usable_state(self) -> DownloadState | None:
        state = DownloadState.read(self._state_path)
        if state is None or state.url != self.remote.url or state.total is None:
            return None
        if state.validator is None and not (self.remote.md5 or self.remote.sha256):
            return None  # nothing would tell a mixture of two versions from the file
        size = self._part.stat().st_size
        if any(piece.done and piece.start + piece.done > size for piece in state.pieces):
            return None
        return state

    def _begin(self, handle: int) -> DownloadState:
        """Ask for one byte, to learn the length and whether pieces can be had; without pieces, take all of it here."""
        failures, headers = 0, {"Range": "bytes=0-0"}
        while True:
            try:
                response = open_url(self.remote.url, self.policy, headers)
                given = content_range(response)
                if given is not None:
                    response.close()
                    return self._planned(handle, given[1], version_of(response))
                if response.status == 200:
                    return self._whole(handle, response)
                response.close()  # a part, of a length the server does not know
                headers = {}
            except TransferError as error:
                if error.status == 416 and headers:  # an empty file has no first byte
                    headers = {}
                    continue
                failures += 1
                if error.kind == "unreachable" and failures > 2:
                    raise  # nobody there from the start: more likely no network than a bad moment
                wait_or_stop(self.policy.delay(failures, error), self.stop)

    def _planned(self, handle: int, total: int, validator: str | None) -> DownloadState:
        self.check_size(total)
        number = max(min(total // PIECE, 4 * self.connections if self.connections > 1 else 1), 1)
        edges = [total * index // number for index in range(number + 1)]
        pieces = [Piece(start, end) for start, end in zip(edges, edges[1:], strict=False)]
        state = DownloadState(self.remote.url, total, validator, pieces)
        self._save(handle, state)
        return state

    def _whole(self, handle: int, response: HTTPResponse) -> DownloadState:
        """Take the body of an answer that is not a piece, from its first byte to its last."""
        with closing(response):
            length = response.headers.get("Content-Length")
            expected = int(length) if length is not None and length.isdigit() else None
            if expected is not None:
                self.check_size(expected)
            state = DownloadState(self.remote.url, None, None, [Piece(0, None)])
            os.ftruncate(handle, 0)
            for chunk in read_chunks(response, self.policy, self.stop):
                self._write(handle, state, state.pieces[0], chunk, expected)
            there = state.pieces[0].done
            if expected is not None and there < expected:
                raise TransferError("broken", f"cut off after {there:,} of {expected:,} bytes")
            return state

    def _all_pieces(self, handle: int, state: DownloadState) -> None:
        left = [piece for piece in state.pieces if not piece.complete]
        if not left:
            return
        failed = threading.Event()
        try:
            with ThreadPoolExecutor(min(self.connections, len(left)), thread_name_prefix="download") as pool:
                work = [pool.submit(self._piece, handle, state, piece, failed) for piece in left]
                try:
                    wait(work, return_when=FIRST_EXCEPTION)
                finally:
                    failed.set()
                    for future in work:
                        future.cancel()
        finally:
            self._save(handle, state)
        errors = [error for future in work if not future.cancelled() and (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error
        if not all(piece.complete for piece in state.pieces):
            raise Stopped

    def _piece(self, handle: int, state: DownloadState, piece: Piece, failed: threading.Event) -> None:
        failures = 0
        while not piece.complete:
            if failed.is_set():
                raise Stopped
            before = piece.done
            try:
                self._continue(handle, state, piece, failed)
            except TransferError as error:
                failures = 1 if piece.done > before else failures + 1
                wait_or_stop(self.policy.delay(failures, error), self.stop)

    def _continue(self, handle: int, state: DownloadState, piece: Piece, failed: threading.Event) -> None:
        first = piece.start + piece.done
        headers = {"Range": f"bytes={first}-{(piece.end or 0) - 1}"}
        if state.validator:
            headers["If-Range"] = state.validator
        try:
            response = open_url(self.remote.url, self.policy, headers)
        except TransferError as error:
            if error.status == 416:
                raise _Restart("the file on the server has become shorter") from None
            raise
        with closing(response):
            given = content_range(response)
            if given is None:
                raise _Restart("the file on the server is another one now, or it no longer gives parts of it")
            if given != (first, state.total):
                raise _Restart(
                    f"the server gave bytes from {given[0]} of {given[1]}, not from {first} of {state.total}"
                )
            if state.validator and version_of(response) not in (None, state.validator):
                raise _Restart("the file on the server has changed")
            for chunk in read_chunks(response, self.policy, self.stop):
                room = (piece.end or 0) - piece.start - piece.done
                self._write(handle, state, piece, chunk[:room], state.total)
                if piece.complete or failed.is_set():
                    return
        if not piece.complete:
            raise TransferError("broken", f"cut off, {(piece.end or 0) - piece.start - piece.done:,} bytes short")

    def _write(self, handle: int, state: DownloadState, piece: Piece, chunk: bytes, total: int | None) -> None:
        offset, view = piece.start + piece.done, memoryview(chunk)
        while view:
            written = os.pwrite(handle, view, offset)
            view, offset = view[written:], offset + written
        piece.done += len(chunk)
        self.report(self._there(state), total)
        if state.total is not None and time.monotonic() - self._saved > _SAVE_EVERY:
            self._save(handle, state)

    def _save(self, handle: int, state: DownloadState) -> None:
        with self._lock:
            text = state.text()  # before the sync: it may promise less than is there, never more
            os.fsync(handle)
            write_text(self._state_path, text)
            self._saved = time.monotonic()

    @staticmethod
    def _there(state: DownloadState) -> int:
        return sum(piece.done for piece in state.pieces)


def file_matches(remote: RemoteFile, path: Path) -> str | None:
    """Say in a few words why the file at ``path`` is not the one meant, or None if it is or nothing is known of it."""
    for kind, expected in (("sha256", remote.sha256), ("md5", remote.md5)):
        if expected is None:
            continue
        digest = hashlib.new(kind, usedforsecurity=False)
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != expected.lower():
            return f"{path.stat().st_size:,} bytes, {kind} {digest.hexdigest()}, not {expected}"
    return None
