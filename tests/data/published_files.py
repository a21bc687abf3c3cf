"""Every data set's published files in their true layout, tiny, with the catalogue turned to them."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
from dataclasses import replace

from data_makers import noise_jpeg
from native import cifar_files, coco_json, dtd_files, imagenet_entries, svhn_files, zipped

from wlsup.data.catalog import CATALOG


def tar_gz(files, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def tar_of(files):
    return tar_gz(files, "w:")


@functools.cache
def published():
    """Return file name -> content of all that the catalogue downloads."""
    coco = {part: coco_json(3, first=first) for part, first in (("train", 1), ("val", 1000))}
    eurosat = ("AnnualCrop", "Forest", "SeaLake")
    return svhn_files(6) | {
        "cifar-10-python.tar.gz": tar_gz(cifar_files(10, 4)),
        "cifar-100-python.tar.gz": tar_gz(cifar_files(100, 4)),
        "EuroSAT.zip": zipped({f"2750/{name}/{name}_{i}.jpg": noise_jpeg(i) for name in eurosat for i in range(1, 4)}),
        "dtd-r1.0.1.tar.gz": tar_gz(dtd_files(each=1) | {"dtd/imdb/imdb.mat": b"matlab"}),
        "annotations_trainval2017.zip": zipped(
            {f"annotations/captions_{part}2017.json": json.dumps(document).encode() for part, document in coco.items()}
        ),
        **{
            f"{part}2017.zip": zipped(
                {f"{part}2017/{record['file_name']}": noise_jpeg(record["id"]) for record in document["images"]}
            )
            for part, document in coco.items()
        },
        "imagenetv2-matched-frequency.tar.gz": tar_gz(
            {f"imagenetv2-matched-frequency-format-val/{n}/0.jpeg": noise_jpeg(n) for n in (0, 999)}
        ),
        "imagenet-a.tar": tar_of({"imagenet-a/n01498041/0.jpg": noise_jpeg(1), "imagenet-a/README.txt": b"x"}),
        "imagenet-r.tar": tar_of({"imagenet-r/n01443537/0.jpg": noise_jpeg(2), "imagenet-r/README.txt": b"x"}),
        "imagenet_captions.zip": zipped({"imagenet_captions.json": json.dumps(imagenet_entries()).encode()}),
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
