"""Shards hold every pair of the source, byte for byte, and appear whole or not at all."""

import json

import pytest
import torch
from data_makers import encode, noise_jpeg, write_tar
from PIL import Image

from wlsup.data import prepare as module
from wlsup.data.ledger import link_name
from wlsup.data.prepare import prepare
from wlsup.data.shard_index import load_index
from wlsup.data.sources import CaptionSource, MemoryPictures, SourceRequest, load_source
from wlsup.errors import WlsupError


def pairs_of(name, **paths):
    source = load_source(name, SourceRequest(**paths))
    return {
        key: (list(captions), source.pictures.read(index).tolist())
        for index, (key, captions) in enumerate(zip(source.keys, source.captions, strict=True))
    }


def test_every_pair_is_in_the_shards(make_set, tmp_path):
    files = make_set(number=11, captions=2)
    report = prepare("table", tmp_path / "shards", root=tmp_path, shard_size=4, **files)
    assert (report["samples"], report["shards"], report["skipped"]) == (11, 3, {})
    assert load_index(tmp_path / "shards").counts.tolist() == [4, 4, 3]
    assert pairs_of("shards", images=str(tmp_path / "shards")) == pairs_of("table", **files)


def test_what_cannot_be_read_is_left_out_and_named(make_set, tmp_path):
    files = make_set(number=6, bad={2: b"", 4: None})
    report = prepare("table", tmp_path / "shards", root=tmp_path, **files)
    assert report["skipped"]["002.jpg"] == "zero bytes"
    assert "not in" in report["skipped"]["004.jpg"]
    assert report["samples"] == 4


def test_a_second_run_does_nothing_and_another_source_is_refused(make_set, tmp_path):
    files = make_set(number=5)
    first = prepare("table", tmp_path / "shards", root=tmp_path, **files)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    second = prepare("table", tmp_path / "shards", root=tmp_path, **files)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == before
    assert (first.pop("new"), second.pop("new")) == (True, False)
    assert first == second
    other = make_set(number=4, name="other")
    with pytest.raises(WlsupError, match="holds something else"):
        prepare("table", tmp_path / "shards", root=tmp_path, **other)
    with open(tmp_path / "shards/00000.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(WlsupError, match="cut short"):
        prepare("table", tmp_path / "shards", root=tmp_path, **files)


def test_a_run_that_ends_early_leaves_nothing_and_a_killed_one_is_begun_again(make_set, tmp_path, monkeypatch):
    files = make_set(number=6)
    monkeypatch.setattr(module, "write_json", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare("table", tmp_path / "shards", root=tmp_path, **files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs"]
    monkeypatch.undo()
    (tmp_path / ".shards.preparing").mkdir()
    write_tar(tmp_path / ".shards.preparing/00000.tar", {"x": b"half"})
    assert prepare("table", tmp_path / "shards", root=tmp_path, **files)["samples"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs", "shards"]


def test_cc3m_goes_from_its_folder_to_shards_with_the_same_keys(tmp_path):
    urls = [f"http://a.b/{i}.jpg" for i in range(5)]
    (tmp_path / "cc3m").mkdir()
    (tmp_path / "cc3m/x.tsv").write_text("".join(f"caption {i}\t{url}\n" for i, url in enumerate(urls)))
    for i, url in enumerate(urls[:4]):
        path = tmp_path / "cc3m/images" / link_name(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise_jpeg(i) if i else encode(Image.new("RGB", (40, 40))))
    report = prepare("cc3m", tmp_path / "shards", root=tmp_path)
    assert report["samples"] == 4
    expected = pairs_of(
        "conceptual_captions", captions=str(tmp_path / "cc3m/x.tsv"), images=str(tmp_path / "cc3m/images")
    )
    assert pairs_of("conceptual_captions", images=str(tmp_path / "shards")) == expected


def test_existing_shards_get_their_index(tmp_path):
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        files = {}
        for i in range(3):
            files[f"{i:05d}.jpg"] = noise_jpeg(10 * shard + i)
            files[f"{i:05d}.json"] = json.dumps({"caption": f"{shard} {i}", "url": f"http://a.b/{shard}{i}"}).encode()
        write_tar(tmp_path / f"shards/{shard:05d}.tar", files)
    report = prepare("shards", None, root=tmp_path, images=str(tmp_path / "shards"))
    assert (report["samples"], report["shards"]) == (6, 2)
    assert load_index(tmp_path / "shards").counts.tolist() == [3, 3]


def test_pictures_without_files_are_written_without_loss(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (3, 3, 20, 30), dtype=torch.uint8)
    source = CaptionSource("mini", ["a", "b", "c"], [["one"], ["two", "zwei"], ["three"]], MemoryPictures(images))
    monkeypatch.setattr(module, "load_source", lambda *arguments: source)
    prepare("mini", tmp_path / "shards", root=tmp_path)
    expected = {
        key: (captions, image.tolist())
        for key, captions, image in zip(source.keys, source.captions, images, strict=True)
    }
    assert pairs_of("shards", images=str(tmp_path / "shards")) == expected


@pytest.mark.parametrize("name", ["table", "coco", "shards", "tabel"])
def test_what_cannot_be_prepared_is_one_message(name, tmp_path):
    with pytest.raises(WlsupError):
        prepare(name, tmp_path / "shards", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_noticed_first(make_set, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    files = make_set(number=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("D", "total used free")(1, 0, 1))
    with pytest.raises(WlsupError, match="free"):
        prepare("table", tmp_path / "shards", root=tmp_path, **files)
    assert not (tmp_path / "shards").exists()
