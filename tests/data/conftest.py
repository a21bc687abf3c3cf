"""Tiny data sets made on the spot."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for data_makers, which the tests here share

from data_makers import noise_jpeg, write_tar  # noqa: E402

from wlsup.batch import ImageSpec  # noqa: E402

torch.set_num_threads(1)
SPEC = ImageSpec(size=16, resize=18, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture
def spec() -> ImageSpec:
    return SPEC


@pytest.fixture
def make_set(tmp_path):
    """Write pictures with ``captions`` captions each; ``bad`` maps an index to other bytes, or to None for no file."""

    def make(number=24, captions=2, bad=None, tar=False, name="pairs"):
        bad = bad or {}
        folder = tmp_path / name
        folder.mkdir()
        files = {f"{i:03d}.jpg": bad.get(i, noise_jpeg(i)) for i in range(number)}
        files = {key: content for key, content in files.items() if content is not None}
        if tar:
            images = write_tar(folder / "images.tar", files)
        else:
            images = folder / "images"
            images.mkdir()
            for key, content in files.items():
                (images / key).write_bytes(content)
        table = folder / "captions.csv"
        with open(table, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption"])
            writer.writerows(
                [f"{i:03d}.jpg", f"picture {i}, caption {j}"] for i in range(number) for j in range(captions)
            )
        return {"captions": str(table), "images": str(images)}

    return make


@pytest.fixture
def make_module(make_set, spec):
    from wlsup.data.datamodule import CaptionDataModule

    def make(files=None, **settings):
        options = {"validation_pairs": 4, "batch_size": 4, **settings}
        module = CaptionDataModule(source="table", **(files or make_set()), **options)
        module.image_spec = spec
        return module

    return make
