"""Every data set's published files in their true layout, tiny, with the catalogue turned to them."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
from data_makers import noise_jpeg

from wlsup.data.catalog import CATALOG


def tar_gz(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def cifar(folder, label, files, meta):
    random = np.random.default_rng(0)
    content = {
        f"{folder}/{name}": pickle.dumps(
            {
                "data": random.integers(0, 256, (4, 3072), dtype=np.uint8),
                label: [0, 1, 2, 3],
                "filenames": [f"{name}_{i}.png" for i in range(4)],
            },
            protocol=2,
        )
        for name in files
    }
    content[f"{folder}/{meta[0]}"] = pickle.dumps(meta[1], protocol=2)
    return tar_gz(content)


def mat(seed):
    import scipy.io

    random, buffer = np.random.default_rng(seed), io.BytesIO()
    pictures = random.integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    scipy.io.savemat(buffer, {"X": pictures, "y": np.arange(1, 7, dtype=np.uint8)[:, None]})
    return buffer.getvalue()


def coco_captions(folder, first):
    return json.dumps(
        {
            "images": [{"id": first + i, "file_name": f"{first + i:012d}.jpg"} for i in range(3)],
            "annotations": [
                {"id": 10 * (first + i) + j, "image_id": first + i, "caption": f"picture {first + i}, caption {j}"}
                for i in range(3)
                for j in range(5)
            ],
        }
    ).encode()


@functools.cache
def published():
    """Return file name -> content of all that the catalogue downloads."""
    classes = [f"class{i}" for i in range(10)]
    eurosat = ["AnnualCrop", "Forest", "SeaLake"]
    return {
        "cifar-10-python.tar.gz": cifar(
            "cifar-10-batches-py",
            "labels",
            [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
            ("batches.meta", {"label_names": classes}),
        ),
        "cifar-100-python.tar.gz": cifar(
            "cifar-100-python",
            "fine_labels",
            ["train", "test"],
            ("meta", {"fine_label_names": [f"fine{i}" for i in range(100)]}),
        ),
        "train_32x32.mat": mat(0),
        "test_32x32.mat": mat(1),
        "EuroSAT.zip": zipped({f"2750/{name}/{name}_{i}.jpg": noise_jpeg(i) for name in eurosat for i in range(1, 4)}),
        "dtd-r1.0.1.tar.gz": tar_gz(
            {
                **{
                    f"dtd/images/{name}/{name}_{i:04d}.jpg": noise_jpeg(i)
                    for name in ("banded", "woven")
                    for i in (1, 2, 3)
                },
                **{
                    f"dtd/labels/{part}1.txt": f"banded/banded_{i:04d}.jpg\nwoven/woven_{i:04d}.jpg\n".encode()
                    for part, i in (("train", 1), ("val", 2), ("test", 3))
                },
                "dtd/imdb/imdb.mat": b"matlab",
            }
        ),
        "annotations_trainval2017.zip": zipped(
            {f"annotations/captions_{part}2017.json": coco_captions(part, i) for part, i in (("train", 1), ("val", 9))}
        ),
        "train2017.zip": zipped({f"train2017/{i:012d}.jpg": noise_jpeg(i) for i in (1, 2, 3)}),
        "val2017.zip": zipped({f"val2017/{i:012d}.jpg": noise_jpeg(i) for i in (9, 10, 11)}),
        "imagenet_captions.zip": zipped(
            {
                "imagenet_captions.json": json.dumps(
                    [
                        {
                            "filename": "n01440764_10026.JPEG",
                            "wnid": "n01440764",
                            "title": "A fish",
                            "tags": ["fish", "river"],
                            "description": "",
                        }
                    ]
                ).encode()
            }
        ),
    }


def publish(server, monkeypatch):
    """Serve all files, and let the catalogue name them by these addresses, sizes and checksums."""
    for name, content in published().items():
        server.serve(f"/official/{name}", content)
    for key, entry in CATALOG.items():
        files = tuple(
            replace(
                file,
                url=f"{server.url}/official/{file.name}",
                size=len(server.files[f"/official/{file.name}"]),
                md5=hashlib.md5(server.files[f"/official/{file.name}"]).hexdigest(),
                unpacked=1000 if file.unpacked else 0,
            )
            for file in entry.files
        )
        monkeypatch.setitem(CATALOG, key, replace(entry, files=files))
