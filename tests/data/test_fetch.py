"""From the publisher's files to the native layout, once and for all, or one message that says what to do."""

import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from data_server import running_server
from native import zipped
from published_files import publish, published, tar_gz

from wlsup.data.catalog import CATALOG
from wlsup.data.fetch import fetch
from wlsup.data.locate import data_root, entry_status
from wlsup.data.transport import TransferPolicy
from wlsup.data.unpack import unpack
from wlsup.errors import WlsupError

POLICY = TransferPolicy(timeout=0.6, retries=2, backoff=0.01)
DOWNLOADED = [name for name, entry in CATALOG.items() if entry.files]
Disk = namedtuple("Disk", "total used free")


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server(monkeypatch):
    with running_server() as server:
        publish(server, monkeypatch)
        yield server


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", DOWNLOADED)
def test_each_set_comes_into_its_native_layout_and_is_not_fetched_twice(name, server, tmp_path):
    report = fetch(CATALOG[name], tmp_path, policy=POLICY)
    assert sorted(report.downloaded) == sorted(file.name for file in CATALOG[name].files)
    assert entry_status(CATALOG[name], tmp_path).state == "complete"
    expected = []
    for file in CATALOG[name].files:
        if file.name.endswith(".zip"):
            expected += zipfile.ZipFile(io.BytesIO(published()[file.name])).namelist()
        elif file.name.endswith((".gz", ".tar")):
            with tarfile.open(fileobj=io.BytesIO(published()[file.name])) as archive:
                expected += archive.getnames()
        else:
            expected.append(file.name)
    assert tree(tmp_path / name) == sorted(expected)
    server.requests.clear()
    assert fetch(CATALOG[name], tmp_path, policy=POLICY).downloaded == []
    assert server.requests == []


def test_a_part_that_is_there_is_not_fetched_again(server, tmp_path):
    (tmp_path / "coco/train2017").mkdir(parents=True)
    assert entry_status(CATALOG["coco"], tmp_path).state == "partial"
    report = fetch(CATALOG["coco"], tmp_path, policy=POLICY)
    assert report.found == ["train2017.zip"]
    assert sorted(report.downloaded) == ["annotations_trainval2017.zip", "val2017.zip"]


def test_an_archive_copied_by_hand_is_verified_and_used(server, tmp_path, caplog):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    (folder / "cifar-10-python.tar.gz").write_bytes(published()["cifar-10-python.tar.gz"])
    report = fetch(CATALOG["cifar10"], tmp_path, policy=POLICY)
    assert report.found == ["cifar-10-python.tar.gz"]
    assert server.requests == []
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "cifar-10-python.tar.gz").write_bytes(b"<html>not found</html>")
    with caplog.at_level(logging.WARNING, "wlsup.data"):
        report = fetch(CATALOG["cifar10"], tmp_path, policy=POLICY)
    assert report.downloaded == ["cifar-10-python.tar.gz"]
    assert (folder / "cifar-10-python.tar.gz.wrong").read_bytes() == b"<html>not found</html>"


def test_a_mirror_serves_the_same_files(server, tmp_path):
    for name, content in published().items():
        server.serve(f"/mirror/{name}", content)
        del server.files[f"/official/{name}"]
    fetch(CATALOG["dtd"], tmp_path, policy=POLICY, mirror=f"{server.url}/mirror/", keep_archives=True)
    assert (tmp_path / "dtd/dtd-r1.0.1.tar.gz").is_file()


def test_wrong_bytes_are_an_error_that_leaves_nothing_unpacked(server, tmp_path):
    server.files["/official/EuroSAT.zip"] = zipped({"2750/AnnualCrop/x.jpg": b"changed"})
    with pytest.raises(WlsupError, match="not EuroSAT.zip"):
        fetch(CATALOG["eurosat"], tmp_path, policy=POLICY)
    assert tree(tmp_path / "eurosat") == ["EuroSAT.zip.wrong"]


def test_no_network_ends_in_one_message_that_says_what_to_copy_where(server, tmp_path, monkeypatch):
    with running_server() as gone:
        address = gone.url
    entry = CATALOG["cifar10"]
    monkeypatch.setitem(
        CATALOG, "cifar10", replace(entry, files=(replace(entry.files[0], url=f"{address}/cifar-10-python.tar.gz"),))
    )
    with pytest.raises(WlsupError) as caught:
        fetch(CATALOG["cifar10"], tmp_path, policy=POLICY)
    message = str(caught.value)
    assert address in message
    assert str(tmp_path / "cifar10/cifar-10-python.tar.gz") in message
    assert entry.files[0].md5 in message
    assert "\n" not in message


@pytest.mark.parametrize(("name", "said"), [("imagenet", "image-net.org"), ("cc3m", "--tsv")])
def test_what_cannot_be_fetched_says_how_to_get_it(name, said, tmp_path):
    with pytest.raises(WlsupError, match=said) as caught:
        fetch(CATALOG[name], tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_a_set_that_would_not_fit_is_refused_before_the_first_byte(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9 - 1000, 1000))
    with pytest.raises(WlsupError, match="1.0 kB free"):
        fetch(CATALOG["svhn"], tmp_path, policy=POLICY)
    assert server.requests == []
    assert not (tmp_path / "svhn").exists()


def test_a_file_larger_than_the_catalogue_says_is_refused_before_its_bytes(server, tmp_path, monkeypatch):
    entry = CATALOG["imagenet_captions"]
    monkeypatch.setitem(CATALOG, entry.name, replace(entry, files=(replace(entry.files[0], size=None, unpacked=0),)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9 - 1000, 100))
    with pytest.raises(WlsupError, match="100 B free"):
        fetch(CATALOG[entry.name], tmp_path, policy=POLICY)
    assert [headers["Range"] for headers in server.asked("/official/imagenet_captions.zip")] == ["bytes=0-0"]


_PROGRAM = """
import hashlib, sys
from pathlib import Path
from wlsup.data import download
from wlsup.data.catalog import RemoteFile
download._SAVE_EVERY = 0.1
download.Download(RemoteFile(sys.argv[1], md5=sys.argv[2]), Path(sys.argv[3]), connections=1).run()
"""


def test_a_download_killed_with_signal_9_goes_on(server, tmp_path):
    body = os.urandom(400_000)
    url = server.serve("/big", body, "", "slow:0.25")
    target = tmp_path / "big"
    md5 = hashlib.md5(body).hexdigest()
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, url, md5, target])
    try:
        deadline = time.monotonic() + 15
        state = tmp_path / "big.part.json"
        while time.monotonic() < deadline and not (state.exists() and json.loads(state.read_text())["pieces"][0][2]):
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    server.requests.clear()
    server.serve("/big", body)
    subprocess.run([sys.executable, "-c", _PROGRAM, url, md5, target], check=True, timeout=20)
    assert target.read_bytes() == body
    first = int(server.asked("/big")[0]["Range"].removeprefix("bytes=").split("-")[0])
    assert first > 0


def test_the_root_is_the_option_then_the_environment_then_data(monkeypatch, tmp_path):
    monkeypatch.delenv("WLSUP_DATA", raising=False)
    assert str(data_root()) == "data"
    monkeypatch.setenv("WLSUP_DATA", str(tmp_path))
    assert data_root() == tmp_path
    assert str(data_root("here")) == "here"


def test_the_checksums_are_torchvisions():
    datasets = Path(importlib.util.find_spec("torchvision").origin).parent / "datasets"
    for name, file in (
        ("cifar10", "cifar"),
        ("cifar100", "cifar"),
        ("svhn", "svhn"),
        ("eurosat", "eurosat"),
        ("dtd", "dtd"),
    ):
        text = (datasets / f"{file}.py").read_text()
        for remote in CATALOG[name].files:
            assert remote.md5 in text
            assert remote.url in text or remote.name == "EuroSAT.zip"


def hostile_tar(path, name="a/b.txt", **attributes):
    with tarfile.open(path, "w") as archive:
        good = tarfile.TarInfo("good/a.txt")
        good.size = 2
        archive.addfile(good, io.BytesIO(b"ok"))
        member = tarfile.TarInfo(name)
        for key, value in attributes.items():
            setattr(member, key, value)
        archive.addfile(member, io.BytesIO(b"bad"[: member.size]))
    return path


def files_of(folder):
    return tree(folder) if folder.exists() else []


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "..", "a\\..\\..\\x", "C:/x"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_name_that_leads_out_refuses_the_archive_and_leaves_nothing(name, kind, tmp_path):
    archive = tmp_path / f"x.{kind}"
    if kind == "tar":
        hostile_tar(archive, name, size=3)
    else:
        archive.write_bytes(zipped({"good/a.txt": b"ok", name: b"bad"}))
    with pytest.raises(WlsupError, match="outside the folder"):
        unpack(archive, tmp_path / "out")
    assert files_of(tmp_path / "out") == []
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_left_out_and_named(kind, tmp_path):
    archive = hostile_tar(tmp_path / "x.tar", "evil", type=kind, linkname="/etc/passwd")
    assert unpack(archive, tmp_path / "out") == ["evil: a link or device, not a file"]
    assert files_of(tmp_path / "out") == ["good/a.txt"]


def test_a_link_in_a_zip_is_left_out(tmp_path):
    info = zipfile.ZipInfo("evil")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
        archive.writestr("good/a.txt", "ok")
    assert len(unpack(tmp_path / "x.zip", tmp_path / "out")) == 1
    assert files_of(tmp_path / "out") == ["good/a.txt"]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_bomb_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("wlsup.data.unpack._ALWAYS_ALLOWED", 1 << 20)
    content = {f"{i}.txt": bytes(3 << 20) for i in range(3)}
    archive = tmp_path / f"x.{kind}"
    archive.write_bytes(zipped(content) if kind == "zip" else tar_gz(content))
    with pytest.raises(WlsupError, match="would unpack to more than"):
        unpack(archive, tmp_path / "out")
    assert files_of(tmp_path / "out") == []


def test_a_cut_or_encrypted_archive_is_refused_whole(tmp_path):
    content = {f"a/{i}.bin": os.urandom(5000) for i in range(5)}
    for name, data in (("x.zip", zipped(content)), ("x.tar.gz", tar_gz(content))):
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(WlsupError, match=name):
            unpack(tmp_path / name, tmp_path / "out")
        assert files_of(tmp_path / "out") == []
    secret = bytearray(zipped({"a.txt": b"x"}))
    secret[6] |= 1
    secret[secret.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "y.zip").write_bytes(secret)
    with pytest.raises(WlsupError, match="refused"):
        unpack(tmp_path / "y.zip", tmp_path / "out")


def test_unpacking_beside_what_is_there_keeps_it(tmp_path):
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/old.txt").write_text("old")
    (tmp_path / "x.zip").write_bytes(zipped({"a/new.txt": b"new", "b/c.txt": b"c"}))
    unpack(tmp_path / "x.zip", tmp_path / "out")
    assert files_of(tmp_path / "out") == ["a/new.txt", "a/old.txt", "b/c.txt"]
