"""``wlsup report``: finished runs, compared on one page that needs no network."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from wlsup import __version__
from wlsup.cli.logs import log_to_terminal
from wlsup.cli.parser import CommandParser
from wlsup.errors import WlsupError

__all__ = ["HELP", "run"]

logger = logging.getLogger("wlsup")

HELP = """\
usage: wlsup report RUN.. [options]

Compare finished runs on one self-contained HTML page: changes with intervals, the Pareto front, curves, costs.
Runs that differ by their seed alone are one row: mean and 95 % interval over seeds.

  RUN                           a run's folder, or a folder above several runs
  -o, --output FILE             the page (report.html)
  --figures DIR                 also every figure as PNG (300 dots an inch) and SVG, for a paper
  --title TEXT                  of the page
  --json                        k-NN changes, Pareto front and what lacks as JSON on standard output; the
                                page is written as well
"""


def run(arguments: list[str]) -> int:
    """Write the page; say what was left out."""
    parser = CommandParser("report")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--title")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    log_to_terminal(quiet=options.json)
    if options.output.is_dir():
        raise WlsupError(
            f"-o {options.output} is a folder: give the page's file, such as {options.output / 'report.html'}."
        )
    if options.figures is not None and options.figures.exists() and not options.figures.is_dir():
        raise WlsupError(f"--figures {options.figures} is a file: give a folder.")

    from wlsup.approaches import APPROACHES, approach_class
    from wlsup.callbacks.progress import progress
    from wlsup.evaluation.report.build import as_data, build_report, report_charts
    from wlsup.evaluation.report.figures.style import save
    from wlsup.evaluation.report.render import render
    from wlsup.evaluation.report.runs import find_runs, read_runs
    from wlsup.files import write_text

    folders, unfinished = find_runs(options.runs)
    with progress("runs read") as show:
        runs, refused = read_runs(folders, show)
    present = [name for name in APPROACHES if any(one.results["approach"] == name for one in runs)]
    report = build_report(
        runs,
        title=options.title,
        order=list(APPROACHES),
        summaries={name: approach_class(name).summary for name in present},
        refused=refused,
        unfinished=unfinished,
    )
    page = render(report, version=__version__, created=time.strftime("%Y-%m-%d"))
    files: list[Path] = []
    try:
        write_text(options.output, page)
        if options.figures is not None:
            charts = report_charts(report)
            with progress("figures saved") as show:
                for done, chart in enumerate(charts, start=1):
                    files += save(chart, options.figures)
                    show(done, len(charts))
    except OSError as error:
        raise WlsupError(f"Cannot write {error.filename or options.output}: {error.strerror}.") from error
    for folder, reason in refused.items():
        logger.warning("left out %s: %s", folder, reason)
    if unfinished:
        logger.warning("%d runs have no results.json and are left out; the page names them", len(unfinished))
    if options.json:
        written = {"page": str(options.output), "figures": [str(file) for file in files]}
        print(
            json.dumps(
                {**as_data(report), "refused": refused, "unfinished": [str(f) for f in unfinished], **written}, indent=2
            )
        )
        return 0
    size = options.output.stat().st_size / 2**20
    approaches = len({group.approach for group in report.groups})
    logger.info("%d runs of %d approaches: %s (%.1f MiB)", len(runs), approaches, options.output, size)
    if files:
        logger.info("%d figures in %s", len(files) // 2, options.figures)
    return 0
