"""Reading tar shards: who shows every sample exactly once, and how fast, beside webdataset, wids and litdata.

Run:  python benchmarks/shards.py [--samples 3500] [--quick] [--json]

Seven shards that neither ranks, workers nor batches divide, read by 2 ranks (processes, gloo) x 2 workers. For each
reader, over one shuffled epoch: samples seen by both ranks together, samples missed, samples seen twice, batches of
each rank (unequal numbers hang a training run that exchanges gradients), whether two readings with one seed agree, and
samples/s of one process without workers (bytes only: decoding costs everybody the same). webdataset and wids read our
very shards; litdata must convert them first, which is timed too. Peers that are not installed are named and left out:

    pip install litdata "webdataset<1"      # wids came with webdataset until 1.0
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
Batches = Iterator[list[str]]


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
    yield from make_loader(dataset, sampler, BATCH, workers, None)


def ours_by_window(folder: Path, rank: int, ranks: int, workers: int) -> Batches:
    """The same, shuffled two shards at a time."""
    yield from ours(folder, rank, ranks, workers, window=2)


def webdataset(folder: Path, rank: int, ranks: int, workers: int) -> Batches:
    """A stream: shards are dealt to ranks and workers, samples shuffled in a buffer."""
    import webdataset as wds

    urls = sorted(map(str, folder.glob("*.tar")))
    stream = wds.WebDataset(urls, nodesplitter=wds.split_by_node, shardshuffle=100, seed=0, empty_check=False)
    stream = stream.shuffle(1000, rng=random.Random(0)).map(lambda item: json.loads(item["json"])["key"])
    yield from wds.WebLoader(stream.batched(BATCH), batch_size=None, num_workers=workers)


def wids(folder: Path, rank: int, ranks: int, workers: int) -> Batches:
    """A map over shards that it copies and indexes itself."""
    import wids as library

    counts = load_index(folder).counts.tolist()
    shards = [{"url": str(p), "nsamples": n} for p, n in zip(sorted(folder.glob("*.tar")), counts, strict=True)]
    dataset = library.ShardListDataset(shards, keep=True, cache_dir=str(folder / ".wids"), transformations=[])
    dataset.add_transform(lambda item: json.loads(item[".json"].read())["key"])
    sampler = library.DistributedChunkedSampler(dataset, shuffle=True, seed=0, num_replicas=ranks, rank=rank)
    yield from DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers, collate_fn=list)


def litdata(folder: Path, rank: int, ranks: int, workers: int) -> Batches:
    """A stream over chunks of its own."""
    import litdata as library

    dataset = library.StreamingDataset(str(folder / "litdata"), shuffle=True, seed=0, drop_last=True)
    for batch in library.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=list):
        yield [item["key"] for item in batch]


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


def one_rank(name: str, folder: Path, rank: int, port: int, results: object) -> None:
    """Read one epoch as one of the ranks."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
        batches = [list(batch) for batch in READERS[name][1](folder, rank, RANKS, WORKERS)]
        results.put((rank, batches, None))
    except Exception as error:  # a peer's failure is a result
        results.put((rank, [], f"{type(error).__name__}: {error}"[:200]))


def epoch(name: str, folder: Path) -> tuple[list[list[list[str]]], str | None]:
    """Return every rank's batches of keys."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=one_rank, args=(name, folder, rank, port, results)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    found = sorted((results.get(timeout=300) for _ in processes), key=lambda item: item[0])
    for process in processes:
        process.join(30)
        if process.is_alive():
            process.kill()
    return [batches for _, batches, _ in found], next((error for *_, error in found if error), None)


def examine(name: str, folder: Path, samples: int, passes: int) -> dict[str, object]:
    """Count what an epoch shows, and time one process."""
    first, error = epoch(name, folder)
    if error:
        return {"error": error}
    again, _ = epoch(name, folder)
    keys = [key for rank in first for batch in rank for key in batch]
    speeds = []
    for _ in range(passes):
        begin, cpu = time.perf_counter(), time.process_time()
        seen = sum(len(batch) for batch in READERS[name][1](folder, 0, 1, 0))
        speeds.append((seen / (time.perf_counter() - begin), seen / (time.process_time() - cpu)))
    return {
        "seen": len(set(keys)),
        "missed": samples - len(set(keys)),
        "twice": len(keys) - len(set(keys)),
        "batches": [len(rank) for rank in first],
        "repeatable": first == again,
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
                continue
            converted = prepare_litdata(folder) if reader == "litdata" else 0.0
            rows[reader] = examine(reader, folder, samples, 1 if options.quick else 3)
            if converted:
                rows[reader]["conversion_seconds"] = converted
            if not options.json:
                row = {
                    key: round(value) if isinstance(value, float) and value > 9 else value
                    for key, value in rows[reader].items()
                }
                print(f"{reader:<16} " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.json:
        print(json.dumps({"samples": samples, "rows": rows}, indent=2))
    left_over = samples % (BATCH * RANKS)
    return 0 if rows["wlsup"].get("missed") == left_over and rows["wlsup"].get("twice") == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
