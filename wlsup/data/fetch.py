"""``wlsup data fetch``: a data set of the catalogue, from its official addresses to its native layout on disk."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from wlsup.data.catalog import CatalogEntry, RemoteFile
from wlsup.data.download import Download, WrongBytes, file_matches
from wlsup.data.locate import entry_status
from wlsup.data.progress import human_bytes, progress
from wlsup.data.transport import Stopped, TransferError, TransferPolicy
from wlsup.errors import WlsupError

__all__ = ["FetchReport", "check_space", "fetch"]

_SPARE = 256 << 20
_log = logging.getLogger("wlsup.data")


@dataclass
class FetchReport:
    """What a fetch did.

    Args:
        name: the data set.
        folder: where it lies.
        downloaded: names of the files that came over the network.
        found: names of those that were there already.
        left_out: members of archives that were not unpacked, "name: why".
    """

    name: str
    folder: str
    downloaded: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def fetch(
    entry: CatalogEntry,
    root: Path,
    *,
    connections: int = 4,
    policy: TransferPolicy | None = None,
    mirror: str | None = None,
    keep_archives: bool = False,
) -> FetchReport:
    """Download, verify and unpack a data set; what is there already, also by hand, is verified and kept.

    Args:
        entry: which.
        root: the folder of all data sets.
        connections: at most so many at once, over all files.
        policy: time-outs and retries.
        mirror: address of a folder that holds the same files; the checksums still hold.
        keep_archives: whether to keep the archives once they are unpacked.

    Raises:
        WlsupError: if there is no room, no network, wrong bytes, or nothing that could be downloaded.
        KeyboardInterrupt: passed on; what has come is kept for the next time.
    """
    if connections < 1:
        raise WlsupError(f"--connections {connections}: give 1 or more.")
    status = entry_status(entry, root)
    report = FetchReport(entry.name, str(status.folder))
    if not entry.files and status.missing:
        raise WlsupError(
            f"{entry.by_hand} It is looked for in {status.folder}, which lacks {', '.join(status.missing)}."
        )
    files = [replace(file, url=f"{mirror.rstrip('/')}/{file.name}") if mirror else file for file in entry.files]
    # A file used as it is can still be verified; what an archive gave cannot.
    left = [file for file in files if not file.is_archive or any(path in status.missing for path in file.gives)]
    report.found = [file.name for file in files if file not in left]
    if not left:
        _log.info("%s is complete in %s", entry.name, status.folder)
        return report
    check_space(root, sum(_needed(file, status.folder) for file in left), entry.name)
    _fetch_files(left, status.folder, report, connections, policy or TransferPolicy(), keep_archives, entry)
    missing = entry_status(entry, root).missing
    if missing:
        raise WlsupError(
            f"{entry.name} was unpacked but lacks {', '.join(missing)} in {status.folder}; expected "
            f"{'; '.join(entry.layout)}. The publisher may have changed it."
        )
    return report


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse, before the first byte, what would not fit.

    Raises:
        WlsupError: if the disk that ``folder`` is or will be on has less than ``needed`` bytes and some to spare.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed and needed + _SPARE > free:
        raise WlsupError(
            f"{what} needs {human_bytes(needed)} (downloads and unpacked files) and {human_bytes(_SPARE)} to spare, "
            f"but the disk of {folder} has {human_bytes(free)} free. Free some, or give another folder with --root."
        )


def _fetch_files(
    files: list[RemoteFile],
    folder: Path,
    report: FetchReport,
    connections: int,
    policy: TransferPolicy,
    keep_archives: bool,
    entry: CatalogEntry,
) -> None:
    stop = threading.Event()
    there: dict[str, tuple[int, int | None]] = {file.name: (0, file.size) for file in files}
    parallel = max(min(len(files), connections), 1)
    failures: list[BaseException] = []
    with progress(f"fetch {entry.name}", unit="bytes") as show, ThreadPoolExecutor(parallel) as pool:

        def count(name: str, done: int, total: int | None) -> None:
            there[name] = done, total
            totals = [of for _, of in there.values()]
            show(sum(now for now, _ in there.values()), None if None in totals else sum(of or 0 for of in totals))

        def one(file: RemoteFile) -> tuple[RemoteFile, bool, list[str]]:
            target = folder / file.name
            came = not _already(file, target)
            if came:
                Download(
                    file,
                    target,
                    connections=max(connections // parallel, 1),
                    policy=policy,
                    report=lambda done, total: count(file.name, done, total),
                    stop=stop,
                    check_size=lambda size: check_space(folder, size - _there(target), file.name),
                ).run()
            left_out = []
            if file.is_archive:
                from wlsup.data.unpack import unpack

                _log.info("unpacking %s", file.name)
                left_out = unpack(target, folder)
                if not keep_archives:
                    target.unlink()
            return file, came, left_out

        work = {pool.submit(one, file): file for file in files}
        try:
            for future in as_completed(work):
                try:
                    file, came, left_out = future.result()
                except (TransferError, WlsupError, Stopped) as error:
                    failures.append(_explained(error, work[future], folder))
                    if not isinstance(error, WrongBytes):
                        stop.set()
                    continue
                (report.downloaded if came else report.found).append(file.name)
                report.left_out += left_out
        except BaseException:
            stop.set()
            raise
    for failure in sorted(failures, key=lambda failure: isinstance(failure, Stopped)):
        raise failure


def _already(file: RemoteFile, target: Path) -> bool:
    """Say whether the file itself is there and right, copied by hand perhaps; move a wrong one out of the way."""
    if not target.is_file():
        return False
    why = file_matches(file, target)
    if why is None:
        return True
    wrong = target.with_name(target.name + ".wrong")
    os.replace(target, wrong)
    _log.warning("%s is not the published file (%s): kept as %s, and downloaded anew", target, why, wrong.name)
    return False


def _explained(error: BaseException, file: RemoteFile, folder: Path) -> BaseException:
    """Turn a failed transfer into what the user should do."""
    if not isinstance(error, TransferError):
        return error
    target = folder / file.name
    check = f", md5 {file.md5}" if file.md5 else ""
    by_hand = (
        f"To do it by hand, get {file.url} ({human_bytes(file.size or 0)}{check}) on a machine that can, copy it to "
        f"{target}, and run the same command again: it verifies and unpacks it."
    )
    if error.kind == "unreachable":
        host = urlsplit(file.url).netloc
        return WlsupError(f"Cannot reach {host} ({error.detail}); this machine may have no network. {by_hand}")
    kept = " What has come so far is kept, and the same command goes on from there." if _there(target) else ""
    return WlsupError(f"{file.url}: {error.detail}.{kept} {by_hand}")


def _there(target: Path) -> int:
    """Return the bytes of a begun download (a hole in it is none)."""
    try:
        return target.with_name(target.name + ".part").stat().st_blocks * 512
    except OSError:
        return 0


def _needed(file: RemoteFile, folder: Path) -> int:
    target = folder / file.name
    there = (file.size or 0) if target.is_file() else _there(target)
    return max((file.size or 0) - there, 0) + file.unpacked
