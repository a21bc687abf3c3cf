"""Reading tar shards: who shows every sample exactly once, shuffles, resumes, and how fast, beside three peers.

Run:  python benchmarks/shards.py [--samples 3500] [--quick] [--json]

Seven shards that neither ranks, workers nor batches divide, read by 2 ranks (processes, gloo) x 2 workers, in batches
of 16. For each reader, over one shuffled epoch:

* seen by both ranks together, never seen, seen twice; batches of each rank (unequal numbers hang a training run that
  exchanges gradients);
* shards a batch: how many of the seven an average batch draws from (6.4 when any sample may come at any place); and
  spread: how far apart neighbours in a batch are stored, over what a uniform shuffle gives (1.0);
* repeatable: two readings with one seed agree; resumes: after half of the epoch, from the state of the loader in new
  processes, the rest is what would have come ("no state": the loader keeps none, and the epoch must be read again);
* samples/s of one process without workers, by the clock and by CPU time: bytes and key only, since decoding costs
  everybody the same.

webdataset and wids read our very shards; litdata must convert them first, which is timed too. Peers that are not
installed are named and left out: pip install wlsup[bench]   (wids came with webdataset until 1.0)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import queue
import random
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wlsup.data.loader import make_loader
from wlsup.data.sampler import EpochSampler
from wlsup.data.shard_index import load_index, verify_shards
from wlsup.data.shards import ShardPictures, ShardSample, write_shards

BATCH, RANKS, WORKERS, SHARDS = 16, 2, 2, 7
PATIENCE = 120  # seconds an epoch may take before it counts as hung
Batches = Iterable[list[str]]


def make(folder: Path, samples: int) -> None:
    """Write the shards: bytes of the size of small JPEGs."""
    sizes = np.random.default_rng(0).integers(10_000, 60_000, samples)
    blob = random.Random(0).randbytes(60_000)
    items = (ShardSample(f"{i:06d}", blob[:size], ".jpg", [f"caption {i}"]) for i, size in enumerate(sizes.tolist()))
    write_shards(items, folder, samples_per_shard=-(-samples // SHARDS))


class Ours(Dataset):
    """Keys and bytes by position."""

    def __init__(self, folder: Path) -> None:
        index = load_index(folder)
        verify_shards(index, folder)
        self.keys, self.pictures = list(index.keys), ShardPictures(folder, index)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitems__(self, items: list[tuple[int, int]]) -> list[str]:
        return [self.keys[index] for _, index in items if self.pictures.bytes_of(index)]


def ours(folder: Path, rank: int, ranks: int, workers: int, window: int | None = None) -> Batches:
    """Read through the index, by EpochSampler and BatchLoader."""
    dataset = Ours(folder)
    sampler = EpochSampler(
        len(dataset),
        batch_size=BATCH,
        rank=rank,
        world_size=ranks,
        groups=dataset.pictures.groups,
        shuffle_window=window,
    )
    return make_loader(dataset, sampler, BATCH, workers, None)


def ours_by_window(folder: Path, rank: int, ranks: int, workers: int) -> Batches:
    """The same, shuffled two shards at a time."""
    return ours(folder, rank, ranks, workers, window=2)


def webdataset(folder: Path, rank: int, ranks: int, workers: int) -> Batches:
    """A stream: shards are dealt to ranks and workers, samples shuffled in a buffer."""
    import webdataset as wds

    urls = sorted(map(str, folder.glob("*.tar")))
    stream = wds.WebDataset(urls, nodesplitter=wds.split_by_node, shardshuffle=100, seed=0, empty_check=False)
    stream = stream.shuffle(1000, rng=random.Random(0)).map(lambda item: json.loads(item["json"])["key"])
    return wds.WebLoader(stream.batched(BATCH, collation_fn=list), batch_size=None, num_workers=workers)


def wids(folder: Path, rank: int, ranks: int, workers: int) -> Batches:
    """A map over shards that it links or copies, and indexes itself."""
    import wids as library

    counts = load_index(folder).counts.tolist()
    shards = [{"url": str(p), "nsamples": n} for p, n in zip(sorted(folder.glob("*.tar")), counts, strict=True)]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # it tells its settings unasked
        dataset = library.ShardListDataset(shards, keep=True, cache_dir=str(folder / ".wids"), transformations=[])
    dataset.add_transform(lambda item: json.loads(item[".json"].read())["key"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of being one process alone
        sampler = library.DistributedChunkedSampler(dataset, shuffle=True, seed=0, num_replicas=ranks, rank=rank)
    return DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers, collate_fn=list)


def keys_alone(items: list[dict[str, object]]) -> list[object]:
    """Collate litdata's items."""
    return [item["key"] for item in items]


def litdata(folder: Path, rank: int, ranks: int, workers: int) -> Batches:
    """A stream over chunks of its own."""
    import litdata as library

    dataset = library.StreamingDataset(str(folder / "litdata"), shuffle=True, seed=0, drop_last=True)
    return library.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=keys_alone)


def prepare_litdata(folder: Path) -> float:
    """Convert the shards; return seconds."""
    from litdata.streaming.writer import BinaryWriter

    begin = time.perf_counter()
    dataset = Ours(folder)
    out = folder / "litdata"
    out.mkdir()
    writer = BinaryWriter(str(out), chunk_bytes="16MB")
    for i, key in enumerate(dataset.keys):
        writer.add_item(i, {"key": key, "jpg": dataset.pictures.bytes_of(i)})
    writer.done()
    writer.merge(1)
    return time.perf_counter() - begin


READERS: dict[str, tuple[str | None, Callable[..., Batches]]] = {
    "wlsup": (None, ours),
    "wlsup, window 2": (None, ours_by_window),
    "webdataset": ("webdataset", webdataset),
    "wids": ("wids", wids),
    "litdata": ("litdata", litdata),
}

Part = tuple[list[list[str]], object]  # one rank's batches, and the loader's state after them


def one_rank(name: str, folder: Path, rank: int, port: int, results: object, state: object, stop: int | None) -> None:
    """Read one epoch, or its first ``stop`` batches, or what comes after ``state``, as one of the ranks."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    batches: list[list[str]] = []
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
        loader = READERS[name][1](folder, rank, RANKS, WORKERS)
        if state is not None:
            loader.load_state_dict(state)
        for batch in itertools.islice(loader, stop):
            batches.append(list(batch))
            if len(batches) == stop:  # here, as a checkpoint is saved: the loader is still in the epoch
                state = loader.state_dict()
        results.put((rank, batches, state, None))
    except Exception as error:  # a peer's failure is a result
        results.put((rank, batches, None, f"{type(error).__name__}: {error}"[:200]))


def epoch(
    name: str, folder: Path, states: tuple[object, ...] = (None,) * RANKS, stop: int | None = None
) -> tuple[list[Part], str | None]:
    """Return every rank's batches of keys and state, in new processes; and what went wrong, if anything."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=one_rank, args=(name, folder, rank, port, results, states[rank], stop))
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    found = []
    try:
        found = sorted((results.get(timeout=PATIENCE) for _ in processes), key=lambda item: item[0])
    except queue.Empty:
        return [], f"hangs: no end after {PATIENCE} s"
    finally:
        for process in processes:
            process.join(5 if len(found) == RANKS else 0)
            if process.is_alive():
                process.kill()
    return [(batches, state) for _, batches, state, _ in found], next((error for *_, error in found if error), None)


def resumes(name: str, folder: Path, whole: list[list[list[str]]]) -> str:
    """Say whether half an epoch and what follows from its state make the whole one."""
    if not hasattr(READERS[name][1](folder, 0, 1, 0), "load_state_dict"):
        return "no state"
    half = min(map(len, whole)) // 2
    begun, error = epoch(name, folder, stop=half)
    if not error:
        rest, error = epoch(name, folder, states=tuple(state for _, state in begun))
    if error:
        return error
    joined = [first + second for (first, _), (second, _) in zip(begun, rest, strict=True)]
    keys = [key for rank in joined for batch in rank for key in batch]
    if joined == whole:
        return "exactly"
    missed = len({key for rank in whole for batch in rank for key in batch} - set(keys))
    return f"otherwise: {missed} missed, {len(keys) - len(set(keys))} twice"


def mixing(whole: list[list[list[str]]], folder: Path) -> dict[str, float]:
    """Measure how well the batches are shuffled."""
    index = load_index(folder)
    place = {key: (position, int(index.shard[position])) for position, key in enumerate(index.keys)}
    batches = [batch for rank in whole for batch in rank]
    gaps = [np.abs(np.diff([place[key][0] for key in batch])) for batch in batches]
    return {
        "shards_a_batch": statistics.mean(len({place[key][1] for key in batch}) for batch in batches),
        "spread": float(np.concatenate(gaps).mean() / (len(index) / 3)),
    }


def examine(name: str, folder: Path, samples: int, passes: int) -> dict[str, object]:
    """Count what an epoch shows, and time one process."""
    first, error = epoch(name, folder)
    if error:
        return {"error": error}
    again, _ = epoch(name, folder)
    whole = [batches for batches, _ in first]
    keys = [key for rank in whole for batch in rank for key in batch]
    speeds = []
    for _ in range(passes):
        begin, cpu = time.perf_counter(), time.process_time()
        seen = sum(len(batch) for batch in READERS[name][1](folder, 0, 1, 0))
        speeds.append((seen / (time.perf_counter() - begin), seen / (time.process_time() - cpu)))
    return {
        "seen": len(set(keys)),
        "missed": samples - len(set(keys)),
        "twice": len(keys) - len(set(keys)),
        "batches": [len(rank) for rank in whole],
        **mixing(whole, folder),
        "repeatable": first == again,
        "resumes": resumes(name, folder, whole),
        "samples_per_second": max(speed for speed, _ in speeds),
        "samples_per_cpu_second": max(speed for _, speed in speeds),
    }


def main() -> int:
    """Print the table; exit 1 if ours is not exact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3500)
    parser.add_argument("--quick", action="store_true", help="500 samples")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args()
    samples = 500 if options.quick else options.samples
    rows: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, samples)
        for reader, (module, _) in READERS.items():
            try:
                if module is not None:
                    importlib.import_module(module)
            except ImportError:
                rows[reader] = {"error": "not installed"}
            else:
                converted = prepare_litdata(folder) if reader == "litdata" else 0.0
                rows[reader] = examine(reader, folder, samples, 1 if options.quick else 3)
                if converted:
                    rows[reader]["conversion_seconds"] = converted
            if not options.json:
                print(f"{reader:<16} " + "  ".join(map(_shown, rows[reader].items())), flush=True)
    if options.json:
        print(json.dumps({"samples": samples, "rows": rows}, indent=2))
    left_over = samples % (BATCH * RANKS)
    exact = all(
        rows[name].get("missed") == left_over
        and rows[name].get("twice") == 0
        and rows[name].get("resumes") == "exactly"
        for name in READERS
        if READERS[name][0] is None
    )
    return 0 if exact else 1


def _shown(item: tuple[str, object]) -> str:
    key, value = item
    return f"{key} {value:.{0 if value > 99 else 2}f}" if isinstance(value, float) else f"{key} {value}"


if __name__ == "__main__":
    sys.exit(main())
