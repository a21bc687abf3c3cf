"""Looking closely at many pictures at once, also at one that makes its process crash."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from wlsup.data.inspection import PictureFacts, PictureReader

__all__ = ["inspect_all"]

_CHUNK = 32


def inspect_all(
    reader: PictureReader,
    *,
    workers: int = 0,
    min_side: int = 16,
    report: Callable[[int, int | None], None] = lambda done, total: None,
) -> Iterator[PictureFacts]:
    """Look at every picture; the order is that of completion.

    Args:
        reader: the pictures.
        workers: processes; 0 to work in this one. A picture that makes a process crash is a fault like any other.
        min_side: as `inspect_bytes`.
        report: called with (pictures done, pictures in all).
    """
    chunks = [range(start, min(start + _CHUNK, len(reader))) for start in range(0, len(reader), _CHUNK)]
    results = (
        ([reader.facts(index, min_side) for index in chunk] for chunk in chunks)
        if workers < 1
        else _in_processes(reader, chunks, workers, min_side)
    )
    done = 0
    for facts in results:
        done += len(facts)
        report(done, len(reader))
        yield from facts


def _in_processes(
    reader: PictureReader, chunks: Sequence[range], workers: int, min_side: int
) -> Iterator[list[PictureFacts]]:
    left = list(reversed(chunks))
    running: dict[Future[list[PictureFacts]], range] = {}
    with _pool(reader, workers) as pool:
        try:
            while left or running:
                while left and len(running) < 3 * workers:
                    future = pool.submit(_look, left[-1], min_side)  # may raise, and then the chunk must not be lost
                    running[future] = left.pop()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    facts = future.result()
                    del running[future]
                    yield facts
            return
        except BrokenProcessPool:
            left += [chunk for future, chunk in running.items() if not _came_through(future)]
            facts = [future.result() for future in running if _came_through(future)]
    yield from facts
    # One of a few chunks killed its process. One by one, to name the picture.
    suspects = [index for chunk in left[-3 * workers :] for index in chunk]
    yield _one_by_one(reader, suspects, min_side)
    yield from _in_processes(reader, left[: -3 * workers], workers, min_side)


def _came_through(future: Future[list[PictureFacts]]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _one_by_one(reader: PictureReader, suspects: Sequence[int], min_side: int) -> list[PictureFacts]:
    facts: list[PictureFacts] = []
    while len(facts) < len(suspects):
        with _pool(reader, 1) as pool:  # a new process after each that died
            try:
                for index in suspects[len(facts) :]:
                    facts += pool.submit(_look, range(index, index + 1), min_side).result()
            except BrokenProcessPool:
                facts.append(PictureFacts(reader.keys[suspects[len(facts)]], "corrupt", "crashes the decoder"))
    return facts


def _pool(reader: PictureReader, workers: int) -> ProcessPoolExecutor:
    # A fork has everything imported already; elsewhere each process imports for itself.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_adopt, initargs=(reader,))


_reader: PictureReader | None = None


def _adopt(reader: PictureReader) -> None:
    global _reader
    _reader = reader


def _look(indices: range, min_side: int) -> list[PictureFacts]:
    if _reader is None:
        raise RuntimeError("the process was not set up")
    return [_reader.facts(index, min_side) for index in indices]
