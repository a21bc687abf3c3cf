"""The no-regret study's runs: each trained once and scored once along WiSE-FT's line, and again if anything differs.

A run's folder holds a SHA-256 of its command line, what its recipes say, and the files of weights and captions; what
was scored holds that of the checkpoint. Nothing of another origin is used: it is made again, and said so.

Shapes: A alphas, n pictures.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import Subset

from wlsup.approaches import approach_class
from wlsup.batch import EvalSet
from wlsup.callbacks.checkpoints import STOPPED
from wlsup.cli.configuration import configure, load_run
from wlsup.data.mini_evalsets import mini_eval_set
from wlsup.errors import WlsupError
from wlsup.evaluation.features import Features
from wlsup.evaluation.scorers import KnnScorer
from wlsup.evaluation.validation import picture_keys, take, validation_split
from wlsup.evaluation.wise_ft_curve import features_along
from wlsup.files import write_text, written_whole

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared" / "data"
MINI = ROOT / "wlsup" / "assets" / "mini"
FOLDS = 5
MORE_TEST_PICTURES = 2000
"""Of each painted mini set: with 500 a change of half a point could not be told from none."""
QUIET = (
    "--data.eval_sets", "[]", "--trainer.limit_val_batches", "0", "--trainer.logger", "false",
    "--reconstructions.pictures", "0", "--captioning.pictures", "0", "--evaluation.metrics", "[]",
)  # fmt: skip
"""Nothing is evaluated or drawn while a run trains. Held-out pairs stay held out: without them others would train."""
_FIRST = 8

Scores = dict[str, dict[str, Any]]
"""By set: its "domain", and which pictures are "right" at each alpha, (A, n) bool."""


class Failed(WlsupError):  # noqa: N818 (as its use reads: except Failed)
    """A candidate could not be trained; the study goes on without it."""


@dataclass(frozen=True)
class Candidate:
    """An approach, and options of `wlsup fit` that hold it back."""

    approach: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For folders and tables."""
        pairs = zip(self.options[::2], self.options[1::2], strict=True)
        told = [f"{key.rpartition('.')[2]} {value}" for key, value in pairs]
        return ", ".join([self.approach, *told])


@dataclass(frozen=True)
class World:
    """What all runs of a study share.

    Args:
        name: "mini" or "real".
        folder: of the runs.
        options: of every `wlsup fit`.
        sets: as ``data.eval_sets``, to score on.
        captioned: names of sets of which some bank pictures are trained on.
        identity: SHA-256 of the files of the encoder, the text encoder and the captions, those that there are.
        more_test_pictures: of each painted mini set, beyond its 500.
    """

    name: str
    folder: Path
    options: tuple[str, ...]
    sets: tuple[Any, ...]
    captioned: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()
    more_test_pictures: int = 0


@dataclass(frozen=True)
class Run:
    """One candidate, trained with one seed."""

    candidate: Candidate
    seed: int
    world: World

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.candidate.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.world.folder / self.candidate.name.replace(", ", "-").replace(" ", "_") / f"seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """Of `wlsup fit`, but for the folder; later ones override earlier ones."""
        mine = [*_recipes(self.candidate.approach), *self.world.options, "--seed_everything", str(self.seed)]
        return [*mine, *QUIET, *self.candidate.options]

    @property
    def key(self) -> str:
        """SHA-256 of all that decides what is trained, but for the code."""
        return _key(self.arguments, self.world.identity)


def _recipes(approach: str) -> list[str]:
    return ["-c", str(HERE / "base.yaml"), "-c", str(HERE / f"{approach}.yaml")]


def _key(arguments: Sequence[str], identity: Sequence[str]) -> str:
    recipes = [value for option, value in zip(arguments, arguments[1:], strict=False) if option == "-c"]
    said = [yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) for recipe in recipes]  # comments change nothing
    told = [*arguments, json.dumps(said, sort_keys=True), *identity]
    text = "\0".join(told).replace(str(ROOT.parent), "..")  # the same wherever the checkout lies
    return hashlib.sha256(text.encode()).hexdigest()


def files_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's names and files.

    Raises:
        WlsupError: there is neither.
    """
    if not path.exists():
        raise WlsupError(f"No such file or folder: {path}.")
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()):
        digest.update(f"{file.relative_to(path)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def fit(run: Run) -> None:
    """Train one run, unless it is there and of the same making; go on with one that was broken off.

    Raises:
        Failed: it diverged.
        WlsupError: it was stopped or killed, or could not be made; that says nothing of the candidate.
    """
    folder, note = run.folder, run.folder / "key.txt"
    if folder.exists() and not (note.is_file() and note.read_text() == run.key):
        print(f"{run.name}: not known to be of these options, recipes, weights and captions; made again", flush=True)
        shutil.rmtree(folder)
    if (folder / "results.json").is_file() and (folder / "checkpoints" / "last.ckpt").is_file():
        return
    (folder / "results.json").unlink(missing_ok=True)
    write_text(note, run.key)
    command = [sys.executable, "-m", "wlsup", "fit", *run.arguments, "--run_dir", str(folder), "--resume", "auto"]
    for _ in range(2):  # once more if something killed it, such as the OOM killer
        with (folder / "output.log").open("w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode
        if code >= 0:
            break
    if code == 0 and (folder / "results.json").is_file():
        return
    last = " ".join((folder / "output.log").read_text(errors="replace").strip().splitlines()[-1:])
    if code == 2 and "not finite" in last:  # it diverged: that is the candidate's doing
        raise Failed(f"seed {run.seed}: {last}")
    told = "was stopped" if code in (STOPPED, 143) or code < 0 else "did not end well"
    raise WlsupError(f"{run.name} {told} (exit code {code}: {last}); the same call goes on with it.")


def folds(labels: Tensor, keys: Sequence[str]) -> Tensor:
    """Return (n,) the fold of each picture, by the hash of its key within its class."""
    order = sorted(range(len(keys)), key=lambda row: hashlib.sha256(f"no regret\0{keys[row]}".encode()).digest())
    fold, taken = torch.zeros(len(keys), dtype=torch.int64), {}
    for row in order:
        label = int(labels[row])
        fold[row] = taken.get(label, 0) % FOLDS
        taken[label] = taken.get(label, 0) + 1
    return fold


def bank_right(bank: Features, eval_set: EvalSet, whole: bool) -> Tensor:
    """Return which validation pictures are right, asking the rest of the bank.

    Args:
        bank: of one alpha.
        eval_set: whose bank it is.
        whole: every picture validates, fold by fold; False: a fifth of each class, whose captions nobody trained on.
    """
    scorer, classes = KnnScorer(), len(eval_set.class_names)
    keys = picture_keys(eval_set.train)
    keys = [keys[row] for row in bank.indices.tolist()]
    if not whole:
        split = validation_split(bank.labels, keys)
        return scorer(take(bank, split.bank), take(bank, split.validation), classes)
    right, fold = torch.zeros(len(keys), dtype=torch.bool), folds(bank.labels, keys)
    for number in range(FOLDS):
        mine, others = (fold == number).nonzero()[:, 0], (fold != number).nonzero()[:, 0]
        right[mine] = scorer(take(bank, others), take(bank, mine), classes)
    return right


@dataclass(frozen=True)
class Line:
    """A model, and the two ends of WiSE-FT's line through it; without ends the model as it is."""

    module: nn.Module
    start: Mapping[str, Tensor]
    end: Mapping[str, Tensor]
    held: tuple[str, ...] = ()

    def features(self, pictures: Any, alphas: Sequence[float]) -> dict[float, Features]:
        """Return unit features by alpha."""
        return dict(features_along(self.module, self.start, self.end, pictures, alphas, self.held))

    def right(self, eval_set: EvalSet, alphas: Sequence[float], part: str, whole: bool) -> Tensor:
        """Return (A, n) bool; of "validation" test pictures are not touched."""
        banks = self.features(eval_set.train, alphas)
        if part == "validation":
            return torch.stack([bank_right(banks[alpha], eval_set, whole) for alpha in alphas])
        queries, classes = self.features(eval_set.test, alphas), len(eval_set.class_names)
        return torch.stack([KnnScorer()(banks[alpha], queries[alpha], classes) for alpha in alphas])

    def first(self, eval_set: EvalSet) -> Tensor:
        """Return the features of the bank's first pictures at alpha 0."""
        few = Subset(eval_set.train, range(min(_FIRST, len(eval_set.train))))
        return self.features(few, (0.0,))[0.0].features


def pretrained(world: World) -> tuple[Any, Any]:
    """Return a model whose encoder is as it was before training, and its data module."""
    from wlsup.data.datamodule import CaptionDataModule

    arguments = [*_recipes("full"), *world.options]
    cli = configure(approach_class("full"), CaptionDataModule, arguments, "fit", build=False)
    return cli.model.eval(), cli.datamodule


def at_zero(world: World, part: str) -> Scores:
    """Return the scores of the pretrained encoder, alpha 0 of every line, computed once for all runs.

    Args:
        world: whose encoder and sets.
        part: "validation", pictures of the banks, or "test".

    Returns:
        (1, n) "right", and "first", features of a few pictures, by set.
    """
    path = world.folder / f"pretrained_{part}.pt"
    told = {"key": _key([*_recipes("full"), *world.options], world.identity), **_told(world, part)}
    if (found := _kept(path, told)) is not None:
        return found
    module, data = pretrained(world)
    line, results = Line(module, {}, {}), {}
    for eval_set in _eval_sets(module, data, world):
        right = line.right(eval_set, (0.0,), part, eval_set.name not in world.captioned)
        results[eval_set.name] = {"domain": eval_set.domain, "right": right, "first": line.first(eval_set)}
    _keep(path, told, results)
    return results


def scored(run: Run, alphas: Sequence[float], part: str) -> Scores:
    """Return a finished run's scores.

    Args:
        run: trained.
        alphas: the places, the pretrained encoder's 0 first.
        part: "validation", pictures of the banks, or "test".

    Raises:
        WlsupError: at alpha 0 the model is not the pretrained encoder.
    """
    world, zero = run.world, at_zero(run.world, part)
    path = run.folder / f"no_regret_{part}.pt"
    checkpoint = files_sha256(run.folder / "checkpoints" / "last.ckpt")
    told = {"checkpoint": checkpoint, "alphas": list(alphas), **_told(world, part)}
    if (found := _kept(path, told)) is not None:
        return found
    module, data = load_run(run.folder)
    module.start.check(module)
    state, start = module.state_dict(), module.start.tensors
    line = Line(module, start, {name: state[name].detach().clone() for name in start}, tuple(module.start.held))
    results: Scores = {}
    for eval_set in _eval_sets(module, data, world):
        mine = zero[eval_set.name]
        if not torch.allclose(line.first(eval_set), mine["first"], atol=1e-4):
            raise WlsupError(f"{run.name}: at alpha 0 it is not the pretrained encoder, so there is no line from it.")
        right = line.right(eval_set, alphas[1:], part, eval_set.name not in world.captioned)
        results[eval_set.name] = {"domain": eval_set.domain, "right": torch.cat([mine["right"], right])}
    _keep(path, told, results)
    return results


def _eval_sets(module: Any, data: Any, world: World) -> list[EvalSet]:
    if world.more_test_pictures:  # of the mini world
        painted = [name for name in world.sets if name != "mini_digits"]
        more = dict.fromkeys(painted, world.more_test_pictures)
        return [mini_eval_set(name, module.image_spec, more.get(name, 0)) for name in world.sets]
    data.image_spec, data.eval_sets = module.image_spec, list(world.sets)
    return data.eval_datasets()


def _told(world: World, part: str) -> dict[str, Any]:
    sets, protocol = [repr(one) for one in world.sets], KnnScorer().protocol
    more = {"more_test_pictures": world.more_test_pictures} if part == "test" else {}
    return more | {"part": part, "sets": sets, "captioned": list(world.captioned), "folds": FOLDS, "protocol": protocol}


def _kept(path: Path, told: Mapping[str, Any]) -> Scores | None:
    if not path.is_file():
        return None
    found = torch.load(path, weights_only=True)
    if found["told"] == told:
        return found["sets"]
    print(f"{path}: of another checkpoint, grid or sets; scored again", flush=True)
    return None


def _keep(path: Path, told: Mapping[str, Any], results: Scores) -> None:
    with written_whole(path) as file:
        torch.save({"told": dict(told), "sets": results}, file)


def outcome(run: Run, alphas: Sequence[float], part: str) -> Scores | str:
    """Train and score one run; return its scores, or why it failed.

    Raises:
        WlsupError: it was stopped or killed, or could not be made.
    """
    try:
        fit(run)
    except Failed as error:
        return str(error)
    try:
        return scored(run, alphas, part)
    except WlsupError as error:
        return f"seed {run.seed}, not scored: {error}"


def in_workers(runs: Sequence[Run], alphas: Sequence[float], part: str, workers: int = 1) -> list[Scores | str]:
    """Return `outcome` of each run, made by so many processes of one thread each."""
    if not runs:
        return []
    at_zero(runs[0].world, part)  # before the workers, who share it
    os.environ["OMP_NUM_THREADS"] = "1"
    found: list[Scores | str] = []
    broken: list[str] = []
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for number, (run, (reason, fault)) in enumerate(
            zip(runs, pool.map(partial(_reason, alphas=alphas, part=part), runs), strict=True), start=1
        ):
            broken += [fault] if fault else []
            found.append(fault or reason or scored(run, alphas, part))
            told = fault or (f"failed: {reason}" if reason else "done")
            print(f"{run.name}: {told} ({number} of {len(runs)})", flush=True)
    if broken:  # told when the others are done
        raise WlsupError(" ".join(broken))
    return found


def _reason(run: Run, alphas: Sequence[float], part: str) -> tuple[str | None, str | None]:
    """Return why the candidate failed, and what else went wrong; of neither the scores are in their file."""
    try:
        found = outcome(run, alphas, part)
    except WlsupError as error:
        return None, str(error)
    return found if isinstance(found, str) else None, None


def real_captions(folder: Path) -> list[str]:
    """Write Flickr8k's captions and DTD's training descriptions beside their pictures; return options that name them.

    Of DTD's training pictures a fifth, which validates, is left out, and all of its test pictures.

    Raises:
        WlsupError: ../shared/data is not there.
    """
    if not SHARED.is_dir():
        raise WlsupError(f"The real pictures are not here: {SHARED} is missing.")
    table, pictures = folder / "captions.csv", folder / "pictures"
    with (SHARED / "dtd10" / "labels.csv").open(encoding="utf-8") as file:
        train = [row for row in csv.DictReader(file) if row["split"] == "train"]
    split = validation_split(torch.tensor([int(row["label"]) for row in train]), [row["file"] for row in train])
    kept = {train[row]["file"].removeprefix("images/") for row in split.bank.tolist()}
    described = json.loads((SHARED / "dtd10" / "image_descriptions.json").read_text(encoding="utf-8"))
    captions = [
        (f"dtd/images/{one['image_name']}", text)
        for one in described
        if one["image_name"] in kept
        for text in one["descriptions"]
    ]
    with (SHARED / "flickr8k_1k" / "captions.txt").open(encoding="utf-8") as file:
        captions += [(f"flickr/{row['image']}", row["caption"]) for row in csv.DictReader(file)]
    if not table.is_file():  # written last: the pictures may have been broken off
        for name, tar in (("dtd", "dtd10/dtd10_128px.tar"), ("flickr", "flickr8k_1k/flickr8k_1k_160px.tar")):
            with tarfile.open(SHARED / tar) as archive:
                archive.extractall(pictures / name, filter="data")
    there = {str(path.relative_to(pictures)) for path in pictures.rglob("*.jpg")}
    places = {Path(name).name: name for name in there if name.startswith("flickr")}
    placed = [(name if name in there else places.get(Path(name).name), text) for name, text in captions]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("image", "caption"), *(row for row in placed if row[0] is not None)])
    if not table.is_file() or table.read_bytes() != text.getvalue().encode():
        write_text(table, text.getvalue())
    return ["--data.source", "table", "--data.captions", str(table), "--data.images", str(pictures)]


def make_world(name: str, folder: Path, encoder: str | None = None, text: str | None = None) -> World:
    """Return the world of a name.

    Args:
        name: "mini" or "real".
        folder: of the runs.
        encoder: folder of the real world's encoder.
        text: folder of the real world's text encoder.

    Raises:
        WlsupError: a folder is missing.
    """
    if name == "mini":
        sets = ("mini_shapes", "mini_digits", "mini_landcover", "mini_textures")
        identity = tuple(files_sha256(MINI / part) for part in ("vision", "text"))
        return World(name, folder, (), sets, (), identity, MORE_TEST_PICTURES)
    if not encoder or not text:
        raise WlsupError("--world real needs --encoder (experiments/pretrain_real.yaml makes it) and --text.")
    weights = [Path(encoder).absolute(), Path(text).absolute()]  # `wlsup fit` runs elsewhere
    identity = [files_sha256(path) for path in weights]
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-c", str(HERE / "overlays" / "flickr8k.yaml"), *real_captions(folder), "--data.pairs", "1300"]
    options += ["--model.encoder.weights", str(weights[0]), "--model.text.weights", str(weights[1])]
    options += ["--trainer.max_epochs", "15", "--data.replay", str(SHARED / "cifar10" / "cifar10_unlabelled_25k.tar")]
    from wlsup.data.evalsets import EvalSetSpec

    sets = [
        EvalSetSpec(name, f"{SHARED}/{name}/{tar}", "table", f"{SHARED}/{name}/labels.csv", domain=domain)
        for name, tar, domain in (("cifar10", "cifar10.tar", "in"), ("dtd10", "dtd10_128px.tar", "out"))
    ]
    identity.append(files_sha256(folder / "captions.csv"))
    return World(name, folder, tuple(options), (*sets, "mini_digits"), ("dtd10",), tuple(identity))
