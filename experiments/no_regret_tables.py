"""The no-regret study's record as tables and as a picture; see no_regret.py for what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_BLIND = {
    "mini": "Not blind: the candidates were chosen knowing published figures (README) of their approaches on the same "
    "mini test sets.",
    "real": "Not blind: the encoder's mean pooling was chosen on test figures of CIFAR-10 and DTD, FiLM's figures on "
    "both test sets are published (README), and the candidates were chosen knowing them and those of the mini world. "
    "About two thirds of dtd10's bank pictures were trained on, with descriptions that name their texture.",
}


def markdown(record: Mapping[str, Any]) -> str:
    """Return the study as tables."""
    chosen, test = record["chosen"], record["test"]
    kept = "" if chosen["keeps_margin"] else " No setting kept the margin on validation pictures; this came nearest."
    lines = [
        f"# No regret, {record['world']} world",
        "",
        f"`{record['command']}`; {len(record['candidates']) + len(record['failed'])} candidates ({record['offered']}), "
        f"seeds {_seeds(record['search_seeds'])} for the choice and {_seeds(record['confirm_seeds'])} for the test.",
        "",
        f"**{record['answer']}.** Chosen on validation pictures: "
        f"{chosen['candidate']} at alpha {chosen['alpha']:g}.{kept}",
        "",
        "On test pictures, with seeds that no choice has seen; change of k-NN accuracy in points, mean and 95 % "
        "interval, for other seeds (Student's t) and for other seeds and other pictures (Hillis 2007; over sets as if "
        "they were independent). Before: accuracy of the pretrained encoder ± half of Wilson's 95 % interval.",
        "",
        "| | pictures | before, % | change | other seeds | other seeds and pictures |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [_tested(f"{domain} domain", test[domain]) for domain in ("in", "out")]
    lines += [_tested(f"{name} ({entry['domain']})", entry) for name, entry in test["sets"].items()]
    lines += ["", *search_lines(record), "", NOT_BLIND[record["world"]], ""]
    lines += [f"Protocol: {record['protocol']}.", ""]
    lines += [f"![in domain against out of domain](no_regret_{record['world']}.png)", ""]
    return "\n".join(lines)


def search_lines(record: Mapping[str, Any]) -> list[str]:
    """Return the candidates on validation pictures, the best first, then those that failed."""
    lines = [
        "Each candidate on validation pictures, at its best setting by the rule and at alpha 1; change in points, mean "
        "± one standard error over pictures; bold: its lower bounds keep the margin:",
        "",
        "| candidate | seeds | alpha | in domain | out of domain | in domain, alpha 1 | out of domain, alpha 1 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["candidates"]:
        place = record["alphas"].index(row["alpha"])
        cells = [_pair(row[domain][at]) for at in (place, -1) for domain in ("in", "out")]
        name = f"**{row['name']}**" if row["keeps_margin"] else row["name"]
        lines.append(f"| {name} | {row['seeds']} | {row['alpha']:g} | {' | '.join(cells)} |")
    if failed := record.get("unconfirmed"):
        lines += ["", f"Seeds that could not be trained: {'; '.join(failed)}."]
    for name, reason in record["failed"].items():
        lines.append(f"| {name} | failed: {' '.join(reason.split()).replace('|', '/')} | | | | | |")
    return lines


def _tested(name: str, entry: Mapping[str, Any]) -> str:
    before = ""
    if "pretrained" in entry:
        low, high = entry["pretrained_ci95"]
        before = f"{100 * entry['pretrained']:.1f} ± {50 * (high - low):.1f}"
    cells = [str(entry.get("test", "")), before, _points(entry["mean"])]
    return f"| {' | '.join([name, *cells, _interval(entry['ci95']), _interval(entry['crossed_ci95'])])} |"


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) if len(seeds) < 3 else f"{seeds[0]}-{seeds[-1]}"


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _interval(limits: Sequence[float]) -> str:
    return f"[{_points(limits[0])}, {_points(limits[1])}]"


def _pair(value: Sequence[float]) -> str:
    return f"{_points(value[0])} ± {100 * value[1]:.2f}"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw each candidate's line on validation pictures, from alpha 0 to 1, and the test of the chosen one.

    Twice: whole, and what lies near the margin.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(11, 6))
    test = record["test"]
    spread = [[100 * (test[d]["mean"] - test[d]["ci95"][0])] for d in ("in", "out")]
    for axes in both:
        for number, row in enumerate(record["candidates"]):
            line = [[100 * mean for mean, _ in row[domain]] for domain in ("in", "out")]
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            axes.plot(*line, style, marker=".", markersize=4, linewidth=1, label=row["name"])
        axes.errorbar(
            100 * test["in"]["mean"], 100 * test["out"]["mean"], xerr=spread[0], yerr=spread[1], fmt="k*",
            markersize=9, capsize=3, label="chosen, on test pictures", zorder=5,
        )  # fmt: skip
        axes.axvline(100 * record["margin"], color="grey", linewidth=0.8)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xlabel("change in domain, points of k-NN accuracy")
    near = 3 * abs(100 * record["margin"])
    both[1].set_xlim(-near, near / 2)
    both[1].set_ylim(-near / 2, near / 2)
    both[1].set_title("near the margin (vertical line)", fontsize=9)
    both[0].set_ylabel("change out of domain, points")
    figure.suptitle(f"WiSE-FT's lines from the pretrained encoder (0, 0), {record['world']} world, validation pictures")
    names = both[0].get_legend_handles_labels()
    figure.legend(*names, fontsize=8, ncols=4, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
