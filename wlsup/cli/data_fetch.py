"""``wlsup data fetch``: whole files from the catalogue, and the pictures behind CC-3M's links."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from wlsup.cli.parser import given_numbers
from wlsup.errors import WlsupError, choose

__all__ = ["add_fetch", "fetch_command"]

_RETRIED = ("timeout", "throttled", "server-error", "unreachable", "broken")


def add_fetch(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``wlsup data fetch``."""
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


def fetch_command(options: argparse.Namespace) -> int:
    """Fetch a set of the catalogue, or the pictures of a TSV of links; return the exit code."""
    from dataclasses import asdict, replace

    from wlsup.data.catalog import catalog_entry
    from wlsup.data.locate import data_root
    from wlsup.data.transport import TransferPolicy

    entry = catalog_entry(options.name)
    root = data_root(options.root)
    if entry.name == "cc3m":
        return _fetch_links(options, root / entry.name)
    from wlsup.data.fetch import fetch

    policy = replace(TransferPolicy(), **given_numbers(options, "timeout", "retries"))
    report = fetch(
        entry,
        root,
        policy=policy,
        mirror=options.mirror,
        keep_archives=options.keep_archives,
        **given_numbers(options, "connections"),
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

    patience = given_numbers(options, "timeout", "retries")
    policy = replace(LINK_POLICY, private_addresses=options.allow_private, **patience)
    limits = LinkOptions(
        policy=policy, **given_numbers(options, "connections", "per_host", "max_bytes", "max_pixels", "min_side")
    )
    limit = given_numbers(options, "limit").get("limit")
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
