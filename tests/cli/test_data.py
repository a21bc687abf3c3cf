"""``wlsup data``: one command a step, readable by people and by programs, with an exit code that tells."""

import csv
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from data_makers import noise_jpeg  # noqa: E402
from data_server import running_server  # noqa: E402
from faulty import plant_faults  # noqa: E402
from published_files import publish  # noqa: E402

from wlsup.cli import main  # noqa: E402
from wlsup.data.catalog import CATALOG  # noqa: E402


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(logging.getLogger("wlsup"), "handlers", [])  # one of its own a test, to be captured


@pytest.fixture
def server(monkeypatch):
    with running_server() as server:
        publish(server, monkeypatch)
        yield server


@pytest.fixture
def planted(tmp_path):
    return plant_faults(tmp_path)


@pytest.fixture
def table(tmp_path):
    """Six captioned pictures, one of them cut."""
    (tmp_path / "images").mkdir()
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in range(6):
            data = noise_jpeg(i)
            (tmp_path / f"images/{i}.jpg").write_bytes(data[: len(data) // 2] if i == 4 else data)
            writer.writerow([f"{i}.jpg", f"picture number {i}"])
    return ["--captions", str(tmp_path / "captions.csv"), "--images", str(tmp_path / "images")]


def run_json(capsys, *arguments):
    code = main(["data", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_help_and_list_import_no_torch_and_no_pillow():
    code = (
        "import sys; from wlsup.cli import main; main(['data', '--help']); main(['data', 'list']); "
        "main(['data', 'fetch', 'imagenet']); "
        "sys.exit(bool({'torch', 'PIL', 'numpy', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in ("list", "fetch", "prepare", "check", "--retry", *CATALOG):
        assert word in done.stdout


def test_list_says_what_is_there_and_what_is_missing(capsys, tmp_path, server, monkeypatch):
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn/train_32x32.mat").write_bytes(b"x")
    monkeypatch.setenv("WLSUP_DATA", str(tmp_path))
    code, shown = run_json(capsys, "list")
    assert code == 0
    assert shown["root"] == str(tmp_path)
    states = {entry["name"]: entry["state"] for entry in shown["sets"]}
    assert states == {name: "partial" if name == "svhn" else "missing" for name in CATALOG}
    assert next(entry for entry in shown["sets"] if entry["name"] == "svhn")["missing"] == ["test_32x32.mat"]
    assert main(["data", "list"]) == 0
    assert "no test_32x32.mat" in capsys.readouterr().out


def test_fetch_then_list_then_fetch(capsys, tmp_path, server):
    code, report = run_json(capsys, "fetch", "dtd", "--root", tmp_path, "--connections", 2)
    assert (code, report["downloaded"]) == (0, ["dtd-r1.0.1.tar.gz"])
    _, shown = run_json(capsys, "list", "--root", tmp_path)
    assert {entry["name"]: entry["state"] for entry in shown["sets"]}["dtd"] == "complete"
    assert main(["data", "fetch", "dtd", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "dtd is complete in" in said.out
    assert "Research use" in said.out


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, tmp_path, server):
    assert main(["data", "fetch", "svhn", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "fetch svhn: " in said
    assert "\x1b[" not in said


def test_fetch_cc3m_accounts_for_every_row(capsys, tmp_path, server):
    rows = [server.serve(f"/{i}.jpg", noise_jpeg(i)) for i in range(3)]
    rows += [server.url + "/none.jpg", server.serve("/page.jpg", b"<html>")]
    (tmp_path / "x.tsv").write_text("".join(f"caption\t{url}\n" for url in rows))
    arguments = ["fetch", "cc3m", "--root", tmp_path, "--tsv", tmp_path / "x.tsv", "--allow-private"]
    code, account = run_json(capsys, *arguments, "--rows", tmp_path / "rows.jsonl")
    assert code == 0
    assert account["outcomes"] == {"ok": 3, "dead": 1, "not-an-image": 1}
    assert not account["interrupted"]
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["url"] for line in lines] == rows
    server.serve("/none.jpg", noise_jpeg(9))
    code, account = run_json(capsys, *arguments, "--retry", "dead")
    assert account["outcomes"] == {"ok": 4, "not-an-image": 1}
    assert main(["data", *map(str, arguments)]) == 0
    said = capsys.readouterr().out
    assert "not-an-image" in said
    assert "80.0" in said


def test_an_interrupt_ends_with_the_account_and_130(capsys, tmp_path, server, monkeypatch):
    from wlsup.data import links

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(links, "fetch_links", interrupted)
    (tmp_path / "x.tsv").write_text(f"caption\t{server.url}/a.jpg\n")
    code, account = run_json(capsys, "fetch", "cc3m", "--root", tmp_path, "--tsv", tmp_path / "x.tsv")
    assert code == 130
    assert account["interrupted"]
    assert account["outcomes"] == {"pending": 1}


def test_check_ends_with_1_on_faults_and_0_without(capsys, tmp_path, table):
    code, report = run_json(capsys, "check", "table", *table)
    assert code == 1
    assert report["faulty"] == [{"kind": "truncated", "name": "4.jpg", "detail": report["faulty"][0]["detail"]}]
    assert main(["data", "check", "table", *table]) == 1
    said = capsys.readouterr().out
    assert "truncated" in said
    assert "4.jpg" in said
    assert "Words a caption: 3 to 3" in said
    (tmp_path / "images/4.jpg").write_bytes(noise_jpeg(4))
    assert run_json(capsys, "check", "table", *table)[0] == 0
    assert main(["data", "check", "folder", "--images", table[3]]) == 0
    assert "No fault in folder." in capsys.readouterr().out


def test_ten_planted_kinds_of_faults_come_out_of_the_command_and_no_others(capsys, planted):
    captions, images, expected = planted
    arguments = ["table", "--captions", captions, "--images", images]
    code, report = run_json(capsys, "check", *arguments, "--workers", 2)
    assert code == 1
    assert {(fault["kind"], fault["name"]) for fault in report["faulty"]} == expected
    assert list(report["faults"].values()) == [1] * 10
    assert report["clean"] is False
    assert main(["data", "check", *arguments]) == 1
    said = capsys.readouterr().out
    assert all(kind in said and name in said for kind, name in expected)


def test_names_from_files_cannot_speak_to_the_terminal(capsys, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/[bold]\x1b[31m.jpg").write_bytes(b"")
    Path(str(tmp_path / "images").encode().decode() + "/caf\udce9.jpg").write_bytes(b"")
    assert main(["data", "check", "folder", "--images", str(tmp_path / "images")]) == 1
    said = capsys.readouterr().out
    assert "[bold]\ufffd[31m.jpg" in said
    assert "caf\ufffd.jpg" in said
    assert "\x1b" not in said


def test_the_table_is_capped_and_the_json_is_not(capsys, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(50):
        (tmp_path / f"images/{i:02d}.jpg").write_bytes(b"")
    arguments = ["check", "folder", "--images", tmp_path / "images"]
    assert len(run_json(capsys, *arguments)[1]["faulty"]) == 50
    main(["data", *map(str, arguments)])
    said = capsys.readouterr().out
    assert "19.jpg" in said
    assert "20.jpg" not in said
    assert "and 30 more" in said


def test_prepare_then_check_the_shards(capsys, tmp_path, table):
    code, report = run_json(capsys, "prepare", "table", *table, "--out", tmp_path / "shards", "--shard-size", 2)
    assert (code, report["samples"], report["shards"]) == (0, 6, 3)
    code, checked = run_json(capsys, "check", "shards", "--images", tmp_path / "shards")
    assert code == 1
    assert [fault["name"] for fault in checked["faulty"]] == ["4.jpg"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Valid: list, fetch, prepare, check"),
        (["fetsh"], "Did you mean 'fetch'?"),
        (["fetch"], "required: name"),
        (["fetch", "cifar"], "Did you mean 'cifar10'?"),
        (["fetch", "cifar10", "--conections", "2"], "unrecognized arguments: --conections"),
        (["fetch", "cifar10", "--connections", "0"], "--connections 0: give a positive number"),
        (["fetch", "imagenet"], "image-net.org"),
        (["fetch", "cc3m"], "needs --tsv FILE"),
        (["fetch", "cc3m", "--tsv", "/nowhere.tsv", "--retry", "ded"], "Did you mean 'dead'?"),
        (["fetch", "cc3m", "--tsv", "/nowhere.tsv"], "/nowhere.tsv"),
        (["check", "tabel"], "Did you mean 'table'?"),
        (["check", "cifar10"], "wlsup data fetch cifar10"),
        (["check", "table", "--captions", "/nowhere.csv", "--option", "header"], "give KEY=VALUE"),
        (["prepare", "table"], "--out"),
    ],
)
def test_mistakes_end_in_one_message_and_2(arguments, said, capsys, tmp_path):
    root = ["--root", str(tmp_path)] if arguments and arguments[0] != "fetsh" else []
    assert main(["data", *arguments, *root]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
