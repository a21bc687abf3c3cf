"""Labelled sets to judge an encoder by: generated and published ones by name, one's own by a description."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wlsup.batch import Domain, EvalSet, ImageSpec
from wlsup.data.decoders import decode
from wlsup.data.images import UnreadableImage
from wlsup.data.stores import ImageStore, check_path, clean_name, open_store
from wlsup.data.table import IMAGE_COLUMNS, resolve_prefix
from wlsup.data.tabular import Table, read_table
from wlsup.data.transforms import EvalTransform, normalize
from wlsup.errors import WlsupError, choose

__all__ = [
    "EvalSetSpec",
    "LabelledPictures",
    "build_eval_set",
    "check_eval_sets",
    "check_present",
    "eval_set_names",
    "locate_eval_set",
    "register_eval_set",
]

_TEST_NAMES = ("test", "val", "validation")


@dataclass
class EvalSetSpec:
    """A labelled set of one's own, or a published one with settings of one's own.

    Args:
        name: as tables and results.json show it.
        images: folder, tar or zip of the pictures; of a published set the folder it lies in, None to look under the
            data module's ``root``.
        kind: "imagefolder" for ``train/<class>/*.jpg`` and ``test/<class>/*.jpg`` (or ``val``) in ``images``; "table"
            for a file that names each picture's split and label; or a published set: "cifar10", "cifar100", "svhn",
            "eurosat", "dtd", "imagenet", and ImageNet's other test sets "imagenet_v2", "imagenet_a", "imagenet_r",
            "imagenet_sketch". None for the published set of that name if no labels are given, or else "table".
        labels: for "table": a CSV (TSV, JSON lines) with the columns file, split, label and, optionally, class.
        train: name of the split that becomes the bank.
        test: name of the split that becomes the queries; None for the first of test, val, validation that is there.
        domain: "in" or "out", relative to what the encoder was pretrained on; None for a published set's own (relative
            to ImageNet), or else "out".
        partition: of DTD, 1 to 10.
        bank: of ImageNet's other test sets, the folder of ImageNet, whose training pictures are their bank; None to
            look under the data module's ``root``.
        max_bad_fraction: highest tolerated fraction of pictures that the table lists and nobody has.
    """

    name: str
    images: str | None = None
    kind: (
        Literal[
            "imagefolder",
            "table",
            "cifar10",
            "cifar100",
            "svhn",
            "eurosat",
            "dtd",
            "imagenet",
            "imagenet_v2",
            "imagenet_a",
            "imagenet_r",
            "imagenet_sketch",
        ]
        | None
    ) = None
    labels: str | None = None
    train: str = "train"
    test: str | None = None
    domain: Domain | None = None
    max_bad_fraction: float = 0.05
    partition: int = 1
    bank: str | None = None


class LabelledPictures(Dataset):
    """Pictures with class ids.

    Item i is ``(picture, label)``: a normalised float (3, S, S) tensor and an int; or, of a picture that cannot be
    read, ``(zeros, label, "key: reason")``.

    Args:
        store: where the pictures lie.
        names: n, as the store knows them.
        labels: n class ids.
        spec: the encoder's `ImageSpec`.
    """

    def __init__(self, store: ImageStore, names: Sequence[str], labels: Sequence[int], spec: ImageSpec) -> None:
        self.store = store
        self.names = list(names)
        self.labels = list(labels)
        self.spec = spec
        self.transform = EvalTransform(spec)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | tuple[Tensor, int, str]:
        name, label = self.names[index], self.labels[index]
        try:
            picture = decode(self.store.read(name))
        except UnreadableImage as error:
            return torch.zeros(3, self.spec.size, self.spec.size), label, f"{name}: {error.reason}"
        return normalize(self.transform(picture), self.spec), label


_Builder = Callable[[str, ImageSpec], EvalSet]
_BUILDERS: dict[str, _Builder] = {}


def register_eval_set(name: str) -> Callable[[_Builder], _Builder]:
    """Register ``builder(name, spec) -> EvalSet`` under a name that recipes may use."""

    def add(builder: _Builder) -> _Builder:
        _BUILDERS[name] = builder
        return builder

    return add


def eval_set_names() -> list[str]:
    """Return the names `build_eval_set` knows: generated sets, then published ones."""
    # Imported on use: the generators are not needed by those who judge on their own files.
    from wlsup.data.mini import MINI_EVAL_SETS, mini_eval_set
    from wlsup.data.published import PUBLISHED

    for name in MINI_EVAL_SETS:
        _BUILDERS.setdefault(name, mini_eval_set)
    return [*_BUILDERS, *PUBLISHED]


def build_eval_set(entry: str | EvalSetSpec, spec: ImageSpec, root: str | None = None) -> EvalSet:
    """Build an evaluation set.

    Args:
        entry: one of `eval_set_names`, or a description of one's own set.
        spec: the encoder's `ImageSpec`.
        root: folder the published sets lie in; None for WLSUP_DATA, or ``data``.

    Raises:
        WlsupError: if the name is unknown, a file or column is missing, or labels do not make sense.
    """
    from wlsup.data.published import PUBLISHED, published_eval_set  # on use: it is built on this module

    kind = _kind(entry)
    if kind in PUBLISHED:
        entry = EvalSetSpec(entry) if isinstance(entry, str) else entry
        return published_eval_set(kind, entry, spec, root)
    return _own_set(kind, entry, spec) if isinstance(entry, EvalSetSpec) else _BUILDERS[kind](kind, spec)


def check_eval_sets(entries: Sequence[str | EvalSetSpec]) -> None:
    """Refuse names, kinds and domains that there are none of, and two sets of one name, without looking for files.

    Raises:
        WlsupError: with the valid ones.
    """
    names = Counter(entry.name if isinstance(entry, EvalSetSpec) else entry for entry in entries if _kind(entry))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise WlsupError(f"Two eval sets are called {twice[0]!r}, and results are kept by name. Rename one.")


def locate_eval_set(entry: str | EvalSetSpec, root: str | None = None) -> None:
    """Refuse a set that is not here, by whether its paths exist: quick, before anything is read.

    Args:
        entry: as `build_eval_set` takes it.
        root: likewise.

    Raises:
        WlsupError: naming what is missing and where it was looked for.
    """
    from wlsup.data.published import PUBLISHED, locate, locate_bank

    kind = _kind(entry)
    entry = EvalSetSpec(entry) if isinstance(entry, str) else entry
    if kind in PUBLISHED:
        locate(kind, entry, root)
        if PUBLISHED[kind].bank:
            locate_bank(kind, entry, root)
        return
    for option in ("images", "labels"):
        check_path(getattr(entry, option), f"{option} of eval set {entry.name!r}")


def _kind(entry: str | EvalSetSpec) -> str:
    """Return "imagefolder", "table", or the name of a known set; see `build_eval_set`."""
    from wlsup.data.published import PUBLISHED

    if isinstance(entry, EvalSetSpec):
        choose("domain", "out" if entry.domain is None else entry.domain, ("in", "out"))
        kind = entry.kind or ("table" if entry.labels or entry.name not in PUBLISHED else entry.name)
        return choose("kind of eval set", kind, ("imagefolder", "table", *PUBLISHED))
    return choose(
        "eval set",
        entry,
        eval_set_names(),
        "A set of your own stands in a recipe: data: {eval_sets: [{name, kind, images, labels, domain}]}.",
    )


def _own_set(kind: str, entry: EvalSetSpec, spec: ImageSpec) -> EvalSet:
    if entry.images is None:
        raise WlsupError(f"Eval set {entry.name!r} of kind {kind!r} needs images: the folder, tar or zip of pictures.")
    store = open_store(entry.images, f"images of eval set {entry.name!r}")
    rows, class_names = _from_folders(entry, store) if kind == "imagefolder" else _from_table(entry, store)
    test = _test_split(entry, {split for split, _, _ in rows})
    parts = {}
    for split in (entry.train, test):
        chosen = sorted((name, label) for part, name, label in rows if part == split)
        parts[split] = LabelledPictures(store, [name for name, _ in chosen], [label for _, label in chosen], spec)
    _check_classes(entry, parts[entry.train].labels, parts[test].labels, class_names)
    return EvalSet(entry.name, entry.domain or "out", parts[entry.train], parts[test], class_names)


def _test_split(entry: EvalSetSpec, found: set[str]) -> str:
    wanted = _TEST_NAMES if entry.test is None else (entry.test,)
    test = next((name for name in wanted if name in found), None)
    if entry.train not in found or test is None:
        missing = entry.train if entry.train not in found else " or ".join(wanted)
        there = ", ".join(sorted(found)) or "none"
        raise WlsupError(
            f"Eval set {entry.name!r} has no pictures in split {missing!r}. Found: {there}. "
            f"Set train and test to the names of its splits, or check images ({entry.images})."
        )
    return test


def _check_classes(entry: EvalSetSpec, train: list[int], test: list[int], class_names: Sequence[str]) -> None:
    unseen = sorted(set(test) - set(train))
    if unseen:
        raise WlsupError(
            f"Eval set {entry.name!r}: {len(unseen)} classes have test pictures and no training picture, such as "
            f"{class_names[unseen[0]]!r}, so that no neighbour can be right. Check the splits."
        )


def _from_folders(entry: EvalSetSpec, store: ImageStore) -> tuple[list[tuple[str, str, int]], list[str]]:
    """Read ``split/class/.../picture``; return rows of (split, name, label) and the class names."""
    names = store.names()
    marker = f"{entry.train}/"
    prefix = ""
    if not any(name.startswith(marker) for name in names):  # the splits may lie in one folder in an archive
        above = {name.partition(f"/{marker}")[0] for name in names if f"/{marker}" in name}
        prefix = f"{above.pop()}/" if len(above) == 1 else ""
    found = []
    for name in names:
        parts = name.removeprefix(prefix).split("/")
        if name.startswith(prefix) and len(parts) >= 3:
            found.append((parts[0], name, parts[1]))
    splits = {entry.train, *(_TEST_NAMES if entry.test is None else (entry.test,))}
    class_names = sorted({label for split, _, label in found if split in splits})
    ids = {label: position for position, label in enumerate(class_names)}
    return [(split, name, ids[label]) for split, name, label in found if split in splits], class_names


def _from_table(entry: EvalSetSpec, store: ImageStore) -> tuple[list[tuple[str, str, int]], list[str]]:
    """Read a table of file, split, label and class; return rows of (split, name, label) and the class names."""
    if entry.labels is None:
        raise WlsupError(
            f"Eval set {entry.name!r} is of kind 'table' and needs labels: a CSV with the columns file, split, label "
            "and, optionally, class. For folders named by class set kind to 'imagefolder'."
        )
    table = read_table(entry.labels)
    files = table.column("a column of file names", None, IMAGE_COLUMNS)
    splits = table.column("a column of splits", None, ("split", "partition", "subset"))
    labels = table.column("a column of labels", None, ("label", "class_id", "target", "class"))
    names = [name.casefold() for name in table.columns]
    classes = names.index("class") if "class" in names else labels
    rows = [
        (row.line, *(_text(row.values[column]) for column in (files, splits, labels, classes))) for row in table.rows
    ]
    ids, class_names = _class_ids(table, [(line, label, name) for line, _, _, label, name in rows])
    prefix = resolve_prefix(store, [clean_name(file) for _, file, *_ in rows])
    found = [(split, prefix + clean_name(file), ids[label]) for _, file, split, label, _ in rows]
    _check_files(entry, store, found, class_names)
    return found, class_names


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _class_ids(table: Table, rows: Sequence[tuple[int, str, str]]) -> tuple[dict[str, int], list[str]]:
    """Number the labels: integers in their own order, which keeps 0..C-1 as they are; names alphabetically."""
    named: dict[str, str] = {}
    for line, label, name in rows:
        if not label:
            raise WlsupError(f"{table.path}, line {line}: no label. Every row needs one; remove the row or label it.")
        if named.setdefault(label, name) != name:
            raise WlsupError(
                f"{table.path}, line {line}: label {label} is class {name!r} here and {named[label]!r} above. "
                "Each label must have one class name."
            )
    numeric = all(label.isdigit() for label in named)
    ordered = sorted(named, key=int) if numeric else sorted(named)
    return {label: position for position, label in enumerate(ordered)}, [named[label] for label in ordered]


def _check_files(
    entry: EvalSetSpec, store: ImageStore, rows: Sequence[tuple[str, str, int]], class_names: Sequence[str]
) -> None:
    """Look for the pictures of bank and queries, each by itself: those of the queries are few."""
    repeated = [name for name, count in Counter(name for _, name, _ in rows).items() if count > 1]
    if repeated:
        raise WlsupError(
            f"{entry.labels} lists {len(repeated)} pictures more than once, such as {repeated[0]!r}. Each picture may "
            "be in one split, with one label."
        )
    for split in {entry.train, _test_split(entry, {split for split, *_ in rows})}:
        mine = [(name, label) for of, name, label in rows if of == split]
        missing = check_present(entry, store, [name for name, _ in mine], f"Check images ({entry.images})")
        if lost := {label for _, label in mine} - {label for name, label in mine if name not in missing}:
            raise WlsupError(
                f"Eval set {entry.name!r}: of class {class_names[min(lost)]!r} no picture of split {split!r} is there. "
                f"Check images ({entry.images}), or take the class out of {entry.labels}."
            )


def check_present(entry: EvalSetSpec, store: ImageStore, names: Sequence[str], advice: str) -> dict[str, str]:
    """Refuse a set of whose pictures too many are not in ``store``; return those that are not, and why.

    Args:
        entry: says how many are too many.
        store: where they are to be.
        names: of pictures.
        advice: what to do about it.
    """
    missing = store.problems(names)
    if len(missing) > entry.max_bad_fraction * len(names):
        name, why = next(iter(missing.items()))
        raise WlsupError(
            f"Eval set {entry.name!r}: {len(missing)} of {len(names)} pictures cannot be had, such as {name!r} "
            f"({why}). {advice}, or raise max_bad_fraction ({entry.max_bad_fraction:g})."
        )
    return missing
