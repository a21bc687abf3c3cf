"""A check names every planted fault and nothing else, the same with and without processes."""

import hashlib
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_makers import encode, noise_jpeg, write_tar
from PIL import Image
from published_files import coco_captions, published, zipped

from wlsup.data.check import check, check_folder, check_table
from wlsup.data.check_report import FAULTS
from wlsup.data.inspection import FileReader, PictureFacts, inspect_all, inspect_bytes
from wlsup.errors import WlsupError


def noise(size, seed=0, mode="RGB"):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def broken(data):
    """Bytes with the header and the end in place and rubbish between."""
    return data[:200] + b"\xff\xc4\x00\x03\x99" * 40 + data[-2:]


def bomb():
    """A PNG of 144 megapixels by its header."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1501 * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture
def planted(tmp_path):
    """A folder with twenty good pictures and ten kinds of faults; return the paths and the faults."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = [(f"good{i:02d}.jpg", f"a good picture number {i}") for i in range(20)]
    files = {name: noise_jpeg(i) for i, (name, _) in enumerate(rows)}
    long_jpeg = encode(noise((300, 300), 50), "JPEG", quality=95)
    files["corrupt.jpg"] = broken(long_jpeg)
    files["truncated.jpg"] = long_jpeg[: len(long_jpeg) * 2 // 3]
    files["zero.jpg"] = b""
    files["tiny.png"] = encode(noise((1, 1)))
    files["huge.png"] = bomb()
    files["copy.jpg"] = files["good03.jpg"]
    rows += [(name, f"caption of {name}") for name in files if not name.startswith("good")]
    rows += [("gone.jpg", "it is not there"), ("speechless.jpg", "  "), ("wordy.jpg", "word " * 10_000)]
    files["speechless.jpg"], files["wordy.jpg"], files["latin.jpg"] = noise_jpeg(60), noise_jpeg(61), noise_jpeg(62)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    table = "image,caption\n" + "".join(f"{name},{caption}\n" for name, caption in rows)
    (tmp_path / "captions.csv").write_bytes(table.encode() + b"latin.jpg,caf\xe9 au lait\n")
    expected = {
        ("corrupt", "corrupt.jpg"),
        ("truncated", "truncated.jpg"),
        ("zero-byte", "zero.jpg"),
        ("tiny", "tiny.png"),
        ("huge", "huge.png"),
        ("duplicate", "good03.jpg"),
        ("missing", "gone.jpg"),
        ("captionless", "speechless.jpg"),
        ("overlong", "wordy.jpg"),
        ("not-utf-8", "latin.jpg"),
    }
    return str(tmp_path / "captions.csv"), str(folder), expected


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_kinds_of_planted_faults_are_named_and_no_others(planted, workers):
    captions, images, expected = planted
    report = check_table(captions, images, workers=workers)
    assert {(fault.kind, fault.name) for fault in report.faults} == expected
    assert len(report.faults) == len(expected) == 10
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
    import tarfile

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
    (tmp_path / "captions.json").write_bytes(coco_captions("train", 1))
    pictures = {f"train2017/{i:012d}.jpg": noise_jpeg(i) for i in (1, 2)}
    pictures["train2017/000000000002.jpg"] = b""
    (tmp_path / "train2017.zip").write_bytes(zipped(pictures))
    report = check(
        "coco", root=tmp_path, captions=str(tmp_path / "captions.json"), images=str(tmp_path / "train2017.zip")
    )
    assert {(fault.kind, fault.name) for fault in report.faults} == {
        ("missing", "000000000003.jpg"),
        ("zero-byte", "000000000002.jpg"),
    }
    assert (report.pictures, report.captions) == (2, 10)


def test_a_fetched_source_needs_no_paths(tmp_path):
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/annotations/captions_train2017.json").write_bytes(coco_captions("train", 1))
    (tmp_path / "coco/train2017").mkdir()
    for i in (1, 2, 3):
        (tmp_path / f"coco/train2017/{i:012d}.jpg").write_bytes(noise_jpeg(i))
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
    (fetched / "dtd/dtd/images/banded/banded_0001.jpg").write_bytes(b"")
    (fetched / "dtd/dtd/images/woven/woven_0003.jpg").unlink()
    found = {(fault.kind, fault.name) for fault in check("dtd", root=fetched).faults}
    assert ("zero-byte", "train/banded/banded_0001.jpg") in found
    assert ("missing", "test/woven/woven_0003.jpg") in found


def test_too_few_samples_are_a_fault(fetched, monkeypatch):
    from dataclasses import replace

    from wlsup.data.catalog import CATALOG

    monkeypatch.setitem(CATALOG, "svhn", replace(CATALOG["svhn"], samples={"all": 13}))
    details = [fault.detail for fault in check("svhn", root=fetched).faults if fault.name == "svhn"]
    assert details == ["12 samples, not 13 as published"]
