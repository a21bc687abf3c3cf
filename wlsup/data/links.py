"""Fetching pictures by links, many at a time and few from any one host, each decoded before it counts."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from wlsup.data.images import MAX_PIXELS, UnreadableImage, decode_rgb
from wlsup.data.ledger import Ledger, Link, Outcome
from wlsup.data.transport import TransferError, TransferPolicy, open_url, read_chunks, wait_or_stop
from wlsup.errors import WlsupError

__all__ = ["LINK_POLICY", "LinkOptions", "fetch_links"]

LINK_POLICY = TransferPolicy(
    timeout=10.0, retries=2, backoff=1.0, longest_wait=30.0, redirects=5, private_addresses=False
)
"""Less patient than for one large file: of three million links some hundred thousand lead nowhere."""

_AGAIN_LATER = ("timeout", "unreachable")
"""Not retried at once: a host that is silent now is so in a second, and the waiting adds up to days. A second run with
these outcomes set back to pending is the retry."""

_COMMIT_EVERY = 1.0
_UNREACHABLE_HOSTS = 30
_log = logging.getLogger("wlsup.data")


@dataclass(frozen=True)
class LinkOptions:
    """How to fetch.

    Args:
        connections: at most so many at once.
        per_host: at most so many at once from one host.
        max_bytes: a larger file is not taken.
        max_pixels: a larger picture is not taken.
        min_side: in pixels; a picture with a shorter side (a tracking pixel, a spacer) is not taken.
        deadline: seconds that one picture may take, all in all.
        policy: time-outs and retries of one request.
    """

    connections: int = 64
    per_host: int = 2
    max_bytes: int = 32 << 20
    max_pixels: int = MAX_PIXELS
    min_side: int = 16
    deadline: float = 30.0
    policy: TransferPolicy = LINK_POLICY


def fetch_links(
    ledger: Ledger,
    folder: Path,
    options: LinkOptions,
    *,
    limit: int | None = None,
    report: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Fetch what the ledger has pending, into ``folder``, and write down the outcomes.

    Args:
        ledger: whose rows are loaded.
        folder: where the pictures go, each under its link's name.
        options: limits.
        limit: only links of the first rows.
        report: called with (links decided, links in all).

    Raises:
        WlsupError: if the network, rather than the links, seems to be dead; those links stay pending.
        KeyboardInterrupt: passed on, once what is known is in the ledger.
    """
    total, done, answered = ledger.count_pending(limit), 0, ledger.ever_answered()
    queue = _HostQueue(ledger.pending(limit), options)
    stop = threading.Event()
    running: dict[Future[Outcome], str] = {}
    silence: list[Outcome] = []  # not yet believed
    committed = time.monotonic()
    pool = ThreadPoolExecutor(options.connections, thread_name_prefix="links")
    try:
        while True:
            while len(running) < options.connections and (taken := queue.take()) is not None:
                host, link = taken
                running[pool.submit(_fetch_link, link, folder, options, stop)] = host
            if not running:
                break
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                queue.free(running.pop(future))
                done += 1
                answered |= outcome.outcome != "unreachable"
                silence = _weigh(outcome, silence, ledger)
                report(done, total)
            if time.monotonic() - committed > _COMMIT_EVERY:
                ledger.commit()
                committed = time.monotonic()
        if silence and not answered:
            raise _no_network(silence)
        for outcome in silence:
            ledger.record(outcome)
    except OSError as error:
        raise WlsupError(
            f"Pictures cannot be written to {folder}: {error}. Free some space, then run again."
        ) from error
    finally:
        stop.set()
        ledger.commit()
        pool.shutdown(wait=True, cancel_futures=True)
        for future in running:
            if not future.cancelled() and future.exception() is None and future.result().outcome != "unreachable":
                ledger.record(future.result())
        ledger.commit()


def _weigh(outcome: Outcome, silence: list[Outcome], ledger: Ledger) -> list[Outcome]:
    """Record an outcome; hold back unreachable hosts until some other host answers.

    Without this, a cable pulled for a minute would write off thousands of good links.
    """
    if outcome.outcome == "unreachable":
        silence = [*silence, outcome]
        if len({_host(held.link.url) for held in silence}) < _UNREACHABLE_HOSTS:
            return silence
        raise _no_network(silence)
    for held in (*silence, outcome):
        ledger.record(held)
    return []


def _no_network(silence: list[Outcome]) -> WlsupError:
    return WlsupError(
        f"The last {len(silence)} links were all unreachable ({silence[-1].detail}): the network seems to be down, or "
        "this machine has none. They stay pending: run the same command again where there is one, or copy the folder "
        "of pictures with its ledger.sqlite from a machine that has."
    )


@dataclass
class _HostQueue:
    """Hands out links in order, skipping those whose host is busy.

    Args:
        links: all of them; read as needed.
        options: limits.
    """

    links: Iterator[Link]
    options: LinkOptions
    _waiting: deque[tuple[str, Link]] = field(default_factory=deque)
    _busy: dict[str, int] = field(default_factory=dict)

    def take(self) -> tuple[str, Link] | None:
        """Return a host with a place free and a link to it, or None if there is none at hand."""
        for index, (host, _) in enumerate(self._waiting):
            if self._has_place(host):
                taken = self._waiting[index]
                del self._waiting[index]
                return self._occupy(*taken)
        # looked ahead so far and no further: one host may hold the next million rows
        while len(self._waiting) < 64 * self.options.connections and (link := next(self.links, None)) is not None:
            host = _host(link.url)
            if self._has_place(host):
                return self._occupy(host, link)
            self._waiting.append((host, link))
        return None

    def free(self, host: str) -> None:
        """Note that a link of ``host`` is done."""
        self._busy[host] -= 1
        if not self._busy[host]:
            del self._busy[host]

    def _has_place(self, host: str) -> bool:
        return self._busy.get(host, 0) < self.options.per_host

    def _occupy(self, host: str, link: Link) -> tuple[str, Link]:
        self._busy[host] = self._busy.get(host, 0) + 1
        return host, link


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return url


def _fetch_link(link: Link, folder: Path, options: LinkOptions, stop: threading.Event) -> Outcome:
    """Fetch one picture, with retries; never raises for what the link does, only when told to stop."""
    target = folder / link.name
    if target.is_file() and (outcome := _accept(link, target.read_bytes(), options, 0)).outcome == "ok":
        return outcome  # from a run killed before the ledger was written, or from elsewhere
    deadline = time.monotonic() + options.deadline
    attempts = 0
    while True:
        attempts += 1
        try:
            data = _get(link.url, options, deadline, stop)
            if isinstance(data, str):
                return Outcome(link, "too-large", attempts, detail=data)
            outcome = _accept(link, data, options, attempts)
            if outcome.outcome == "ok":
                _put(target, data)
            return outcome
        except TransferError as error:
            try:
                pause = options.policy.delay(attempts, error)
                if error.kind in _AGAIN_LATER or time.monotonic() + pause > deadline:
                    raise error
            except TransferError as final:
                return Outcome(link, _outcome_of(final), attempts, detail=final.detail)
            wait_or_stop(pause, stop)


def _get(url: str, options: LinkOptions, deadline: float, stop: threading.Event) -> bytes | str:
    """Return the body, or why it is too large."""
    with closing(open_url(url, options.policy, {"Accept": "image/*,*/*;q=0.5"})) as response:
        length = response.headers.get("Content-Length", "")
        expected = int(length) if length.isdigit() else None
        if expected is not None and expected > options.max_bytes:
            return f"more than {options.max_bytes:,} bytes"
        chunks: list[bytes] = []
        size = 0
        for chunk in read_chunks(response, options.policy, stop):
            size += len(chunk)
            chunks.append(chunk)
            if size > options.max_bytes:
                return f"more than {options.max_bytes:,} bytes"
            if time.monotonic() > deadline:
                raise TransferError("timeout", f"not there after {options.deadline:g} s")
        if expected is not None and size < expected:
            raise TransferError("broken", "cut off in the middle")
        return b"".join(chunks)


def _accept(link: Link, data: bytes, options: LinkOptions, attempts: int) -> Outcome:
    """Decode what came: an error page, a tracking pixel or half a picture is not one."""
    try:
        picture = decode_rgb(data, max_pixels=options.max_pixels)
    except UnreadableImage as error:
        large = "above the limit" in error.reason
        detail = error.reason if large or len(error.reason) < 80 else error.reason[:80]
        return Outcome(link, "too-large" if large else "not-an-image", attempts, len(data), detail=detail)
    _, height, width = picture.shape
    if min(height, width) < options.min_side:
        return Outcome(link, "too-small", attempts, len(data), detail=f"{width} x {height} pixels")
    return Outcome(link, "ok", attempts, len(data), hashlib.sha256(data).hexdigest(), width, height)


def _outcome_of(error: TransferError) -> str:
    if error.kind == "http":
        if error.status in {408, 504}:
            return "timeout"
        return "throttled" if error.status == 429 else "server-error" if error.status >= 500 else "dead"
    return {"redirects": "dead", "tls": "dead", "invalid": "dead"}.get(error.kind, error.kind)


def _put(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{threading.get_ident()}")
    temporary.write_bytes(data)
    os.replace(temporary, target)
