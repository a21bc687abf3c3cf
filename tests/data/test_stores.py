from __future__ import annotations

import io
import multiprocessing
import pickle
import tarfile

import pytest
from data_makers import noise_jpeg, write_tar

from wlsup.data.images import UnreadableImage
from wlsup.data.stores import JoinedStore, TarStore, open_store
from wlsup.errors import WlsupError

FILES = {f"part/{i}.jpg": noise_jpeg(i) for i in range(5)}


def test_a_tar_is_read_by_name_without_extraction(tmp_path):
    store = open_store(write_tar(tmp_path / "x.tar", {**FILES, "readme.txt": b"hello"}))
    assert store.names() == sorted(FILES)
    assert all(store.read(name) == content for name, content in FILES.items())
    assert store.exists("./part/0.jpg") and not store.exists("0.jpg")
    assert store.read("readme.txt") == b"hello"
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    with pytest.raises(UnreadableImage, match="not in"):
        store.read("part/9.jpg")


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names_are_found(tmp_path, kind):
    names = ["d/" * 80 + "long.jpg", "größe/猫.jpg"]
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    store = TarStore(tmp_path / "x.tar")
    assert store.names() == sorted(names)
    assert all(store.read(name) == b"abc" for name in names)


def test_hostile_members_are_refused_and_named(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("/etc/absolute.jpg", "../up.jpg", "a/../../up2.jpg", "good.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
        for name, kind in (
            ("soft.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    store = TarStore(path)
    assert store.names() == ["good.jpg"]
    assert set(store.refused) == {"/etc/absolute.jpg", "../up.jpg", "../up2.jpg", "soft.jpg", "hard.jpg", "pipe.jpg"}
    for name in store.refused:
        with pytest.raises(UnreadableImage, match="refused"):
            store.read(name)
    assert "link" in store.problem("soft.jpg")


def test_a_tar_cut_anywhere_is_noticed(tmp_path):
    whole = write_tar(tmp_path / "x.tar", FILES).read_bytes()
    last = len(whole.rstrip(b"\0"))
    boundary = 512 + (len(FILES["part/0.jpg"]) + 511) // 512 * 512  # exactly between two members
    for cut in (0, 1, 100, 511, 512, 513, boundary, boundary + 300, len(whole) // 2, last - 1, last):
        broken = tmp_path / "broken.tar"
        broken.write_bytes(whole[:cut])
        with pytest.raises(WlsupError, match=r"truncated or damaged after \d+ files .* again"):
            TarStore(broken)
    smashed = bytearray(whole)
    smashed[boundary : boundary + 512] = b"x" * 512  # the second header
    broken.write_bytes(smashed)
    with pytest.raises(WlsupError, match=r"after 1 files \(a header is corrupt\)"):
        TarStore(broken)


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(WlsupError, match="damaged"):
        open_store(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    with pytest.raises(WlsupError, match="gunzip x.tar.gz"):
        open_store(tmp_path / "x.tar.gz")
    with pytest.raises(WlsupError, match=r"images: no such file or folder: .*absent"):
        open_store(tmp_path / "absent")
    (tmp_path / "x.7z").write_bytes(b"7z")
    with pytest.raises(WlsupError, match="neither a folder nor a .tar"):
        open_store(tmp_path / "x.7z")


def _read_all(store, barrier, results):
    barrier.wait(30)
    results.put(all(store.read(name) == content for _ in range(5000) for name, content in FILES.items()))


@pytest.mark.multiprocess
def test_forked_readers_of_one_open_tar_do_not_disturb_each_other(tmp_path):
    store = open_store(write_tar(tmp_path / "x.tar", FILES))
    store.read("part/0.jpg")  # the file is open before the fork
    context = multiprocessing.get_context("fork")
    results, barrier = context.Queue(), context.Barrier(3)
    workers = [context.Process(target=_read_all, args=(store, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    _read_all(store, barrier, results)
    assert all(results.get(timeout=60) for _ in range(3))
    for worker in workers:
        worker.join()


def test_a_pickled_store_opens_its_own_file(tmp_path):
    store = open_store(write_tar(tmp_path / "x.tar", FILES))
    store.read("part/0.jpg")
    copy = pickle.loads(pickle.dumps(store))
    del store
    assert copy.read("part/1.jpg") == FILES["part/1.jpg"]


def test_a_tar_that_shrinks_under_a_run_gives_unreadable_pictures(tmp_path):
    path = write_tar(tmp_path / "x.tar", FILES)
    store = open_store(path)
    with open(path, "r+b") as file:
        file.truncate(700)
    with pytest.raises(UnreadableImage, match="become shorter"):
        store.read("part/4.jpg")


def test_names_may_not_lead_out_of_a_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "images" / "a.jpg").write_bytes(b"a")
    store = open_store(tmp_path / "images")
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "x/../../secret.jpg", "..\\secret.jpg"):
        assert "leads out of" in store.problem(name)
        with pytest.raises(UnreadableImage, match="leads out of"):
            store.read(name)
    assert store.read(str(tmp_path / "images" / "a.jpg")) == b"a"
    with pytest.raises(UnreadableImage, match="No such file"):
        store.read("b.jpg")


def test_several_stores_are_joined_under_distinct_names(tmp_path):
    stores = [open_store(write_tar(tmp_path / f"{i}.tar", {"0.jpg": bytes([i])})) for i in range(2)]
    joined = JoinedStore(stores)
    assert joined.names() == ["0.tar/0.jpg", "1.tar/0.jpg"]
    assert [joined.read(name) for name in joined.names()] == [b"\0", b"\1"]
    assert not joined.exists("2.tar/0.jpg") and joined.exists("1.tar/0.jpg")
    with pytest.raises(WlsupError, match="same name"):
        JoinedStore([stores[0], stores[0]])


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_larger_than_any_picture_is_refused_and_named(tmp_path, monkeypatch, packed):
    monkeypatch.setattr("wlsup.data.stores.MAX_BYTES", 1000)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "small.jpg").write_bytes(bytes(1000))
    (folder / "large.jpg").write_bytes(bytes(1001))
    if packed:
        with tarfile.open(tmp_path / "some.tar", "w") as tar:
            tar.add(folder, arcname=".")
    store = open_store(tmp_path / "some.tar" if packed else folder)
    assert len(store.read("small.jpg")) == 1000
    with pytest.raises(UnreadableImage, match="more than 1,000"):
        store.read("large.jpg")
