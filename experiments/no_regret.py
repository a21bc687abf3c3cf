"""Is there a setting that gains away from home and loses at most half a point there? docs/no-regret.md has the answers.

    python experiments/no_regret.py [--jobs 2]                                # over the mini sets
    python experiments/no_regret.py --world real --encoder DIR --text DIR     # over the pictures of ../shared/data

A setting is one of 16 candidates (an approach and what holds it back) at one of 7 places alpha > 0 on WiSE-FT's line
from the pretrained encoder, alpha 0, to the trained one, alpha 1. The rule, written before any run:

1. Each candidate is trained with seed 100 and scored along its line on **validation pictures only**: pictures of each
   set's bank, which ask the others of the bank.
2. A lower bound is the mean change from alpha 0 less one standard error over pictures. A setting keeps the margin if
   its lower bound is at least -0.5 points in domain and above 0 out of domain. Settings that keep it come first, the
   highest lower bound out of domain before the others; then those that do not, the least short first: short of -0.5 in
   domain or of 0 out of domain, whichever is more. Of equals the lowest alpha. A candidate ranks by its best setting.
3. The first six are trained with seed 101, too. The first of these, by the mean over both seeds, is the choice.
4. The choice is written to no_regret_<world>_choice.json, and a call that would choose otherwise is refused. Only then
   are test pictures read: of the chosen setting, trained with ten more seeds (200-209) that no choice has seen.
5. The answer is yes if two 95 % intervals, over those seeds and over seeds and pictures (Hillis 2007; over sets as if
   they were independent), begin at -0.5 points or more in domain and above 0 out of domain; "Yes on these pictures
   only" if the one over seeds alone does; no if the one over seeds ends below -0.5 in domain or not above 0 out of
   domain, or a confirming seed diverges; or else it is not shown. The painted mini sets have 2,500 test pictures each
   here, of which the first 500 are those of every other table.

WiSE-FT's own rule (`wlsup wise-ft`) chooses alpha on in-domain pictures alone; this study departs from it, for what it
asks about is the gain out of domain, of which validation pictures must speak too.

A candidate that diverges is told with its reason, and the study goes on without it; what else goes wrong ends the call
when the other runs are made, and the next call goes on. --candidates searches among some and
stops before the test. In the real world the candidates are the eight that the mini world's validation pictures ranked
best, or all where there is no choice of the mini world.

Not blind: the candidates were chosen knowing published figures (README) of their approaches on the same mini test sets.
The real encoder's mean pooling was chosen on test figures of CIFAR-10 and DTD, and FiLM's figures on both test sets are
published (README). The bounds of the choice are over pictures, at one or two fixed seeds: they know nothing of how
seeds differ, nor of how many settings there are to choose from. The seeds that confirm count.

Cost: 32 runs in the mini world, 24 in the real one, of one thread each. What is there and of the same making is not
made again. Writes experiments/results/no_regret_<world>.{json,md,png}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from no_regret_runs import Candidate, Run, Scores, World, in_workers, make_world
from no_regret_tables import draw, markdown, search_lines

from wlsup import errors
from wlsup.errors import WlsupError
from wlsup.evaluation.scorers import KnnScorer
from wlsup.evaluation.statistics import crossed_interval, mean_of_intervals, over_seeds, wilson
from wlsup.files import write_json, write_text

HERE = Path(__file__).parent
ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
SEARCH, CONFIRM = (100, 101), tuple(range(200, 210))
FINALISTS, OFFERED = 6, 8
MARGIN = -0.005
"""What may be lost in domain: half a point."""

LR, ENCODER_LR, EPOCHS = "--model.lr", "--model.encoder_lr", "--trainer.max_epochs"
DISTILL, REPLAY, L2SP = (f"--model.regularizer.{name}" for name in ("distill", "replay", "l2sp"))
CANDIDATES = (
    *(Candidate(name) for name in ("lst", "token_replay", "bottleneck", "film", "lora", "full", "mae_cl")),
    Candidate("lst", (LR, "1e-3")),
    *(Candidate(name, (LR, "1e-4")) for name in ("bottleneck", "film", "lora")),
    Candidate("full", (ENCODER_LR, "1e-5")),
    Candidate("film", (EPOCHS, "2")),
    Candidate("full", (L2SP, "1")),
    *(Candidate(name, (DISTILL, "10", REPLAY, "10")) for name in ("film", "full")),
)

Make = Callable[[Sequence[Run], Sequence[float], str], "list[Scores | str]"]
"""`no_regret_runs.in_workers`: what each run scores, or why it failed."""


class Place(NamedTuple):
    """The best setting of a candidate."""

    keeps: bool
    bound: float
    """The lower bound out of domain; where the margin is not kept, how far short the setting is, below 0."""
    place: int
    """Of its alpha."""

    @property
    def rank(self) -> tuple[bool, float, int]:
        """The highest is the best."""
        return self.keeps, self.bound, -self.place


def changes(runs: Sequence[Scores], domain: str, place: int) -> tuple[float, float]:
    """Return the mean change from alpha 0, and its standard error over pictures; means over seeds, then over sets.

    Args:
        runs: one a seed; the sets' pictures are the same ones.
        domain: "in" or "out".
        place: which alpha.
    """
    means, errors = [], []
    for name in (name for name, entry in runs[0].items() if entry["domain"] == domain):
        by_picture = _change(runs, name, place).mean(0)
        means.append(float(by_picture.mean()))
        errors.append(float(by_picture.std()) / math.sqrt(len(by_picture)))
    return statistics.fmean(means), math.sqrt(sum(error**2 for error in errors)) / len(errors)


def _change(runs: Sequence[Scores], name: str, place: int) -> torch.Tensor:
    """Return (S, m) by seed and picture: -1, 0 or 1."""
    return torch.stack([run[name]["right"][place].double() - run[name]["right"][0].double() for run in runs])


def best_place(runs: Sequence[Scores]) -> Place:
    """Return a candidate's best setting; the rule is in this file's text."""
    places = []
    for place in range(1, len(ALPHAS)):
        (inside, inside_error), (outside, outside_error) = (changes(runs, d, place) for d in ("in", "out"))
        low_in, low_out = inside - inside_error, outside - outside_error
        keeps = low_in >= MARGIN and low_out > 0
        places.append(Place(keeps, low_out if keeps else min(low_in - MARGIN, low_out), place))
    return max(places, key=lambda one: one.rank)


def ranked(curves: Mapping[str, Sequence[Scores]]) -> list[tuple[str, Place]]:
    """Return candidates with their best settings, the best first; of equals in the order given."""
    best = [(name, best_place(runs)) for name, runs in curves.items()]
    return sorted(best, key=lambda entry: entry[1].rank, reverse=True)


def choose(curves: Mapping[str, Sequence[Scores]]) -> tuple[str, int, bool]:
    """Return the candidate, the place of its alpha, and whether it keeps the margin on validation pictures."""
    name, best = ranked(curves)[0]
    return name, best.place, best.keeps


def search(
    candidates: Sequence[Candidate], world: World, make: Make
) -> tuple[dict[str, list[Scores]], list[str], dict[str, str]]:
    """Train and score the candidates with the first seed, and the best of them with the second.

    Args:
        candidates: to search among.
        world: of the runs.
        make: trains and scores.

    Returns:
        By name the validation scores of each seed; the names, the best first, those of both seeds ahead; by name why
        candidates failed.

    Raises:
        WlsupError: none is left.
    """
    curves: dict[str, list[Scores]] = {}
    failed: dict[str, str] = {}
    entrants = list(candidates)
    for seed in SEARCH:
        found = make([Run(one, seed, world) for one in entrants], ALPHAS, "validation")
        for one, scores in zip(entrants, found, strict=True):
            if isinstance(scores, str):
                failed[one.name] = scores
                curves.pop(one.name, None)
            else:
                curves.setdefault(one.name, []).append(scores)
        best = [name for name, _ in ranked(curves)][:FINALISTS]
        entrants = [one for one in candidates if one.name in best]
    last = {name: runs for name, runs in curves.items() if len(runs) == len(SEARCH)}
    if not last:
        raise WlsupError(f"No candidate is left to choose: {'; '.join(f'{one}: {why}' for one, why in failed.items())}")
    others = {name: runs for name, runs in curves.items() if name not in last}
    return curves, [name for group in (last, others) for name, _ in ranked(group)], failed


def search_sha256(candidates: Sequence[Candidate], world: World) -> str:
    """Return what tells searches apart: candidates, seeds, options, recipes, weights, captions and the rule."""
    keys = sorted(Run(one, seed, world).key for one in candidates for seed in SEARCH)
    rule = [ALPHAS, FINALISTS, MARGIN, KnnScorer().protocol]
    return hashlib.sha256(json.dumps([keys, rule]).encode()).hexdigest()


def freeze(path: Path, choice: Mapping[str, Any]) -> None:
    """Write the choice, once: before any test picture is read.

    Raises:
        WlsupError: another choice has been written.
    """
    if not path.is_file():
        write_json(path, choice)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    fixed = ("search", "candidate", "options", "alpha", "confirm_seeds")
    if other := [name for name in fixed if before.get(name) != choice[name]]:
        raise WlsupError(
            f"{path} holds the choice that was made before test pictures were read, {before.get('candidate')} at alpha "
            f"{before.get('alpha')}, and this call's has another {', '.join(other)}: call with what made it, or move "
            "it and its results away to begin another study."
        )


def confirmed(runs: Sequence[Scores]) -> dict[str, Any]:
    """Return the changes on test pictures, by domain and by set; of alphas (0, a).

    Returns:
        Each with mean and "ci95" over seeds, on these pictures, and "crossed_ci95" for other seeds and other pictures;
        of sets the pretrained accuracy with Wilson's interval.
    """
    found: dict[str, Any] = {"sets": {}}
    crossed = {name: crossed_interval(_change(runs, name, 1)) for name in runs[0]}
    for name, entry in runs[0].items():
        right, test = int(entry["right"][0].sum()), entry["right"].shape[1]
        share, low, high = wilson(right, test)
        found["sets"][name] = {
            "domain": entry["domain"],
            "test": test,
            "pretrained": share,
            "pretrained_ci95": [low, high],
            **over_seeds(_change(runs, name, 1).mean(1).tolist()),
            "crossed_ci95": list(crossed[name][1:]),
        }
    for domain in ("in", "out"):
        names = [name for name, entry in runs[0].items() if entry["domain"] == domain]
        by_seed = [statistics.fmean(found["sets"][name]["values"][seed] for name in names) for seed in range(len(runs))]
        both = mean_of_intervals([crossed[name] for name in names])
        found[domain] = over_seeds(by_seed) | {"crossed_ci95": list(both[1:])}
    return found


def verdict(test: Mapping[str, Any]) -> str:
    """Return "Yes", "Yes on these pictures only", "No" or "Not shown"."""
    inside, outside = test["in"]["ci95"], test["out"]["ci95"]
    if inside[0] >= MARGIN and outside[0] > 0:
        others = test["in"]["crossed_ci95"][0] >= MARGIN and test["out"]["crossed_ci95"][0] > 0
        return "Yes" if others else "Yes on these pictures only"
    return "No" if inside[1] < MARGIN or outside[1] <= 0 else "Not shown"


def offered(world: str, asked: Sequence[str] | None, out: Path) -> tuple[list[Candidate], str]:
    """Return the candidates of a call, and which they are.

    Raises:
        WlsupError: an unknown name.
    """
    named = {one.name: one for one in CANDIDATES}
    if asked:
        return [named[errors.choose("candidate", name, named)] for name in dict.fromkeys(asked)], "asked for"
    ranking = out / "no_regret_mini_choice.json"
    if world == "mini":
        return list(CANDIDATES), "all"
    if not ranking.is_file():
        return list(CANDIDATES), "all: there is no choice of the mini world"
    best = json.loads(ranking.read_text(encoding="utf-8"))["ranking"]
    kept = [named[name] for name in best if name in named][:OFFERED]
    return kept, f"the {len(kept)} that the mini world's validation pictures ranked best"


def summary(curves: Mapping[str, Sequence[Scores]], order: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each candidate, in the order of names: its best setting, and [change, error] along its line."""
    rows = []
    for name in order:
        runs, best = curves[name], best_place(curves[name])
        lines = {domain: [list(changes(runs, domain, at)) for at in range(len(ALPHAS))] for domain in ("in", "out")}
        rows.append({"name": name, "seeds": len(runs), "alpha": ALPHAS[best.place], "keeps_margin": best.keeps} | lines)
    return rows


def without_folders(arguments: Sequence[str]) -> list[str]:
    """Return a command's words with DIR for folders of weights, which are a machine's; the record has their hashes."""
    shown, folder = [], False
    for word in arguments:
        option, equals, _ = word.partition("=")
        named = option in ("--encoder", "--text")
        shown.append("DIR" if folder else f"{option}=DIR" if named and equals else word)
        folder = named and not equals
    return shown


def study(options: argparse.Namespace, make: Make) -> None:
    """Search, choose, confirm, write.

    Raises:
        WlsupError: a wrong option, nothing left to choose, or another choice than one made before.
    """
    if options.confirm < 5:
        raise WlsupError(f"--confirm {options.confirm}: five seeds at least.")
    out = options.out.absolute()
    candidates, told = offered(options.world, options.candidates, out)
    world = make_world(options.world, out / "runs" / f"no_regret_{options.world}", options.encoder, options.text)
    curves, order, failed = search(candidates, world, make)
    record: dict[str, Any] = {
        "command": shlex.join(["python", "experiments/no_regret.py", *without_folders(options.command)]),
        "world": options.world,
        "sha256": dict(zip(("encoder", "text", "captions"), world.identity, strict=False)),  # mini has no table
        "offered": told,
        "protocol": KnnScorer().protocol,
        "alphas": list(ALPHAS),
        "margin": MARGIN,
        "search_seeds": list(SEARCH),
        "candidates": summary(curves, order),
        "failed": failed,
    }
    if options.candidates:
        print("\n".join(search_lines(record)))
        return
    name, place, keeps = choose({name: curves[name] for name in order if len(curves[name]) == len(SEARCH)})
    winner = next(one for one in candidates if one.name == name)
    seeds = list(range(CONFIRM[0], CONFIRM[0] + options.confirm))
    choice = {
        "search": search_sha256(candidates, world),
        "candidate": name,
        "options": list(winner.options),
        "alpha": ALPHAS[place],
        "keeps_margin": keeps,
        "confirm_seeds": seeds,
        "ranking": order,
        "failed": failed,
        "command": record["command"],
    }
    stem = out / f"no_regret_{options.world}"
    freeze(out / f"{stem.name}_choice.json", choice)
    write_json(out / f"{stem.name}_search.json", record)  # what was found until here, whatever becomes of the test
    tested = make([Run(winner, seed, world) for seed in seeds], (0.0, ALPHAS[place]), "test")
    broken = [found for found in tested if isinstance(found, str)]
    whole = [found for found in tested if not isinstance(found, str)]
    if len(whole) < 2:
        raise WlsupError(f"The chosen setting, {name}, cannot be confirmed with {seeds}: {'; '.join(broken)}")
    record |= {"chosen": choice, "confirm_seeds": seeds, "test": confirmed(whole), "unconfirmed": broken}
    record["answer"] = "No" if broken else verdict(record["test"])
    write_json(stem.with_suffix(".json"), record)
    write_text(stem.with_suffix(".md"), markdown(record))
    draw(record, stem.with_suffix(".png"))
    print(markdown(record))


def main(arguments: Sequence[str] | None = None, make: Make | None = None) -> int:
    """Run the study; return 0, or 2 with one sentence where it cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=["mini", "real"], default="mini")
    parser.add_argument("--encoder", help="folder of the real world's encoder")
    parser.add_argument("--text", help="folder of the real world's text encoder")
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="search among these, as the table has them")
    parser.add_argument("--confirm", type=int, default=len(CONFIRM), help="seeds of the test, 200 and on")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    options.command = arguments
    try:
        study(options, make or partial(in_workers, workers=options.jobs))
    except WlsupError as error:
        print(f"no_regret: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
