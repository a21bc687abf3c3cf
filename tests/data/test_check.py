"""A check names every planted fault and nothing else, the same with and without processes."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_makers import encode, noise_jpeg, write_tar
from faulty import noise, plant_faults, write_faulty_shards
from native import coco_json, write_cc3m_shards, write_coco, zipped
from PIL import Image
from published_files import published

from wlsup.data.check import check, check_folder, check_table
from wlsup.data.check_report import FAULTS
from wlsup.data.conceptual_captions import cc3m_image_name
from wlsup.data.inspection import FileReader, PictureFacts, inspect_bytes
from wlsup.data.inspection_pool import inspect_all
from wlsup.data.shard_index import INDEX_NAME, save_index
from wlsup.data.shards import build_index
from wlsup.errors import WlsupError


@pytest.fixture
def planted(tmp_path):
    return plant_faults(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_kinds_of_planted_faults_are_named_and_no_others(planted, workers):
    captions, images, expected = planted
    report = check_table(captions, images, workers=workers)
    assert {(fault.kind, fault.name) for fault in report.faults} == expected
    assert len(report.faults) == len(expected) == len({kind for kind, _ in expected}) == 10
    assert set(report.counts) <= set(FAULTS)
    assert report.pictures == 30
    assert json.loads(json.dumps(report.to_json()))["clean"] is False


def test_the_same_pictures_in_a_tar(planted, tmp_path):
    captions, images, expected = planted
    files = {name: Path(images, name).read_bytes() for name in sorted(os.listdir(images))}
    tar = write_tar(tmp_path / "images.tar", files)
    assert {(fault.kind, fault.name) for fault in check_table(captions, str(tar)).faults} == expected


def test_a_clean_set_is_clean_and_measured(make_set):
    files = make_set(number=6, captions=2)
    report = check_table(files["captions"], files["images"])
    assert report.faults == []
    assert (report.pictures, report.captions) == (6, 12)
    words = report.caption_words
    assert (words["min"], words["median"], words["max"]) == (4, 4, 4)
    assert words["histogram"]["3-4"] == 12
    assert sum(words["histogram"].values()) == 12


def test_odd_pictures_are_remarked_and_no_faults(tmp_path):
    rotated = Image.Exif()
    rotated[274] = 6
    palette = noise((40, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    odd = {
        "cmyk": encode(noise((40, 30)).convert("CMYK"), "JPEG"),
        "16-bit": encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))),
        "palette": encode(palette),
        "animated": encode(palette, "GIF", save_all=True, append_images=[noise((40, 30), 2).convert("P")]),
        "exif-rotated": encode(noise((40, 30), 3), "JPEG", exif=rotated),
        "grey": encode(noise((40, 30), 4, "L"), "JPEG"),
        "transparent": encode(noise((40, 30), 5).convert("RGBA")),
    }
    for name, data in odd.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    (tmp_path / "plain.jpg").write_bytes(noise_jpeg(9))
    report = check_folder(str(tmp_path))
    assert report.faults == []
    for trait in odd:
        assert f"{trait}.png" in report.traits[trait]
    assert not any("plain.jpg" in names for names in report.traits.values())


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("truncated", encode(noise((200, 200)))[:-2000]),
        ("truncated", encode(noise((200, 200)), "WEBP", quality=90)[:-500]),
        ("truncated", encode(noise((200, 200)), "BMP")[:-500]),
        ("truncated", encode(noise((200, 200)), "JPEG", quality=95)[:-3000]),
        ("corrupt", b"<html>not found</html>"),
        ("corrupt", b"\xff\xd8\xff\xd9"),
        ("huge", encode(Image.new("L", (20_000, 100)))),
    ],
)
def test_each_format_is_judged_by_its_own_end(kind, data):
    assert inspect_bytes("x", data).fault == kind


def test_rows_and_members_named_twice_and_refused_names(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.jpg": noise_jpeg(0), "../b.jpg": noise_jpeg(1), "c.jpg": noise_jpeg(2)})
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        member = tarfile.TarInfo("./a.jpg")
        member.size = len(noise_jpeg(3))
        archive.addfile(member, io.BytesIO(noise_jpeg(3)))
    (tmp_path / "x.csv").write_text(
        "image,caption\na.jpg,one\na.jpg,two\n./a.jpg,one\nc.jpg,three\n../b.jpg,four\n/etc/passwd.jpg,five\n,six\n"
    )
    report = check_table(str(tmp_path / "x.csv"), str(tmp_path / "x.tar"))
    assert [(fault.kind, fault.name) for fault in report.faults] == [
        ("duplicate", "a.jpg"),
        ("duplicate", "a.jpg"),
        ("missing", "/etc/passwd.jpg"),
        ("missing", "x.csv, line 8"),
        ("refused", "../b.jpg"),
    ]


def test_a_source_is_checked_through_its_own_reader(tmp_path):
    paths = write_coco(tmp_path, coco_json(3))
    pictures = {"train2017/000000000001.jpg": noise_jpeg(1), "train2017/000000000038.jpg": b""}
    (tmp_path / "train2017.zip").write_bytes(zipped(pictures))
    report = check("coco", root=tmp_path, captions=paths["captions"], images=str(tmp_path / "train2017.zip"))
    assert {(fault.kind, fault.name) for fault in report.faults} == {
        ("missing", "000000000075.jpg"),
        ("zero-byte", "000000000038.jpg"),
    }
    assert (report.pictures, report.captions) == (2, 10)


def test_a_fetched_source_needs_no_paths(tmp_path):
    write_coco(tmp_path / "coco", coco_json(3))
    report = check("coco", root=tmp_path)
    assert report.faults == []
    assert report.pictures == 3


def test_generated_pictures_are_checked_by_decoding(tmp_path):
    import torch

    from wlsup.data.inspection import DecodedReader
    from wlsup.data.sources import MemoryPictures

    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    images[1] += 1
    facts = list(inspect_all(DecodedReader(MemoryPictures(images), ["a", "b", "c"])))
    assert [fact.fault for fact in facts] == [""] * 3
    assert facts[0].digest == facts[2].digest != facts[1].digest


class Deadly:
    """Files of which one kills the process that opens it, as a decoder's bug would."""

    def read(self, index):
        if index == 41:
            os._exit(1)
        return noise_jpeg(index)

    def problem(self, index):
        return None


def test_a_picture_that_kills_its_process_is_named_and_the_others_are_checked():
    reader = FileReader(Deadly(), [f"{i}.jpg" for i in range(100)])
    facts = {fact.name: fact for fact in inspect_all(reader, workers=2)}
    assert len(facts) == 100
    assert [name for name, fact in facts.items() if fact.fault] == ["41.jpg"]
    assert facts["41.jpg"] == PictureFacts("41.jpg", "corrupt", "crashes the decoder")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("tabel", {}, "Did you mean 'table'?"),
        ("table", {}, "needs --captions"),
        ("folder", {}, "needs --images"),
        ("shards", {}, "needs --images DIR"),
        ("shards", {"images": "."}, "no tar shards"),
        ("table", {"captions": "/nowhere.csv"}, "nowhere.csv"),
        ("coco", {}, "wlsup data fetch coco"),
    ],
)
def test_what_cannot_be_checked_is_one_message(name, options, said, tmp_path):
    with pytest.raises(WlsupError, match=said):
        check(name, root=tmp_path, **options)


def test_a_folder_without_pictures_is_no_clean_one(tmp_path):
    with pytest.raises(WlsupError, match="no picture"):
        check_folder(str(tmp_path))


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """All published sets, tiny, unpacked where they belong, the catalogue expecting just these."""
    from dataclasses import replace

    from wlsup.data.catalog import CATALOG
    from wlsup.data.unpack import unpack

    for name, count in (("cifar10", 24), ("cifar100", 8), ("svhn", 12), ("dtd", 6)):
        entry = CATALOG[name]
        files = tuple(replace(file, md5=hashlib.md5(published()[file.name]).hexdigest()) for file in entry.files)
        monkeypatch.setitem(CATALOG, name, replace(entry, files=files, samples={"all": count}))
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file.name).write_bytes(published()[file.name])
            if file.is_archive:
                unpack(tmp_path / name / file.name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(("name", "count"), [("cifar10", 24), ("svhn", 12), ("dtd", 6)])
def test_a_fetched_eval_set_is_counted_and_judged(fetched, name, count):
    report = check(name, root=fetched)
    assert report.pictures == count
    assert [fault for fault in report.faults if fault.kind != "count" or fault.name == name] == []


def test_faults_of_eval_sets_are_found(fetched):
    path = fetched / "svhn/test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-40])
    found = {(fault.kind, fault.name) for fault in check("svhn", root=fetched).faults}
    assert ("corrupt", "test_32x32.mat") in found
    path = fetched / "cifar10/cifar-10-batches-py/data_batch_2"
    path.write_bytes(path.read_bytes()[:-40])
    assert [(fault.kind, fault.name) for fault in check("cifar10", root=fetched).faults] == [("corrupt", "cifar10")]
    (fetched / "dtd/dtd/images/banded/banded_0000.jpg").write_bytes(b"")
    (fetched / "dtd/dtd/images/dotted/dotted_0002.jpg").unlink()
    found = {(fault.kind, fault.name) for fault in check("dtd", root=fetched).faults}
    assert ("zero-byte", "train/banded/banded_0000.jpg") in found
    assert ("missing", "test/dotted/dotted_0002.jpg") in found


def test_too_few_samples_are_a_fault(fetched, monkeypatch):
    from dataclasses import replace

    from wlsup.data.catalog import CATALOG

    monkeypatch.setitem(CATALOG, "svhn", replace(CATALOG["svhn"], samples={"all": 13}))
    details = [fault.detail for fault in check("svhn", root=fetched).faults if fault.name == "svhn"]
    assert details == ["12 samples, not 13 as published"]


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_of_shards_and_of_their_samples_are_named_and_no_others(tmp_path, workers):
    folder = write_faulty_shards(tmp_path / "shards")
    report = check("shards", root=tmp_path, images=str(folder), workers=workers)
    first = cc3m_image_name("http://x/00")
    again = {("duplicate", max(first, "1/g"))}
    assert {(fault.kind, fault.name) for fault in report.faults} == again | {
        ("zero-byte", "1/a"),
        ("truncated", "1/b"),
        ("captionless", "1/c"),
        ("missing", "1.tar"),
        ("refused", "1.tar/../e.jpg"),
        ("tiny", "1/f"),
        ("overlong", "1/f"),
        ("truncated", "2.tar"),
        ("missing", "3.tar"),
        ("corrupt", "4.tar"),
        ("truncated", "5.tar"),
    }
    assert report.pictures == 4 + 4 + 5
    assert check("conceptual_captions", root=tmp_path, images=str(folder)).faults == report.faults


def test_clean_shards_are_clean_with_and_without_an_index(tmp_path):
    folder = Path(write_cc3m_shards(tmp_path / "shards")["images"])
    for _ in range(2):
        report = check("shards", root=tmp_path, images=str(folder))
        assert (report.faults, report.notes, report.pictures, report.captions) == ([], [], 30, 30)
        save_index(build_index(list(folder.glob("*.tar"))), folder)
    assert check("shards", root=tmp_path, images=str(folder / "00001.tar")).pictures == 10
    (folder / INDEX_NAME).write_bytes(b"rot")
    assert [(fault.kind, fault.name) for fault in check("shards", root=tmp_path, images=str(folder)).faults] == [
        ("corrupt", INDEX_NAME)
    ]


def test_a_byte_that_changed_in_a_shard_of_the_same_size_is_found(tmp_path):
    folder = Path(write_cc3m_shards(tmp_path / "shards")["images"])
    save_index(build_index(list(folder.glob("*.tar"))), folder)
    shard = folder / "00001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1  # of the first sample's content, behind its header
    shard.write_bytes(content)
    faults = {fault.name: fault.detail for fault in check("shards", root=tmp_path, images=str(folder)).faults}
    assert faults["00001.tar"] == "its CRC-32 is not the index's: bytes have changed"
    assert not {"00000.tar", "00002.tar"} & faults.keys()
