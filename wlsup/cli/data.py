"""``wlsup data``: list, fetch, prepare and check data sets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wlsup.cli.data_fetch import add_fetch, fetch_command
from wlsup.cli.logs import log_to_terminal
from wlsup.cli.parser import CommandParser, given_numbers
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


def run(arguments: list[str]) -> int:
    """Run a sub-command."""
    if not arguments:
        raise WlsupError(f"wlsup data: name what to do. Valid: {', '.join(_COMMANDS)}.")
    command = choose("command of wlsup data", arguments[0], _COMMANDS)
    parser = CommandParser(f"data {command}", help_command="data")
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
    from wlsup.data.catalog import CATALOG
    from wlsup.data.locate import data_root, entry_status

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
    from wlsup.data.locate import data_root
    from wlsup.data.prepare import prepare

    report = prepare(
        options.name,
        Path(options.out) if options.out else None,
        root=data_root(options.root),
        captions=options.captions,
        images=options.images,
        options=_source_options(options),
        **given_numbers(options, "shard_size"),
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
    from wlsup.data.check import check
    from wlsup.data.locate import data_root

    report = check(
        options.name,
        root=data_root(options.root),
        captions=options.captions,
        images=options.images,
        options=_source_options(options),
        **given_numbers(options, "workers", "min_side", "max_words"),
    )
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        from wlsup.cli.data_tables import show_check

        show_check(report)
    return 1 if report.faults else 0


_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "list": (_add_list, _list),
    "fetch": (add_fetch, fetch_command),
    "prepare": (_add_prepare, _prepare),
    "check": (_add_check, _check),
}
