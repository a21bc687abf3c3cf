"""Data sets in their published layouts, written small from generated pictures."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
from data_makers import noise_jpeg, write_tar


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def pixels(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 3, 32, 32), dtype=np.uint8)


def write_cifar(root: Path, classes: int = 10, per_batch: int = 20) -> Path:
    ten = classes == 10
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    batches = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    for seed, name in enumerate(batches):
        labels = [i % classes for i in range(per_batch)]
        record = {
            "batch_label": name,
            ("labels" if ten else "fine_labels"): labels,
            "data": pixels(per_batch, seed).reshape(per_batch, -1),
            "filenames": [f"{i}.png" for i in range(per_batch)],
        }
        (folder / name).write_bytes(pickle.dumps(record, protocol=2))
    names = [f"class{i}" for i in range(classes)]
    meta = {"label_names": names} if ten else {"fine_label_names": names, "coarse_label_names": ["x"]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return root


def write_svhn(root: Path, number: int = 20) -> Path:
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("train", "test")):
        labels = np.array([i % 10 + 1 for i in range(number)], dtype=np.uint8).reshape(-1, 1)
        savemat(root / f"{split}_32x32.mat", {"X": pixels(number, seed).transpose(2, 3, 1, 0), "y": labels})
    return root


def write_dtd(root: Path, classes=("banded", "dotted"), each: int = 3) -> Path:
    write_tree(
        root / "dtd",
        {f"images/{c}/{c}_{i:04d}.jpg": noise_jpeg(i) for c in classes for i in range(3 * each)}
        | {
            f"labels/{split}{partition}.txt": "".join(
                f"{c}/{c}_{(i + (partition - 1)) % (3 * each):04d}.jpg\n"
                for c in classes
                for i in range(part * each, (part + 1) * each)
            ).encode()
            for part, split in enumerate(("train", "val", "test"))
            for partition in (1, 2)
        },
    )
    return root


def eurosat_files(each: int = 15) -> dict[str, bytes]:
    from wlsup.data.published_folders import EUROSAT_COUNTS

    return {f"{c}/{c}_{i}.jpg": noise_jpeg(i, (64, 64)) for c in EUROSAT_COUNTS for i in range(1, each + 1)}


WNIDS = ("n01440764", "n02123045")


def write_imagenet(root: Path, each: int = 4) -> Path:
    return write_tree(
        root,
        {f"train/{w}/{w}_{i}.JPEG": noise_jpeg(i) for w in WNIDS for i in range(each)}
        | {f"val/{w}/ILSVRC2012_val_{n}{i:07d}.JPEG": noise_jpeg(i) for n, w in enumerate(WNIDS) for i in range(2)},
    )


def coco_json(number: int = 12, captions: int = 5, first: int = 1) -> dict:
    ids = [first + 37 * i for i in range(number)]
    return {
        "info": {"year": 2017, "nested": [1, {"x": [2]}]},
        "licenses": [{"id": 1, "url": "http://x"}],
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 32, "width": 40, "license": 1} for i in ids],
        "annotations": [
            {"image_id": i, "id": 100 * i + j, "caption": f"picture {i} caption {j}\n"}
            for j in range(captions)
            for i in reversed(ids)
        ],
    }


def img2dataset_shard(path: Path, rows: list[tuple[str, str, bytes]], first: int = 0, stats: bool = True) -> Path:
    """Write a shard as img2dataset does: jpg, txt and json by sample, and its statistics beside it."""
    files = {}
    for i, (url, caption, data) in enumerate(rows, start=first):
        key = f"{i:09d}"
        record = {"url": url, "caption": caption, "key": key, "status": "success", "sha256": "0" * 64}
        files |= {f"{key}.jpg": data, f"{key}.txt": caption.encode(), f"{key}.json": json.dumps(record).encode()}
    if stats:
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"count": len(rows), "successes": len(rows)}))
    return write_tar(path, files)


def png_of(array: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()
