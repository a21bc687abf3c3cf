"""Data sets in their published layouts, written small from generated pictures."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
from data_makers import noise_jpeg, write_tar

WNIDS = ("n01440764", "n02123045")


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    path.write_bytes(zipped(files, method))
    return path


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def pixels(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 3, 32, 32), dtype=np.uint8)


def cifar_files(classes: int = 10, per_batch: int = 20) -> dict[str, bytes]:
    ten = classes == 10
    folder = "cifar-10-batches-py" if ten else "cifar-100-python"
    batches = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    files = {}
    for seed, name in enumerate(batches):
        record = {
            "batch_label": name,
            ("labels" if ten else "fine_labels"): [i % classes for i in range(per_batch)],
            "data": pixels(per_batch, seed).reshape(per_batch, -1),
            "filenames": [f"{i}.png" for i in range(per_batch)],
        }
        files[f"{folder}/{name}"] = pickle.dumps(record, protocol=2)
    names = [f"class{i}" for i in range(classes)]
    meta = {"label_names": names} if ten else {"fine_label_names": names, "coarse_label_names": ["x"]}
    return files | {f"{folder}/{'batches.meta' if ten else 'meta'}": pickle.dumps(meta, protocol=2)}


def write_cifar(root: Path, classes: int = 10, per_batch: int = 20) -> Path:
    return write_tree(root, cifar_files(classes, per_batch))


def svhn_files(number: int = 20) -> dict[str, bytes]:
    from scipy.io import savemat

    files = {}
    for seed, split in enumerate(("train", "test")):
        labels = np.array([i % 10 + 1 for i in range(number)], dtype=np.uint8).reshape(-1, 1)
        buffer = io.BytesIO()
        savemat(buffer, {"X": pixels(number, seed).transpose(2, 3, 1, 0), "y": labels})
        files[f"{split}_32x32.mat"] = buffer.getvalue()
    return files


def write_svhn(root: Path, number: int = 20) -> Path:
    return write_tree(root, svhn_files(number))


def dtd_files(classes=("banded", "dotted"), each: int = 3) -> dict[str, bytes]:
    return {f"dtd/images/{c}/{c}_{i:04d}.jpg": noise_jpeg(i) for c in classes for i in range(3 * each)} | {
        f"dtd/labels/{split}{partition}.txt": "".join(
            f"{c}/{c}_{(i + (partition - 1)) % (3 * each):04d}.jpg\n"
            for c in classes
            for i in range(part * each, (part + 1) * each)
        ).encode()
        for part, split in enumerate(("train", "val", "test"))
        for partition in (1, 2)
    }


def write_dtd(root: Path, classes=("banded", "dotted"), each: int = 3) -> Path:
    return write_tree(root, dtd_files(classes, each))


def eurosat_files(each: int = 15) -> dict[str, bytes]:
    from wlsup.data.published_folders import EUROSAT_COUNTS

    return {f"{c}/{c}_{i}.jpg": noise_jpeg(i, (64, 64)) for c in EUROSAT_COUNTS for i in range(1, each + 1)}


def write_imagenet(root: Path, each: int = 4) -> Path:
    return write_tree(
        root,
        {f"train/{w}/{w}_{i}.JPEG": noise_jpeg(i) for w in WNIDS for i in range(each)}
        | {f"val/{w}/ILSVRC2012_val_{n}{i:07d}.JPEG": noise_jpeg(i) for n, w in enumerate(WNIDS) for i in range(2)},
    )


def variant_files(name: str, each: int = 3) -> dict[str, bytes]:
    """ImageNet's other test sets, of the classes of `WNIDS` that each has; V2 by class number."""
    from wlsup.data.imagenet import imagenet_wnids

    base, ending = {
        "imagenet_v2": ("imagenetv2-matched-frequency-format-val", "jpeg"),
        "imagenet_a": ("imagenet-a", "jpg"),
        "imagenet_r": ("imagenet-r", "jpg"),
        "imagenet_sketch": ("sketch", "JPEG"),
    }[name]
    wnids = WNIDS[1:] if name == "imagenet_a" else WNIDS
    folders = [str(imagenet_wnids().index(w)) for w in wnids] if name == "imagenet_v2" else wnids
    files = {f"{base}/{folder}/{i:02d}.{ending}": noise_jpeg(i) for folder in folders for i in range(each)}
    return files | ({} if name == "imagenet_v2" else {f"{base}/README.txt": b"one folder a class"})


def write_published(root: Path, name: str) -> Path:
    """Write the published eval set ``name`` below ``root``, where ``--data.root`` looks for it."""
    folder = root / name
    if name == "eurosat":
        write_tree(folder / "2750", eurosat_files())
    elif name.startswith("imagenet_"):
        write_tree(folder, variant_files(name))
        write_imagenet(root / "imagenet")
    else:
        {
            "cifar10": write_cifar,
            "cifar100": lambda folder: write_cifar(folder, classes=100, per_batch=120),
            "svhn": write_svhn,
            "dtd": write_dtd,
            "imagenet": write_imagenet,
        }[name](folder)
    return root


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


def write_coco(root: Path, document=None, packed=None, skip=()) -> dict[str, str]:
    """Write COCO's annotations and pictures, in a folder or, with ``packed``, a zip; return captions and images."""
    document = document or coco_json()
    names = {record["file_name"]: record["id"] for record in document["images"] if record["file_name"] not in skip}
    pictures = {f"train2017/{name}": noise_jpeg(number) for name, number in names.items()}
    write_tree(root, {"annotations/captions_train2017.json": json.dumps(document).encode()})
    if packed is None:
        images = write_tree(root, pictures) / "train2017"
    else:
        images = write_zip(root / "train2017.zip", pictures, packed)
    return {"captions": str(root / "annotations/captions_train2017.json"), "images": str(images)}


CC3M_ROWS = [(f"caption of {i}", f"http://host{i % 3}.example/{i}.jpg?x={i}") for i in range(30)]


def write_cc3m(root: Path, rows=CC3M_ROWS, dead=(), tail=b"") -> dict[str, str]:
    """Write CC-3M's TSV and the folder that `wlsup data fetch` fills, without the ``dead`` of CC3M_ROWS."""
    from wlsup.data.conceptual_captions import cc3m_image_name

    text = "".join(f"{caption}\t{url}\n" for caption, url in rows).encode() + tail
    pictures = {
        f"images/{cc3m_image_name(url)}": noise_jpeg(i) for i, (_, url) in enumerate(CC3M_ROWS) if i not in dead
    }
    write_tree(root, {"Train_GCC-training.tsv": text, **pictures})
    return {"captions": str(root / "Train_GCC-training.tsv"), "images": str(root / "images")}


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


def write_cc3m_shards(folder: Path, shards: int = 3) -> dict[str, str]:
    """Write all of CC3M_ROWS as img2dataset does."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        rows = [(url, caption, noise_jpeg(i)) for i, (caption, url) in enumerate(CC3M_ROWS) if i % shards == shard]
        img2dataset_shard(folder / f"{shard:05d}.tar", rows, first=10_000 * shard)
    return {"images": str(folder)}


def imagenet_entries(each: int = 4) -> list[dict]:
    return [
        {
            "filename": f"{w}_{i}.JPEG",
            "wnid": w,
            "title": f"my fish {i}.",
            "tags": ["lake", "tench"],
            "description": 'caught <a href="http://x">here</a> &amp; now\n\n5 < 6',
        }
        for w in WNIDS
        for i in range(each)
    ]


def write_imagenet_captions(root: Path, entries=None, images: str = "train", each: int = 4) -> dict[str, str]:
    """Write ImageNet's tree and ImageNet-Captions' JSON."""
    write_imagenet(root / "ILSVRC", each)
    path = root / "imagenet_captions.json"
    path.write_text(json.dumps(imagenet_entries(each) if entries is None else entries))
    return {"captions": str(path), "images": str(root / "ILSVRC" / images)}
