"""The pictures of a list of links: every row's outcome is known, whatever the hosts do and whenever it is killed."""

import hashlib
import multiprocessing
import os
import signal
import sqlite3
import sys
import threading
import time

import pytest
from data_makers import encode, noise_jpeg
from data_server import running_server
from PIL import Image

from wlsup.cli import main
from wlsup.data import links
from wlsup.data.ledger import Ledger, link_name
from wlsup.data.links import LinkOptions, fetch_links
from wlsup.data.transport import TransferPolicy
from wlsup.errors import WlsupError

POLICY = TransferPolicy(timeout=1.5, retries=1, backoff=0.01, longest_wait=2, redirects=4)
OPTIONS = LinkOptions(connections=8, per_host=8, max_bytes=200_000, max_pixels=1_000_000, deadline=10, policy=POLICY)


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    with running_server() as server:
        yield server


def write_tsv(path, urls):
    path.write_text("".join(f"caption {i}\t{url}\n" for i, url in enumerate(urls)))
    return path


def run(tmp_path, urls, options=OPTIONS, limit=None, again=()):
    ledger = Ledger(tmp_path / "images/ledger.sqlite")
    try:
        ledger.load_rows(write_tsv(tmp_path / "x.tsv", urls))
        ledger.reopen(again)
        fetch_links(ledger, tmp_path / "images", options, limit=limit)
        return ledger.account(limit), list(ledger.outcomes())
    finally:
        ledger.close()


def test_every_row_has_an_outcome(server, tmp_path):
    with running_server() as gone:
        refused = gone.url + "/x.jpg"
    picture = noise_jpeg(0)
    bomb = encode(Image.new("1", (2000, 2000)))
    rows = {
        server.serve("/ok.jpg", picture): "ok",
        server.serve("/late.jpg", noise_jpeg(1), "status:503!", ""): "ok",
        server.serve("/moved.jpg", b"", "redirect:/ok.jpg"): "ok",
        server.serve("/page.jpg", b"<html>sorry</html>"): "not-an-image",
        server.serve("/empty.jpg", b""): "not-an-image",
        server.serve("/half.jpg", picture[: len(picture) // 2]): "not-an-image",
        server.serve("/pixel.gif", encode(Image.new("P", (1, 1)), "GIF")): "too-small",
        server.serve("/bomb.png", bomb): "too-large",
        server.serve("/heavy.jpg", bytes(300_000)): "too-large",
        server.serve("/endless.jpg", bytes(300_000), "no-length"): "too-large",
        server.url + "/gone.jpg": "dead",
        server.serve("/forbidden.jpg", b"", "status:403"): "dead",
        server.serve("/circle.jpg", b"", "redirect:/circle.jpg"): "dead",
        server.serve("/limit.jpg", b"", "status:429:0"): "throttled",
        server.serve("/wait.jpg", b"", "status:429:500"): "throttled",
        server.serve("/error.jpg", b"", "status:500"): "server-error",
        server.serve("/silent.jpg", picture, "stall-head"): "timeout",
        server.serve("/stalled.jpg", picture, "stall"): "timeout",
        server.serve("/cut.jpg", picture, "drop"): "broken",
        server.serve("/lies.jpg", picture, "lie-long"): "broken",
        refused: "unreachable",
        "ftp://a.b/c.jpg": "bad-row",
        "": "bad-row",
        "http://[broken/": "dead",
    }
    account, found = run(tmp_path, rows)
    assert {row["url"] or "": row["outcome"] for row in found if row["url"]} == {
        url: outcome for url, outcome in rows.items() if outcome != "bad-row"
    }
    assert [row["outcome"] for row in found] == list(rows.values())
    assert account["rows"] == len(rows) == sum(account["outcomes"].values())
    assert account["outcomes"]["ok"] == 3
    assert account["repeated_pictures"] == 1
    attempts = {row["url"]: row["attempts"] for row in found}
    assert attempts[server.url + "/error.jpg"] == attempts[server.url + "/cut.jpg"] == 2
    assert attempts[server.url + "/silent.jpg"] == attempts[refused] == 1  # waiting for the silent takes days
    assert account["hosts"] == {server.url[7:]: 17, refused.split("/")[2]: 1, "[broken": 1}
    good = {row["name"]: row for row in found if row["outcome"] == "ok"}
    there = {path.relative_to(tmp_path / "images").as_posix() for path in tmp_path.rglob("*.jpg")}
    assert there == set(good)
    for name, row in good.items():
        data = (tmp_path / "images" / name).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert (row["bytes"], row["width"], row["height"]) == (len(data), 40, 32)


def test_pictures_are_named_as_the_source_looks_for_them():
    digest = hashlib.sha256(b"http://a.b/c.jpg").hexdigest()[:24]
    assert link_name("http://a.b/c.jpg") == f"{digest[:2]}/{digest}.jpg"


def test_a_host_gets_no_more_than_its_share_at_once(tmp_path):
    with running_server() as first, running_server("127.0.0.2") as second:
        for server in (first, second):
            server.delay = 0.03
        urls = [first.serve(f"/{i}.jpg", noise_jpeg(i)) for i in range(12)]
        urls += [second.serve(f"/{i}.jpg", noise_jpeg(i)) for i in range(12)]
        account, _ = run(tmp_path, urls, LinkOptions(connections=8, per_host=2, policy=POLICY))
        assert account["outcomes"] == {"ok": 24}
        # a finished request may still be winding down in the server while its successor starts
        assert 2 <= first.busiest <= 4
        assert 2 <= second.busiest <= 4


def test_rows_with_one_link_fetch_it_once_and_all_count(server, tmp_path):
    url = server.serve("/a.jpg", noise_jpeg(0))
    account, found = run(tmp_path, [url, url, server.url + "/none.jpg", url])
    assert account["outcomes"] == {"ok": 3, "dead": 1}
    assert account["links"] == 2
    assert len(server.asked("/a.jpg")) == 1


def test_a_second_run_asks_for_nothing_and_retry_asks_for_what_failed(server, tmp_path):
    good = server.serve("/a.jpg", noise_jpeg(0))
    flaky = server.serve("/b.jpg", noise_jpeg(1), "status:500")
    urls = [good, flaky, server.url + "/none.jpg"]
    run(tmp_path, urls)
    server.requests.clear()
    run(tmp_path, urls)
    assert server.requests == []
    server.serve("/b.jpg", noise_jpeg(1))
    account, _ = run(tmp_path, urls, again=["server-error"])
    assert account["outcomes"] == {"ok": 2, "dead": 1}
    assert [path for path, _ in server.requests] == ["/b.jpg"]


def test_another_tsv_keeps_what_is_known_of_its_links(server, tmp_path):
    urls = [server.serve(f"/{i}.jpg", noise_jpeg(i)) for i in range(4)]
    run(tmp_path, urls[:3])
    server.requests.clear()
    account, _ = run(tmp_path, urls[1:])
    assert account["outcomes"] == {"ok": 3}
    assert [path for path, _ in server.requests] == ["/3.jpg"]


def test_limit_takes_the_first_rows_and_accounts_for_them_only(server, tmp_path):
    urls = [server.serve(f"/{i}.jpg", noise_jpeg(i)) for i in range(6)]
    account, found = run(tmp_path, urls, limit=2)
    assert account["outcomes"] == {"ok": 2}
    assert [row["outcome"] for row in found] == ["ok"] * 2 + ["pending"] * 4
    assert run(tmp_path, urls)[0]["outcomes"] == {"ok": 6}


def test_private_addresses_are_refused_by_default(server, tmp_path):
    url = server.serve("/a.jpg", noise_jpeg(0))
    assert not links.LINK_POLICY.private_addresses
    account, _ = run(tmp_path, [url], LinkOptions(policy=links.LINK_POLICY))
    assert account["outcomes"] == {"refused": 1}
    assert server.requests == []


def test_without_a_network_the_links_stay_pending(tmp_path):
    gone = []
    for _ in range(3):
        with running_server() as server:
            gone.append(server.url + "/a.jpg")
    with pytest.raises(WlsupError, match="network seems to be down"):
        run(tmp_path, gone)
    ledger = Ledger(tmp_path / "images/ledger.sqlite")
    assert ledger.count_pending() == 3
    ledger.close()


def test_a_network_lost_in_the_middle_writes_off_no_links(server, tmp_path, monkeypatch):
    monkeypatch.setattr(links, "_UNREACHABLE_HOSTS", 4)
    with running_server() as closed:
        port = closed.server_address[1]
    urls = [server.serve("/a.jpg", noise_jpeg(0)), *(f"http://127.0.0.{i}:{port}/x.jpg" for i in range(2, 12))]
    with pytest.raises(WlsupError, match="stay pending"):
        run(tmp_path, urls, LinkOptions(connections=1, policy=POLICY))
    ledger = Ledger(tmp_path / "images/ledger.sqlite")
    assert ledger.account()["outcomes"] == {"pending": 10, "ok": 1}
    ledger.close()


def test_one_ledger_has_one_writer(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(WlsupError, match="wait for it"):
        Ledger(tmp_path / "ledger.sqlite")
    ledger.close()
    (tmp_path / "other").write_bytes(b"no ledger" * 100)
    with pytest.raises(WlsupError, match="no ledger"):
        Ledger(tmp_path / "other")


def test_a_missing_or_empty_tsv_is_refused(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for content, said in ((None, "Give the published TSV"), (b"", "is empty")):
        if content is not None:
            (tmp_path / "x.tsv").write_bytes(content)
        with pytest.raises(WlsupError, match=said):
            ledger.load_rows(tmp_path / "x.tsv")
    ledger.close()


def test_odd_rows_are_read_as_published(server, tmp_path):
    url = server.serve("/a.jpg", noise_jpeg(0))
    (tmp_path / "y.tsv").write_bytes(
        b"caption\turl\n"
        + b'a "quote\tand a tab\t'
        + url.encode()
        + b"\r\n"
        + b"caf\xe9\t"
        + url.encode()
        + b"\n\nno tab\n"
    )
    ledger = Ledger(tmp_path / "images/ledger.sqlite")
    ledger.load_rows(tmp_path / "y.tsv")
    fetch_links(ledger, tmp_path / "images", OPTIONS)
    assert [(row["line"], row["outcome"]) for row in ledger.outcomes()] == [(2, "ok"), (3, "ok"), (5, "bad-row")]
    ledger.close()


def fetch_in_process(root, tsv):
    # forked: nothing is imported again
    command = ["data", "fetch", "cc3m", "--allow-private", "--connections", "2", "--json"]

    def fetch():
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's background job would inherit that it is ignored
        sys.exit(main([*command, "--root", str(root), "--tsv", str(tsv)]))

    process = multiprocessing.get_context("fork").Process(target=fetch)
    process.start()
    return process


def wait_for(condition, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_where_it_was(server, tmp_path, monkeypatch, how):
    monkeypatch.setattr(links, "_COMMIT_EVERY", 0.1)
    server.delay = 0.15  # long enough to be killed in between on a busy machine
    urls = [server.serve(f"/{i}.jpg", noise_jpeg(i)) for i in range(40)]
    tsv = write_tsv(tmp_path / "x.tsv", urls)
    process = fetch_in_process(tmp_path, tsv)
    wait_for(lambda: len(server.requests) >= 20 or not process.is_alive())
    os.kill(process.pid, how)
    process.join(15)
    assert process.exitcode == (-9 if how == signal.SIGKILL else 130)
    base = sqlite3.connect(tmp_path / "cc3m/images/ledger.sqlite")
    known = base.execute("SELECT COUNT(*) FROM links WHERE outcome = 'ok'").fetchone()[0]
    base.close()
    assert 0 < known < 40
    server.delay = 0
    process = fetch_in_process(tmp_path, tsv)
    process.join(15)
    assert process.exitcode == 0
    ledger = Ledger(tmp_path / "cc3m/images/ledger.sqlite")
    assert ledger.account()["outcomes"] == {"ok": 40}
    ledger.close()
    assert len(server.requests) <= 40 + 2  # at most those in the air were asked for twice


def test_a_run_stopped_while_a_host_stalls_ends_soon(server, tmp_path):
    urls = [server.serve(f"/{i}.jpg", noise_jpeg(i), "stall") for i in range(4)]
    ledger = Ledger(tmp_path / "images/ledger.sqlite")
    ledger.load_rows(write_tsv(tmp_path / "x.tsv", urls))

    def interrupt(done, total):
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch_links(ledger, tmp_path / "images", OPTIONS, report=interrupt)
    assert time.monotonic() - started < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("links")]
    ledger.close()
