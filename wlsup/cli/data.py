"""``wlsup data``: list, fetch, prepare and check data sets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from wlsup.cli.logs import log_to_terminal
from wlsup.errors import WlsupError, choose

__all__ = ["HELP", "run"]

HELP = """\
usage: wlsup data list | fetch NAME | prepare NAME | check NAME [options]

Data sets: what there is, getting them, packing them into tar shards, and looking for faults in them.

  list                          what can be fetched, what is there, what is missing
  fetch NAME                    download, verify and unpack; again after an interruption: it goes on from there
  fetch cc3m --tsv FILE         the pictures of a TSV of captions and links, with a ledger of every row's outcome
  prepare NAME --out DIR        a source of captions as tar shards with an index
  prepare shards --images DIR   the index of tar shards that exist
  check NAME                    read every sample; exit code 0: clean, 1: faults found
                                NAME: table, folder, another source of captions, or an eval set

  --root DIR                    the folder of all data sets (the environment's WLSUP_DATA, else ./data)
  --json                        machine-readable, complete

fetch
  --connections N               at once, over all files (4; 64 for cc3m)
  --mirror URL                  a folder that holds the same files; the checksums still hold
  --keep-archives               keep the archives once they are unpacked
  --timeout S, --retries N      seconds without a byte until a connection counts as stalled; tries that bring nothing
fetch cc3m
  --tsv FILE                    rows of caption, tab, address
  --limit N                     the first N rows only
  --per-host N                  at most so many at once from one host (2)
  --max-bytes N, --max-pixels N, --min-side N   what is too large, or too small, to be taken
  --retry WHAT,..               try again what ended so: timeout, dead, ..., or failed for all that can change
  --rows FILE                   write every row's outcome as JSON lines
  --allow-private               also talk to addresses inside this network
prepare, check
  --captions FILE, --images DIR|TAR   as --data.captions and --data.images
  --option KEY=VALUE            of the source, as --data.source_options; may be repeated
prepare
  --shard-size N                pairs a shard (2000)
check
  --workers N                   processes that decode (0)
  --min-side N, --max-words N   what is tiny, and what is overlong (16 pixels, 256 words)
"""

_RETRIED = ("timeout", "throttled", "server-error", "unreachable", "broken")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WlsupError(f"{self.prog}: {message}. `wlsup data --help` lists the options.")


def run(arguments: list[str]) -> int:
    """Run a sub-command."""
    if not arguments:
        raise WlsupError(f"wlsup data: name what to do. Valid: {', '.join(_COMMANDS)}.")
    command = choose("command of wlsup data", arguments[0], _COMMANDS)
    parser = _Parser(prog=f"wlsup data {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--root")
    parser.add_argument("--json", action="store_true")
    add, act = _COMMANDS[command]
    add(parser)
    options = parser.parse_args(arguments[1:])
    log_to_terminal(quiet=options.json)
    return act(options)


def _add_list(parser: argparse.ArgumentParser) -> None:
    pass


def _list(options: argparse.Namespace) -> int:
    from wlsup.data.catalog import CATALOG, data_root, entry_status

    root = data_root(options.root)
    found = [entry_status(entry, root) for entry in CATALOG.values()]
    if options.json:
        shown = [
            {
                "name": status.entry.name,
                "title": status.entry.title,
                "kind": status.entry.kind,
                "domain": status.entry.domain,
                "state": status.state,
                "folder": str(status.folder),
                "missing": list(status.missing),
                "partial_downloads": list(status.partial),
                "download_bytes": status.entry.download_bytes,
                "disk_bytes": status.entry.disk_bytes,
                "files": [{"url": file.url, "bytes": file.size, "md5": file.md5} for file in status.entry.files],
                "layout": list(status.entry.layout),
                "samples": status.entry.samples,
                "licence": status.entry.licence,
                "by_hand": status.entry.by_hand,
            }
            for status in found
        ]
        print(json.dumps({"root": str(root), "sets": shown}, indent=2))
        return 0
    from wlsup.cli.data_tables import show_list

    show_list(root, found)
    return 0


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("--connections", type=int)
    parser.add_argument("--mirror")
    parser.add_argument("--keep-archives", action="store_true")
    parser.add_argument("--timeout", type=float)
    parser.add_argument("--retries", type=int)
    parser.add_argument("--tsv")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--per-host", type=int)
    parser.add_argument("--max-bytes", type=int)
    parser.add_argument("--max-pixels", type=int)
    parser.add_argument("--min-side", type=int)
    parser.add_argument("--retry", default="")
    parser.add_argument("--rows")
    parser.add_argument("--allow-private", action="store_true")


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those of the options that were given; each must be a positive number."""
    chosen = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name, value in chosen.items():
        if value < (0 if name == "retries" else 1e-9):
            raise WlsupError(f"--{name.replace('_', '-')} {value}: give a positive number.")
    return chosen


def _fetch(options: argparse.Namespace) -> int:
    from dataclasses import asdict, replace

    from wlsup.data.catalog import catalog_entry, data_root
    from wlsup.data.transport import TransferPolicy

    entry = catalog_entry(options.name)
    root = data_root(options.root)
    if entry.name == "cc3m":
        return _fetch_links(options, root / entry.name)
    from wlsup.data.fetch import fetch

    policy = replace(TransferPolicy(), **_given(options, "timeout", "retries"))
    report = fetch(
        entry,
        root,
        policy=policy,
        mirror=options.mirror,
        keep_archives=options.keep_archives,
        **_given(options, "connections"),
    )
    if options.json:
        print(json.dumps(asdict(report), indent=2))
        return 0
    print(f"{entry.name} is complete in {report.folder}. {entry.licence}")
    if report.left_out:
        from wlsup.cli.data_tables import SHOWN, plain

        print(f"Not unpacked: {plain('; '.join(report.left_out[:SHOWN]))}")
    return 0


def _fetch_links(options: argparse.Namespace, folder: Path) -> int:
    from dataclasses import replace

    from wlsup.data.catalog import catalog_entry
    from wlsup.data.ledger import FAILURES, Ledger
    from wlsup.data.progress import progress

    tsv = Path(options.tsv) if options.tsv else next(iter(sorted(folder.glob("*.tsv"))), None)
    if tsv is None:
        raise WlsupError(f"fetch cc3m needs --tsv FILE, or a .tsv in {folder}. {catalog_entry('cc3m').by_hand}")
    again: list[str] = []
    for what in filter(None, options.retry.split(",")):
        again += _RETRIED if what == "failed" else [choose("outcome in --retry", what, (*FAILURES, "failed"))]
    if not tsv.is_file():
        raise WlsupError(f"--tsv {tsv}: no such file. Give the published TSV of captions and links.")
    from wlsup.data.links import LINK_POLICY, LinkOptions, fetch_links

    policy = replace(LINK_POLICY, private_addresses=options.allow_private, **_given(options, "timeout", "retries"))
    limits = LinkOptions(
        policy=policy, **_given(options, "connections", "per_host", "max_bytes", "max_pixels", "min_side")
    )
    limit = _given(options, "limit").get("limit")
    ledger = Ledger(folder / "images" / "ledger.sqlite")
    code = 0
    try:
        ledger.load_rows(tsv)
        ledger.reopen(again)
        try:
            with progress("fetch cc3m", unit="links") as show:
                fetch_links(ledger, folder / "images", limits, limit=limit, report=show)
        except KeyboardInterrupt:
            code = 130
        account = {"tsv": str(tsv), "images": str(folder / "images"), **ledger.account(limit)}
        if options.rows:
            with open(options.rows, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in ledger.outcomes())
    finally:
        ledger.close()
    if options.json:
        print(json.dumps({**account, "interrupted": bool(code)}, indent=2))
    else:
        from wlsup.cli.data_tables import show_account

        show_account(account)
        if code:
            print("Interrupted; the same command goes on from here.")
    return code


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("--captions")
    parser.add_argument("--images")
    parser.add_argument("--option", action="append", default=[])


def _source_options(options: argparse.Namespace) -> dict[str, Any]:
    import yaml

    chosen = {}
    for given in options.option:
        name, equals, value = given.partition("=")
        if not equals:
            raise WlsupError(f"--option {given}: give KEY=VALUE, such as --option caption_column=title.")
        try:
            chosen[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            chosen[name] = value
    return chosen


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--out")
    parser.add_argument("--shard-size", type=int)


def _prepare(options: argparse.Namespace) -> int:
    from wlsup.data.catalog import data_root
    from wlsup.data.prepare import prepare

    report = prepare(
        options.name,
        Path(options.out) if options.out else None,
        root=data_root(options.root),
        captions=options.captions,
        images=options.images,
        options=_source_options(options),
        **_given(options, "shard_size"),
    )
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{report['samples']:,} pairs in {report['shards']} shards in {report['out']}.")
        if report["skipped"]:
            from wlsup.cli.data_tables import plain

            first = "; ".join(f"{plain(key)} ({plain(why)})" for key, why in list(report["skipped"].items())[:5])
            print(f"Left out: {len(report['skipped']):,} ({first})")
    return 0


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--min-side", type=int)
    parser.add_argument("--max-words", type=int)


def _check(options: argparse.Namespace) -> int:
    from wlsup.data.catalog import data_root
    from wlsup.data.check import check

    report = check(
        options.name,
        root=data_root(options.root),
        captions=options.captions,
        images=options.images,
        options=_source_options(options),
        workers=max(options.workers, 0),
        **_given(options, "min_side", "max_words"),
    )
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        from wlsup.cli.data_tables import show_check

        show_check(report)
    return 1 if report.faults else 0


_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "list": (_add_list, _list),
    "fetch": (_add_fetch, _fetch),
    "prepare": (_add_prepare, _prepare),
    "check": (_add_check, _check),
}
