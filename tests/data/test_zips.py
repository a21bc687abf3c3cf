from __future__ import annotations

import pickle
import zipfile

import pytest
from data_makers import noise_jpeg
from native import write_zip

from wlsup.data.images import UnreadableImage
from wlsup.data.stores import open_store
from wlsup.errors import WlsupError

FILES = {f"part/{i}.jpg": noise_jpeg(i) for i in range(5)}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_by_name_without_extraction(tmp_path, method):
    store = open_store(write_zip(tmp_path / "x.zip", {**FILES, "größe/猫.jpg": b"abc", "readme.txt": b"hello"}, method))
    assert store.names() == sorted([*FILES, "größe/猫.jpg"])
    assert all(store.read(name) == content for name, content in FILES.items())
    assert store.exists("./part/0.jpg") and not store.exists("0.jpg") and store.read("readme.txt") == b"hello"
    copy = pickle.loads(pickle.dumps(store))
    del store
    assert copy.read("part/1.jpg") == FILES["part/1.jpg"] and [p.name for p in tmp_path.iterdir()] == ["x.zip"]
    with pytest.raises(UnreadableImage, match="not in"):
        copy.read("part/9.jpg")


def test_hostile_members_of_a_zip_are_refused_and_named(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("/etc/absolute.jpg", "../up.jpg", "a/../../up2.jpg", "good.jpg"):
            archive.writestr(name, b"x")
        link = zipfile.ZipInfo("soft.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("rare.jpg", b"x", zipfile.ZIP_BZIP2)
    store = open_store(path)
    assert store.names() == ["good.jpg"]
    assert set(store.refused) == {"/etc/absolute.jpg", "../up.jpg", "../up2.jpg", "soft.jpg", "rare.jpg"}
    for name in store.refused:
        with pytest.raises(UnreadableImage, match="refused"):
            store.read(name)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a.jpg": b"\0" * 3_000_000}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (100).to_bytes(4, "little")  # the directory says 100 bytes
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match="101 of 100 bytes"):
        open_store(path).read("a.jpg")
    data[entry + 24 : entry + 28] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match="more than"):
        open_store(path).read("a.jpg")


def test_a_cut_zip_is_refused_and_a_flipped_byte_found(tmp_path):
    path = write_zip(tmp_path / "x.zip", FILES)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.zip").write_bytes(whole[:cut])
        with pytest.raises(WlsupError, match="cut.zip is no zip, or is truncated or damaged"):
            open_store(tmp_path / "cut.zip")
    data = bytearray(whole)
    data[whole.index(FILES["part/2.jpg"]) + 20] ^= 1
    path.write_bytes(data)
    store = open_store(path)
    assert store.read("part/1.jpg") == FILES["part/1.jpg"]
    with pytest.raises(UnreadableImage, match="wrong checksum"):
        store.read("part/2.jpg")
