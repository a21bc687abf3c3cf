"""HTTP, one request at a time: bounded redirects, stall time-outs, and failures sorted by what to do about them.

Built on ``urllib.request``: it brings redirects, proxies and verified TLS. The installed dependencies hold no kept
client to build on instead (``aiohttp`` comes with an extra of a dependency's dependency and may be absent), and none
of the usual ones resumes, verifies or paces a download, which is what the modules above this one are for.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from wlsup import __version__

__all__ = [
    "Stopped",
    "TransferError",
    "TransferPolicy",
    "clean_url",
    "content_range",
    "open_url",
    "read_chunks",
    "version_of",
    "wait_or_stop",
]

_CHUNK = 1 << 16
_SLOWEST = 256
"""Bytes a second below which a transfer counts as stalled; a server may drip one byte a minute for ever."""


class Stopped(Exception):  # noqa: N818  (a request to end, not a failure)
    """The user, or a failure elsewhere, asked the work to end."""


class TransferError(Exception):
    """A transfer that failed.

    Args:
        kind: "http", "timeout", "unreachable" (no such host, refused, no route), "broken" (cut off in the middle),
            "redirects", "refused" (an address this program will not ask for), "tls" or "invalid".
        detail: one line that says more.
        status: the server's answer, for kind "http".
        retry_after: seconds the server asks to wait, if it does.
    """

    def __init__(self, kind: str, detail: str, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.status = status
        self.retry_after = retry_after

    @property
    def retryable(self) -> bool:
        """Whether another try may end otherwise."""
        if self.kind == "http":
            return self.status in {408, 425, 429} or self.status >= 500
        return self.kind in {"timeout", "unreachable", "broken"}


@dataclass(frozen=True)
class TransferPolicy:
    """How patient to be.

    Args:
        timeout: seconds without a byte after which a connection counts as stalled.
        retries: tries in a row that bring nothing, after the first, before giving up.
        backoff: seconds before the first retry; doubled each time, with up to half of it added at random.
        longest_wait: seconds; a longer wait, also one a server asks for, is a failure.
        redirects: how many are followed.
        private_addresses: whether to talk to loopback, private and link-local addresses. Addresses out of a scraped
            list must not reach into the network this runs in.
    """

    timeout: float = 30.0
    retries: int = 6
    backoff: float = 1.0
    longest_wait: float = 300.0
    redirects: int = 8
    private_addresses: bool = True

    def delay(self, failures: int, error: TransferError) -> float:
        """Return the seconds to wait after the ``failures``-th failure in a row.

        Raises:
            TransferError: the given one, if it is no use to wait, or too long.
        """
        if not error.retryable or failures > self.retries:
            raise error
        if error.retry_after is not None:
            if error.retry_after > self.longest_wait:
                raise TransferError(error.kind, f"{error.detail}; asks to wait {error.retry_after:.0f} s", error.status)
            return error.retry_after
        pause = min(self.backoff * 2 ** (failures - 1), self.longest_wait)
        return pause * (1 + random.random() / 2)


def wait_or_stop(seconds: float, stop: threading.Event) -> None:
    """Sleep, or raise `Stopped` as soon as ``stop`` is set."""
    if stop.wait(seconds):
        raise Stopped


def clean_url(url: str) -> str:
    """Return ``url`` in plain ASCII, as a request needs it: spaces and foreign letters escaped, the host in IDNA.

    Raises:
        TransferError: if it is no HTTP(S) address.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host = (parts.hostname or "").encode("idna").decode("ascii")
        port = f":{parts.port}" if parts.port else ""
    except ValueError as error:  # UnicodeError is one
        raise TransferError("invalid", f"not an address: {url[:200]!r} ({error})") from None
    if parts.scheme.lower() not in {"http", "https"} or not host:
        raise TransferError("invalid", f"not an http or https address: {url[:200]!r}")
    if ":" in host:
        host = f"[{host}]"
    safe = "%/:=&?~+!$,;'@()*[]|"
    path, query = urllib.parse.quote(parts.path or "/", safe), urllib.parse.quote(parts.query, safe)
    return urllib.parse.urlunsplit((parts.scheme.lower(), host + port, path, query, ""))


def open_url(url: str, policy: TransferPolicy, headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
    """Ask for ``url``.

    Args:
        url: an http or https address.
        policy: time-outs and redirects.
        headers: further request headers.

    Returns:
        The answer, of status 200 or 206, its body not yet read; close it.

    Raises:
        TransferError: for any other outcome.
    """
    sent = {"User-Agent": f"wlsup/{__version__} (data set download)", "Accept-Encoding": "identity", **(headers or {})}
    try:
        request = urllib.request.Request(clean_url(url), headers=sent)
        return _opener(policy).open(request, timeout=policy.timeout)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise _sorted_out(error, policy) from error


def read_chunks(response: http.client.HTTPResponse, policy: TransferPolicy, stop: threading.Event) -> Iterator[bytes]:
    """Yield a body as it comes, until its end or the connection's.

    Raises:
        TransferError: if it stalls or breaks.
        Stopped: if ``stop`` is set.
    """
    window, received = time.monotonic(), 0
    while not stop.is_set():
        try:
            chunk = response.read1(_CHUNK)
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise _sorted_out(error, policy) from error
        if not chunk:
            return
        yield chunk
        received += len(chunk)
        elapsed = time.monotonic() - window
        if elapsed > policy.timeout:
            if received < _SLOWEST * elapsed:
                raise TransferError("timeout", f"only {received} bytes in {elapsed:.0f} s")
            window, received = time.monotonic(), 0
    raise Stopped


class _Refused(OSError):  # noqa: N818
    """The address is not one to talk to."""


class _Guarded:
    """Of a connection: refuse, before a request is sent, to talk to an address inside this network.

    The peer is looked at once connected, so that no name can resolve to one address when it is checked and to another
    when it is used.
    """

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        peer = self.sock.getpeername()[0]  # type: ignore[attr-defined]
        if not ipaddress.ip_address(peer.partition("%")[0]).is_global:
            self.close()  # type: ignore[attr-defined]
            raise _Refused(f"{peer} is not a public address")


class _GuardedHTTP(_Guarded, http.client.HTTPConnection):
    pass


class _GuardedHTTPS(_Guarded, http.client.HTTPSConnection):
    pass


class _PublicHTTP(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_GuardedHTTP, req)


class _PublicHTTPS(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_GuardedHTTPS, req, context=ssl.create_default_context())


_OPENERS: dict[tuple[int, bool], urllib.request.OpenerDirector] = {}


def _opener(policy: TransferPolicy) -> urllib.request.OpenerDirector:
    """Return an opener that knows http and https only: a redirect to ``file:`` or ``ftp:`` finds no handler."""
    proxies = urllib.request.getproxies()
    # A proxy resolves names itself, and lies inside the network as often as not: it does the guarding.
    guarded = not policy.private_addresses and not (proxies.get("http") or proxies.get("https"))
    key = (policy.redirects, guarded)
    if key not in _OPENERS:
        redirects = urllib.request.HTTPRedirectHandler()
        redirects.max_redirections = policy.redirects
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            _PublicHTTP() if guarded else urllib.request.HTTPHandler(),
            _PublicHTTPS() if guarded else urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
            redirects,
        ):
            opener.add_handler(handler)
        _OPENERS[key] = opener
    return _OPENERS[key]


def _sorted_out(error: Exception, policy: TransferPolicy) -> TransferError:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        if 300 <= error.code < 400:
            why = " ".join(str(error.reason).split())[:120]
            return TransferError("redirects", f"more than {policy.redirects} redirects, or one not followed: {why}")
        wait = _retry_after(error.headers.get("Retry-After"))
        return TransferError("http", f"HTTP {error.code} {error.reason}".strip(), error.code, wait)
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = " ".join(str(cause).split())[:200] or type(cause).__name__
    if isinstance(cause, _Refused):
        return TransferError("refused", text)
    if isinstance(cause, TimeoutError):
        return TransferError("timeout", f"nothing received for {policy.timeout:g} s")
    if isinstance(cause, ssl.SSLError):
        return TransferError("tls", text)
    if isinstance(cause, (socket.gaierror, ConnectionRefusedError)):
        return TransferError("unreachable", text)
    if isinstance(cause, (ConnectionError, http.client.HTTPException)):
        return TransferError("broken", f"{type(cause).__name__}: {text}")
    if isinstance(cause, OSError):
        return TransferError("unreachable", text)
    return TransferError("invalid", text)


def _retry_after(value: str | None) -> float | None:
    """Read a Retry-After header: seconds, or a date."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None


def content_range(response: http.client.HTTPResponse) -> tuple[int, int] | None:
    """Return (first byte, length of the whole file) of a partial answer; None of one that is not, or says not."""
    match = re.fullmatch(r"\s*bytes\s+(\d+)-\d+/(\d+)\s*", response.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if response.status == 206 and match else None


def version_of(response: http.client.HTTPResponse) -> str | None:
    """Return what names this version of the file: a strong ETag, else the date; a weak ETag cannot name bytes."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
