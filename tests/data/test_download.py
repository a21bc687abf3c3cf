"""A file comes whole and verified, whatever the server does, and goes on where it was interrupted."""

import hashlib
import json
import threading
import time

import numpy as np
import pytest
from data_server import running_server

from wlsup.data import download
from wlsup.data.catalog import RemoteFile
from wlsup.data.download import Download, WrongBytes
from wlsup.data.transport import Stopped, TransferError, TransferPolicy, clean_url, open_url
from wlsup.errors import WlsupError

POLICY = TransferPolicy(timeout=0.6, retries=3, backoff=0.01)
BODY = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    with running_server() as server:
        yield server


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(download, "PIECE", 20_000)


def remote(url, body=BODY):
    return RemoteFile(url, len(body), hashlib.md5(body).hexdigest())


def get(tmp_path, file, **options):
    return Download(file, tmp_path / "x.bin", policy=options.pop("policy", POLICY), **options).run().read_bytes()


def leftovers(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_a_file_comes_in_parallel_pieces(tmp_path, server, small_pieces):
    server.delay = 0.03
    url = server.serve("/x.bin", BODY)
    assert get(tmp_path, remote(url), connections=4) == BODY
    # a finished request may still be winding down in the server while its successor starts: up to twice as many
    assert 2 <= server.busiest <= 8
    ranges = {headers["Range"] for headers in server.asked("/x.bin")}
    assert len(ranges) > 5
    assert leftovers(tmp_path) == ["x.bin"]


@pytest.mark.parametrize(
    "behaviours",
    [
        ["drop", "drop", "drop:1000", ""],
        ["ignore-range"],
        ["ignore-range", "ignore-range", "drop"],
        ["", "drop", "drop:50000", ""],
        ["", "stall", ""],
        ["status:503", "", "status:500", "status:429:0", ""],
        ["", "lie-long", ""],
        ["no-length"],
        ["", "shifted", ""],
    ],
    ids=lambda behaviours: ",".join(behaviours),
)
def test_a_server_that_misbehaves_for_a_while_costs_nothing_but_time(tmp_path, server, behaviours):
    url = server.serve("/x.bin", BODY, *behaviours)
    assert get(tmp_path, remote(url), connections=1) == BODY
    assert leftovers(tmp_path) == ["x.bin"]


def test_a_drop_is_resumed_and_not_begun_again(tmp_path, server):
    url = server.serve("/x.bin", BODY, "", "drop:200000", "")
    assert get(tmp_path, remote(url), connections=1) == BODY
    last = server.asked("/x.bin")[-1]
    assert last["Range"] == f"bytes=200000-{len(BODY) - 1}"
    assert last["If-Range"] == '"' + hashlib.md5(BODY).hexdigest() + '"'


def test_an_interrupted_download_goes_on_in_the_next_run(tmp_path, server):
    url = server.serve("/x.bin", BODY, "", "drop:200000", "status:404")
    with pytest.raises(TransferError, match="404"):
        get(tmp_path, remote(url), connections=1)
    assert leftovers(tmp_path) == ["x.bin.part", "x.bin.part.json"]
    server.requests.clear()
    server.serve("/x.bin", BODY)
    assert get(tmp_path, remote(url), connections=1) == BODY
    assert [headers["Range"] for headers in server.asked("/x.bin")] == [f"bytes=200000-{len(BODY) - 1}"]


def test_a_file_that_changed_on_the_server_is_not_mixed_with_the_old_one(tmp_path, server):
    url = server.serve("/x.bin", BODY, "", "drop:200000", "status:404")
    with pytest.raises(TransferError):
        get(tmp_path, RemoteFile(url), connections=1)
    other = BODY[::-1]
    server.serve("/x.bin", other)
    assert get(tmp_path, RemoteFile(url), connections=1) == other


def test_pieces_of_unknown_version_are_not_trusted_without_a_checksum(tmp_path, server):
    server.tags = False
    url = server.serve("/x.bin", BODY, "", "drop:200000", "status:404")
    with pytest.raises(TransferError):
        get(tmp_path, RemoteFile(url), connections=1)
    other = BODY[::-1]
    server.serve("/x.bin", other)
    assert get(tmp_path, RemoteFile(url), connections=1) == other


def test_a_mixture_is_noticed_by_the_checksum_and_downloaded_again(tmp_path, server):
    server.tags = False
    url = server.serve("/x.bin", BODY[::-1], "", "drop:200000", "status:404")
    with pytest.raises(TransferError):
        get(tmp_path, remote(url), connections=1)
    server.serve("/x.bin", BODY)
    assert get(tmp_path, remote(url), connections=1) == BODY


@pytest.mark.parametrize("behaviour", ["wrong", "lie-short"])
def test_wrong_bytes_never_get_the_name_and_are_reported(tmp_path, server, behaviour):
    url = server.serve("/x.bin", BODY, "ignore-range" if behaviour == "wrong" else behaviour)
    if behaviour == "wrong":
        server.files["/x.bin"] = bytes(len(BODY))
    else:
        server.behaviours["/x.bin"] = ["lie-short"]
        server.files["/x.bin"] = BODY
    with pytest.raises((WrongBytes, TransferError)):
        get(tmp_path, remote(url), connections=1)
    assert "x.bin" not in leftovers(tmp_path)
    if behaviour == "wrong":
        assert leftovers(tmp_path) == ["x.bin.wrong"]


@pytest.mark.parametrize(
    ("behaviours", "kind", "said"),
    [
        (["status:404"], "http", "404"),
        (["status:503"], "http", "503"),
        (["redirect:/x.bin"], "redirects", "redirects"),
        (["redirect:file:///etc/passwd"], "redirects", "not followed"),
        (["stall-head"], "timeout", "nothing received"),
        (["status:429:9999"], "http", "asks to wait 9999 s"),
        (["lie-long"], "broken", "cut off"),
    ],
)
def test_what_does_not_get_better_ends_in_a_reason(tmp_path, server, behaviours, kind, said):
    url = server.serve("/x.bin", BODY, *behaviours)
    policy = TransferPolicy(timeout=0.2, retries=1, backoff=0.01)
    if behaviours == ["lie-long"]:
        server.serve("/x.bin", b"")  # no byte ever comes, so that no try makes progress
        server.behaviours["/x.bin"] = ["lie-long"]
    started = time.monotonic()
    with pytest.raises(TransferError, match=said) as caught:
        get(tmp_path, remote(url), connections=1, policy=policy)
    assert caught.value.kind == kind
    assert time.monotonic() - started < 5
    assert "x.bin" not in leftovers(tmp_path)


def test_redirects_are_followed(tmp_path, server):
    server.serve("/x.bin", BODY)
    url = server.serve("/y", b"", "redirect:/z")
    server.serve("/z", b"", f"redirect:{server.url}/x.bin")
    assert get(tmp_path, remote(url), connections=2) == BODY


def test_a_server_that_drips_is_a_stalled_one(tmp_path, server):
    url = server.serve("/x.bin", BODY, "drip")
    with pytest.raises(TransferError, match="only"):
        get(tmp_path, remote(url), policy=TransferPolicy(timeout=0.3, retries=0, backoff=0.01), connections=1)


def test_retry_after_is_honoured(tmp_path, server):
    url = server.serve("/x.bin", BODY, "status:429:1!", "")
    started = time.monotonic()
    assert get(tmp_path, remote(url)) == BODY
    assert time.monotonic() - started >= 1


def test_nobody_there_is_said_soon(tmp_path):
    with running_server() as server:
        url = server.url
    started = time.monotonic()
    with pytest.raises(TransferError) as caught:
        get(tmp_path, remote(url + "/x.bin"), policy=TransferPolicy(timeout=1, retries=50, backoff=0.05))
    assert caught.value.kind == "unreachable"
    assert time.monotonic() - started < 2


def test_an_empty_file_is_a_file(tmp_path, server):
    assert get(tmp_path, remote(server.serve("/x.bin", b""), b"")) == b""


def test_stopping_keeps_what_has_come(tmp_path, server):
    url = server.serve("/x.bin", BODY, "", "slow:0.1")
    stop = threading.Event()
    threading.Timer(0.6, stop.set).start()
    with pytest.raises(Stopped):
        get(tmp_path, remote(url), connections=1, stop=stop)
    state = json.loads((tmp_path / "x.bin.part.json").read_text())
    assert 0 < state["pieces"][0][2] < len(BODY)
    assert (tmp_path / "x.bin.part").read_bytes()[: state["pieces"][0][2]] == BODY[: state["pieces"][0][2]]


def test_a_damaged_state_begins_anew(tmp_path, server):
    url = server.serve("/x.bin", BODY)
    (tmp_path / "x.bin.part").write_bytes(b"old")
    for state in ("{", '{"url": 1}', json.dumps({"url": url, "total": 9, "validator": "x", "pieces": [[0, 9, 9]]})):
        (tmp_path / "x.bin.part.json").write_text(state)
        assert get(tmp_path, remote(url)) == BODY


def test_two_processes_do_not_write_the_same_file(tmp_path, server):
    url = server.serve("/x.bin", BODY, "", "slow:0.05")
    first = threading.Thread(target=lambda: get(tmp_path, remote(url), connections=1))
    first.start()
    time.sleep(0.2)
    with pytest.raises(WlsupError, match="Another process"):
        get(tmp_path, remote(url))
    first.join()
    assert (tmp_path / "x.bin").read_bytes() == BODY


def test_private_addresses_are_refused_before_anything_is_sent(server):
    url = server.serve("/x.bin", BODY)
    policy = TransferPolicy(timeout=1, private_addresses=False)
    with pytest.raises(TransferError, match="not a public address") as caught:
        open_url(url, policy)
    assert caught.value.kind == "refused"
    assert not caught.value.retryable
    assert server.requests == []


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("http://a.b/ü b.jpg?x=ö&y=%20", "http://a.b/%C3%BC%20b.jpg?x=%C3%B6&y=%20"),
        ("HTTP://Bücher.example:80/", "http://xn--bcher-kva.example:80/"),
        (" https://a.b#fragment ", "https://a.b/"),
    ],
)
def test_addresses_are_spelt_as_requests_need_them(given, clean):
    assert clean_url(given) == clean


@pytest.mark.parametrize("given", ["ftp://a/b", "file:///etc/passwd", "a.jpg", "http://", "http://[", "http://a:x/"])
def test_what_is_no_web_address_is_refused(given):
    with pytest.raises(TransferError) as caught:
        clean_url(given)
    assert caught.value.kind == "invalid"
