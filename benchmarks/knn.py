"""Time and memory of k-NN classification against the bare matrix product and against the peers.

    pip install lightly
    python benchmarks/knn.py [--json] [--quick] [--widths 768 192] [--bank 50000] [--queries 10000] [--k 20] [--pairs 3]
                             [--only CANDIDATE ...]

From normalised features to predictions, T = 0.07, ten classes, one thread. Time: the product of all queries with the
bank, in blocks of 1,024, is timed again before every run of a candidate; the ratio within each pair, the median over
pairs. Seconds are the process's own, over all its threads: what else the machine does does not count. Memory: peak
resident size above that with the features loaded, each candidate in a fresh process that has imported its libraries and
run nothing. Agreement: predictions equal to DINO's rule (its ties, and neighbours that fp32 cannot tell apart, go
either way). Bars, for ours at the first width: time <= 1.05 of the product, memory <= 40 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from wlsup.evaluation.knn import knn_predict
from wlsup.evaluation.neighbors import normalize_

TEMPERATURE, CLASSES = 0.07, 10
BARS = {"time_ratio": 1.05, "peak_mb": 40.0}

Candidate = Callable[[Tensor, Tensor, Tensor, int], Tensor | None]


def make_features(bank: int, queries: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features of overlapping classes: bank (n, D), its labels (n,), queries (m, D)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, width, generator=generator)
    parts = []
    for size in (bank, queries):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        features = torch.randn(size, width, generator=generator)
        for rows, classes in zip(features.split(4096), labels.split(4096), strict=True):
            rows.mul_(6).add_(centres[classes])
        parts += [normalize_(features), labels]
    return parts[0], parts[1], parts[2]


def product(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> None:
    """The bare fp32 product in blocks: what any exact search pays."""
    for some in queries.split(1024):
        for rows in bank.split(1024):
            some @ rows.T


def ours(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """The product under test, with faiss's search."""
    return knn_predict(bank, labels, queries, k=k, temperature=TEMPERATURE, num_classes=CLASSES)


def ours_torch(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """The same where faiss is not installed."""
    return knn_predict(bank, labels, queries, k=k, temperature=TEMPERATURE, num_classes=CLASSES, search="torch")


def dino(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """Port of ``knn_classifier`` in facebookresearch/dino's eval_knn.py: 100 chunks, one-hot votes."""
    chunk = max(1, len(queries) // 100)
    predictions = []
    for some in queries.split(chunk):
        similarity = torch.mm(some, bank.t())
        distances, indices = similarity.topk(k, largest=True, sorted=True)
        neighbours = torch.gather(labels.view(1, -1).expand(len(some), -1), 1, indices)
        one_hot = torch.zeros(len(some) * k, CLASSES).scatter_(1, neighbours.view(-1, 1), 1)
        weights = distances.clone().div_(TEMPERATURE).exp_()
        votes = torch.sum(one_hot.view(len(some), -1, CLASSES) * weights.view(len(some), -1, 1), 1)
        predictions.append(votes.sort(1, True).indices[:, 0])
    return torch.cat(predictions)


def lightly(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """Peer: lightly's knn_predict, in batches of 256 as its own benchmarks call it."""
    from lightly.utils.benchmarking import knn_predict as peer

    columns = bank.t()  # a view, where lightly's own benchmark keeps a transposed copy
    parts = [peer(some, columns, labels, CLASSES, knn_k=k, knn_t=TEMPERATURE)[:, 0] for some in queries.split(256)]
    return torch.cat(parts)


def vote(similarities: np.ndarray, indices: np.ndarray, labels: Tensor) -> Tensor:
    """DINO's vote on a search's result, for the peers that only search."""
    votes = torch.zeros(len(indices), CLASSES)
    votes.scatter_add_(1, labels[torch.from_numpy(indices)], (torch.from_numpy(similarities) / TEMPERATURE).exp())
    return votes.argmax(1)


def faiss_knn(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """faiss.knn, which needs no index."""
    import faiss

    return vote(*faiss.knn(queries.numpy(), bank.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT), labels)


def faiss_flat(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """Peer: faiss's exact index, which copies the bank."""
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    return vote(*index.search(queries.numpy(), k), labels)


def scikit_learn(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """scikit-learn's classifier with DINO's weights."""
    from sklearn.neighbors import KNeighborsClassifier

    peer = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    )
    return torch.from_numpy(peer.fit(bank.numpy(), labels.numpy()).predict(queries.numpy()))


CANDIDATES: dict[str, Candidate] = {
    "ours": ours,
    "ours, torch only": ours_torch,
    "faiss.knn + vote": faiss_knn,
    "faiss IndexFlatIP + vote": faiss_flat,
    "DINO eval_knn": dino,
    "lightly knn_predict": lightly,
    "scikit-learn": scikit_learn,
}
NEEDS = {
    "ours": ["faiss"],
    "faiss.knn + vote": ["faiss"],
    "faiss IndexFlatIP + vote": ["faiss"],
    "lightly knn_predict": ["lightly.utils.benchmarking"],
    "scikit-learn": ["sklearn.neighbors"],
}


def load(name: str) -> bool:
    """Import a candidate's libraries; False where one is not installed."""
    try:
        for module in NEEDS.get(name, []):
            __import__(module)
    except ImportError:
        return False
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(1)
    threadpool_limits(1)
    return True


def measure_time(
    name: str, features: tuple[Tensor, Tensor, Tensor], k: int, pairs: int
) -> tuple[dict[str, object], Tensor]:
    """Ratio to the product, and the predictions."""
    candidate, ratios, seconds = CANDIDATES[name], [], []
    predictions = None
    for _ in range(pairs):
        began = time.process_time()
        product(*features, k)
        middle = time.process_time()
        predictions = candidate(*features, k)
        seconds.append(time.process_time() - middle)
        ratios.append(seconds[-1] / (middle - began))
    row = {
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
        "seconds": statistics.median(seconds),
    }
    return row, predictions


def measure_memory(name: str, width: int, args: argparse.Namespace) -> float:
    """Peak MB above start, in a fresh process."""
    command = [sys.executable, __file__, "--probe", name, "--widths", str(width), "--k", str(args.k)]
    command += ["--bank", str(args.bank), "--queries", str(args.queries)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=900).stdout)


def probe(name: str, width: int, args: argparse.Namespace) -> None:
    """Print the peak of one run, in MB."""
    load(name)
    features = make_features(args.bank, args.queries, width)
    with open("/proc/self/statm") as statm:
        start = int(statm.read().split()[1]) * resource.getpagesize()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # forgets the peak so far, which was that of making the features
    CANDIDATES[name](*features, args.k)
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print((peak - start) / 1e6)


def measure(width: int, args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """All numbers at one width."""
    features = make_features(args.bank, args.queries, width)
    # Both libraries' threads and buffers are up before anything is timed.
    for warm in (product, ours_torch, ours):
        warm(features[0][:4096], features[1][:4096], features[2][:4096], args.k)
    rows, predictions = {}, {}
    for name in args.only:
        if not load(name):
            print(f"{name}: not installed, left out", file=sys.stderr)
            continue
        print(f"D={width}: {name}", file=sys.stderr)
        rows[name], predictions[name] = measure_time(name, features, args.k, args.pairs)
        rows[name]["peak_mb"] = measure_memory(name, width, args)
    if "DINO eval_knn" in rows:
        for name, row in rows.items():
            row["agrees_with_dino"] = float((predictions[name] == predictions["DINO eval_knn"]).double().mean())
    return rows


def main() -> int:
    """Print the numbers; exit with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="10,000 x 2,000: seconds, and no verdict on the bars")
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 192])
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3, help="timed pairs; the median is reported")
    parser.add_argument("--only", nargs="+", choices=tuple(CANDIDATES), default=list(CANDIDATES), metavar="CANDIDATE")
    parser.add_argument("--probe", choices=tuple(CANDIDATES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    if args.probe:
        probe(args.probe, args.widths[0], args)
        return 0
    if args.quick:
        args.bank, args.queries = 10_000, 2_000
    widths = {str(width): measure(width, args) for width in args.widths}
    first = widths[str(args.widths[0])].get("ours")
    judged = first is not None and not args.quick
    met = all(first[name] <= bar for name, bar in BARS.items()) if judged else None
    result = {
        "benchmark": "knn",
        "bank": args.bank,
        "queries": args.queries,
        "k": args.k,
        "pairs": args.pairs,
        "torch": torch.__version__,
        "bars": BARS,
        "widths": widths,
        "met": met,
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"bank {args.bank:,}, queries {args.queries:,}, k = {args.k}, one thread; time as a multiple of the product"
        )
        for width, rows in widths.items():
            print(f"\n{'D = ' + width:26}  time   (range)          seconds   peak MB   agrees with DINO")
            for name, row in rows.items():
                low, high = row["time_ratio_range"]
                agrees = f"{100 * row['agrees_with_dino']:.2f} %" if "agrees_with_dino" in row else "-"
                print(
                    f"{name:26} {row['time_ratio']:5.2f}x  ({low:.2f} to {high:.2f})  {row['seconds']:8.2f}  "
                    f"{row['peak_mb']:8.0f}   {agrees}"
                )
        verdict = {None: "not judged on such a run", True: "met", False: "MISSED"}[met]
        print(f"\nbars, ours at D = {args.widths[0]}: time <= 1.05x, memory <= 40 MB: {verdict}")
    return 1 if met is False else 0


if __name__ == "__main__":
    sys.exit(main())
