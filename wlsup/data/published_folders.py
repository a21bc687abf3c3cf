"""The published sets that are folders of pictures: EuroSAT, DTD and ImageNet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from wlsup.data.evalsets import EvalSetSpec, check_present
from wlsup.data.imagenet import class_names_of, is_wnid
from wlsup.data.stores import FolderStore, ImageStore, clean_name, open_store
from wlsup.data.subset import hash_order
from wlsup.errors import WlsupError

__all__ = [
    "EUROSAT_COUNTS",
    "EUROSAT_PLACES",
    "FolderRows",
    "eurosat_test_numbers",
    "imagenet_base",
    "read_dtd",
    "read_eurosat",
    "read_imagenet",
]

_Part = tuple[list[str], list[int]]

EUROSAT_PLACES = ("2750", "EuroSAT_RGB", "eurosat/2750", "EuroSAT.zip", "EuroSAT_RGB.zip")
"""Where EuroSAT's class folders may lie: as published, in other distributions, or still packed."""

EUROSAT_COUNTS = {
    "AnnualCrop": 3000,
    "Forest": 3000,
    "HerbaceousVegetation": 3000,
    "Highway": 2500,
    "Industrial": 2500,
    "Pasture": 2000,
    "PermanentCrop": 2500,
    "Residential": 3000,
    "River": 2500,
    "SeaLake": 3000,
}
"""Pictures of each class of EuroSAT, named ``<class>_<1 to count>.jpg``."""


@dataclass(frozen=True)
class FolderRows:
    """A set of picture files.

    Args:
        store: where they lie.
        train: names, as the store knows them, and labels.
        test: likewise.
        class_names: one a class id.
        test_store: where the test pictures lie; None for ``store``.
    """

    store: ImageStore
    train: _Part
    test: _Part
    class_names: list[str]
    test_store: ImageStore | None = None


def eurosat_test_numbers() -> dict[str, list[int]]:
    """Return the test pictures of each EuroSAT class, by the rule that made the split file.

    EuroSAT (Helber et al. 2019) has no official split. Ours is stratified and hashed: of each class those fifth of
    all its published file names that come first by SHA-256. 21,600 pictures are left for training, 5,400 for test.
    """
    split = {}
    for name, count in EUROSAT_COUNTS.items():
        order = hash_order([f"{name}_{number}" for number in range(1, count + 1)], "wlsup eurosat test")
        split[name] = sorted(int(key.rpartition("_")[2]) for key in order[: count // 5])
    return split


def read_eurosat(folder: Path, entry: EvalSetSpec) -> FolderRows:
    """Read ``2750/<class>/<class>_<number>.jpg``, unpacked or in the published zip, split by the shipped file.

    Raises:
        WlsupError: if there are no such pictures.
    """
    store = open_store(next(folder / place for place in EUROSAT_PLACES if (folder / place).exists()))
    shipped = json.loads(files("wlsup").joinpath("assets/splits/eurosat.json").read_text())
    test = {f"{name}_{number}" for name, numbers in shipped["test"].items() for number in numbers}
    class_names = list(EUROSAT_COUNTS)
    parts: dict[bool, _Part] = {False: ([], []), True: ([], [])}
    for name in store.names():
        stem = name.rpartition("/")[2].rpartition(".")[0]
        label = stem.rpartition("_")[0]
        if label in EUROSAT_COUNTS and name.split("/")[-2:-1] == [label]:
            names, labels = parts[stem in test]
            names.append(name)
            labels.append(class_names.index(label))
    if not parts[False][0] or not parts[True][0]:
        raise WlsupError(
            f"{store.path} holds {len(parts[False][0])} training and {len(parts[True][0])} test pictures of EuroSAT, "
            "named <class>/<class>_<number>.jpg. Run `wlsup data fetch eurosat`."
        )
    return FolderRows(store, parts[False], parts[True], class_names)


def read_dtd(folder: Path, entry: EvalSetSpec) -> FolderRows:
    """Read DTD (Cimpoi et al. 2014): training and validation list of the partition as bank, test list as queries.

    Raises:
        WlsupError: if a list or too many of its pictures are missing, or the partition is none.
    """
    base = next(folder / place for place in ("dtd", ".", "dtd/dtd") if (folder / place / "labels").is_dir())
    if entry.partition not in range(1, 11):
        raise WlsupError(f"partition={entry.partition} of eval set {entry.name!r}: DTD has 1 to 10.")
    listed = {split: _dtd_list(base / "labels" / f"{split}{entry.partition}.txt") for split in ("train", "val", "test")}
    store = open_store(base / "images", f"images of eval set {entry.name!r}")
    bank, queries = listed["train"] + listed["val"], listed["test"]
    twice = set(bank) & set(queries)
    if twice or len(set(bank)) != len(bank):
        raise WlsupError(
            f"{base / 'labels'}: lists of partition {entry.partition} share pictures, such as "
            f"{min(twice) if twice else 'one in both train and val'!r}. Run `wlsup data fetch dtd` again."
        )
    class_names = sorted({name.partition("/")[0] for name in bank + queries})
    ids = {name: position for position, name in enumerate(class_names)}
    check_present(entry, store, bank + queries, "Fetch the set again")
    train, test = ((names, [ids[name.partition("/")[0]] for name in names]) for names in (bank, queries))
    return FolderRows(store, train, test, class_names)


def read_imagenet(folder: Path, entry: EvalSetSpec) -> FolderRows:
    """Read ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG``, or a flat ``val`` with Kaggle's LOC_val_solution.csv.

    Raises:
        WlsupError: if there are no class folders.
    """
    base = imagenet_base(folder)
    store = FolderStore(base)
    found: dict[str, list[tuple[str, str]]] = {}
    for split in ("train", "val"):
        names = [f"{split}/{name}" for name in FolderStore(base / split).names()]
        found[split] = [
            (name, name.split("/")[1]) for name in names if name.count("/") == 2 and is_wnid(name.split("/")[1])
        ]
        if split == "val" and not found[split]:
            solution = _val_solution(base, folder)
            found[split] = [(name, solution[stem]) for name in names if (stem := Path(name).stem) in solution]
        if not found[split]:
            raise WlsupError(
                f"{base / split} has no pictures in folders named by wnid, such as {split}/n01440764/*.JPEG. Sort them "
                "into one folder a class" + (", or put LOC_val_solution.csv beside it." if split == "val" else ".")
            )
    wnids = sorted({wnid for _, wnid in found["train"]})
    ids = {wnid: position for position, wnid in enumerate(wnids)}
    unseen = sorted({wnid for _, wnid in found["val"]} - set(wnids))
    if unseen:
        raise WlsupError(f"{base / 'val'} has {len(unseen)} classes that train has not, such as {unseen[0]}.")
    try:
        class_names = [names[0] for names in class_names_of(wnids).values()]
    except WlsupError:  # classes outside WordNet's list: their folders' names will do
        class_names = wnids
    train, test = (
        ([name for name, _ in found[split]], [ids[wnid] for _, wnid in found[split]]) for split in ("train", "val")
    )
    return FolderRows(store, train, test, class_names)


def imagenet_base(folder: Path) -> Path:
    """Return the folder that holds ImageNet's ``train``: itself, or where Kaggle puts it."""
    places = (".", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
    return next(folder / place for place in places if (folder / place / "train").is_dir())


def _dtd_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WlsupError(f"{path} cannot be read ({error}). Run `wlsup data fetch dtd`.") from None
    names = [clean_name(line) for line in lines if line.strip()]
    if not names or not all(name.count("/") == 1 for name in names):
        raise WlsupError(f"{path} is not a list of <class>/<picture> lines. Run `wlsup data fetch dtd` again.")
    return names


def _val_solution(*folders: Path) -> dict[str, str]:
    """Return the class of each validation picture, by Kaggle's file, where there is one."""
    for folder in folders:
        path = folder / "LOC_val_solution.csv"
        if path.is_file():
            rows = (line.split(",") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
            return {row[0]: row[1].split(" ")[0] for row in rows if len(row) == 2 and is_wnid(row[1].split(" ")[0])}
    return {}
