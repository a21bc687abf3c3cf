"""The published evaluation sets, read from their native files: where they are looked for, and what they are.

torchvision reads the same files (and the tests hold these readers against it); its classes are not used here because
CIFAR's unpickles, which runs whatever code a file holds, and none says which picture of a folder cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from wlsup.batch import Domain, EvalSet, ImageSpec
from wlsup.data.cifar import CIFAR10, CIFAR100, read_cifar
from wlsup.data.evalsets import EvalSetSpec, LabelledPictures
from wlsup.data.imagenet_variants import VARIANTS, read_variant
from wlsup.data.locate import data_root
from wlsup.data.published_folders import EUROSAT_PLACES, FolderRows, read_dtd, read_eurosat, read_imagenet
from wlsup.data.svhn import read_svhn
from wlsup.data.transforms import EvalTransform, normalize
from wlsup.errors import WlsupError

__all__ = ["PUBLISHED", "ArrayRows", "LabelledArray", "PublishedSet", "locate", "locate_bank", "published_eval_set"]


@dataclass(frozen=True)
class ArrayRows:
    """A set held in memory.

    Args:
        train: (n, 3, H, W) uint8 and (n,) int64 labels.
        test: likewise.
        class_names: one a class id.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    class_names: Sequence[str]


class LabelledArray(Dataset):
    """Pictures held in memory, with class ids; item i is a normalised float (3, S, S) tensor and an int.

    Args:
        pictures: (n, 3, H, W) uint8.
        labels: (n,) int64.
        spec: the encoder's `ImageSpec`.
    """

    def __init__(self, pictures: Tensor, labels: Tensor, spec: ImageSpec) -> None:
        self.pictures = pictures
        self.labels = labels.tolist()
        self.spec = spec
        self.transform = EvalTransform(spec)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normalize(self.transform(self.pictures[index]), self.spec), self.labels[index]


@dataclass(frozen=True)
class PublishedSet:
    """What there is to know about a published set.

    Args:
        domain: relative to pretraining on ImageNet.
        needs: a path each of whose variants (a tuple) would do, below the set's folder; all are needed.
        read: (folder, entry) -> its pictures and labels; of a set with a ``bank`` (folder, bank's folder, entry).
        bank: another published set, whose training pictures are this one's bank; "" for a set with its own.
    """

    domain: Domain
    needs: tuple[tuple[str, ...], ...]
    read: Callable[..., ArrayRows | FolderRows]
    bank: str = ""


DIGITS = tuple("0123456789")

PUBLISHED: dict[str, PublishedSet] = {
    "cifar10": PublishedSet(
        "in",
        tuple((f"{CIFAR10.folder}/{name}",) for name in CIFAR10.files),
        lambda folder, _: ArrayRows(*read_cifar(folder, CIFAR10)),
    ),
    "cifar100": PublishedSet(
        "in",
        tuple((f"{CIFAR100.folder}/{name}",) for name in CIFAR100.files),
        lambda folder, _: ArrayRows(*read_cifar(folder, CIFAR100)),
    ),
    "svhn": PublishedSet(
        "out",
        (("train_32x32.mat",), ("test_32x32.mat",)),
        lambda folder, _: ArrayRows(
            read_svhn(folder / "train_32x32.mat"), read_svhn(folder / "test_32x32.mat"), DIGITS
        ),
    ),
    "eurosat": PublishedSet("out", (EUROSAT_PLACES,), read_eurosat),
    "dtd": PublishedSet("out", (("dtd/labels", "labels", "dtd/dtd/labels"),), read_dtd),
    "imagenet": PublishedSet(
        "in",
        (
            ("train", "Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/train"),
            ("val", "Data/CLS-LOC/val", "ILSVRC/Data/CLS-LOC/val"),
        ),
        read_imagenet,
    ),
    **{
        # Their pictures are not as ImageNet's are: V2's nearly so, the others' far away.
        kind: PublishedSet(
            "in" if kind == "imagenet_v2" else "out", (variant.places,), partial(read_variant, kind), bank="imagenet"
        )
        for kind, variant in VARIANTS.items()
    },
}


def published_eval_set(kind: str, entry: EvalSetSpec, spec: ImageSpec, root: str | None = None) -> EvalSet:
    """Build a published set.

    Args:
        kind: one of `PUBLISHED`.
        entry: gives name and domain, and may give ``images``, the folder it lies in.
        spec: the encoder's `ImageSpec`.
        root: folder of all sets; None for WLSUP_DATA, or ``data``.

    Raises:
        WlsupError: saying which files are missing and where they were looked for, or what is wrong with them.
    """
    published = PUBLISHED[kind]
    folder = locate(kind, entry, root)
    rows = published.read(folder, *([locate_bank(kind, entry, root)] if published.bank else []), entry)
    if isinstance(rows, ArrayRows):
        train, test = LabelledArray(*rows.train, spec), LabelledArray(*rows.test, spec)
    else:
        train = LabelledPictures(rows.store, *rows.train, spec)
        test = LabelledPictures(rows.store if rows.test_store is None else rows.test_store, *rows.test, spec)
    if not len(train) or not len(test):
        raise WlsupError(f"Eval set {entry.name!r} has {len(train)} training and {len(test)} test pictures.")
    return EvalSet(entry.name, entry.domain or published.domain, train, test, list(rows.class_names))


def locate_bank(kind: str, entry: EvalSetSpec, root: str | None = None) -> Path:
    """Return the folder of the set whose training pictures are this one's bank; arguments as `published_eval_set`.

    Raises:
        WlsupError: saying that it is the bank that is missing, and where it was looked for.
    """
    bank = PUBLISHED[kind].bank
    base = data_root(root)
    candidates = [Path(entry.bank).expanduser()] if entry.bank is not None else [base / bank, base]
    places = PUBLISHED[bank].needs[0]  # its training pictures: of its test pictures there is no need
    for folder in candidates:
        if any((folder / place).is_dir() for place in places):
            return folder
    raise WlsupError(
        f"Eval set {entry.name!r} needs the training pictures of {bank} for its bank: {' or '.join(places)} missing. "
        f"Looked in {' and '.join(map(str, candidates))}. Run `wlsup data fetch {bank}` to see how to get it, or give "
        f"{{name: {entry.name}, bank: DIR}}."
    )


def locate(kind: str, entry: EvalSetSpec, root: str | None = None) -> Path:
    """Return the folder that has all that a published set needs; arguments as `published_eval_set`.

    Raises:
        WlsupError: saying which files are missing and where they were looked for.
    """
    published, base = PUBLISHED[kind], data_root(root)
    candidates = [Path(entry.images).expanduser()] if entry.images is not None else [base / kind, base]
    lacking = {}
    for folder in candidates:
        lacking[folder] = [
            " or ".join(paths) for paths in published.needs if not any((folder / path).exists() for path in paths)
        ]
        if not lacking[folder]:
            return folder
    nearest = min(candidates, key=lambda folder: len(lacking[folder]))
    missing = lacking[nearest]
    listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    raise WlsupError(
        f"Eval set {entry.name!r} is not here: {listed} missing. Looked in {' and '.join(map(str, candidates))}"
        f"{'' if base.is_absolute() else f' (from {Path.cwd()})'}. Run `wlsup data fetch {kind}`, or set data.root or "
        "the environment variable WLSUP_DATA to the folder that has it."
    )
