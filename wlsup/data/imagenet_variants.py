"""ImageNet's other test sets (V2, A, R, Sketch): their own pictures against ImageNet's training pictures as bank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wlsup.data.evalsets import EvalSetSpec
from wlsup.data.imagenet import class_names_of, imagenet_wnids, is_wnid
from wlsup.data.published_folders import FolderRows, imagenet_base
from wlsup.data.stores import FolderStore
from wlsup.errors import WlsupError

__all__ = ["VARIANTS", "Variant", "read_variant"]


@dataclass(frozen=True)
class Variant:
    """Where a test set's class folders may lie, and how they are named.

    Args:
        places: below the set's folder, the published archive's own first.
        numbered: folders are named 0 to 999, ImageNet's classes in the order of their wnids; else by wnid.
    """

    places: tuple[str, ...]
    numbered: bool = False


VARIANTS: dict[str, Variant] = {
    "imagenet_v2": Variant(
        (
            "imagenetv2-matched-frequency-format-val",
            "imagenetv2-matched-frequency",
        ),
        numbered=True,
    ),
    "imagenet_a": Variant(("imagenet-a",)),
    "imagenet_r": Variant(("imagenet-r",)),
    "imagenet_sketch": Variant(("sketch", "ImageNet-Sketch/sketch")),
}
"""ImageNet-V2 (Recht et al. 2019), -A and -R (both Hendrycks et al. 2021), -Sketch (Wang et al. 2019)."""


def read_variant(kind: str, folder: Path, bank: Path, entry: EvalSetSpec) -> FolderRows:
    """Read a test set and, for its bank, ImageNet's training pictures *of its classes alone*.

    A and R have pictures of 200 classes. Their authors let a classifier choose among these 200, so neighbours are
    looked for among the training pictures of these, and labels are numbers among them. V2 and Sketch have all 1,000.

    Args:
        kind: one of `VARIANTS`.
        folder: has one of its ``places``.
        bank: ImageNet's folder, with ``train/<wnid>/``.
        entry: of the set, for messages.

    Raises:
        WlsupError: if there are no such folders, or the bank lacks a class.
    """
    variant = VARIANTS[kind]
    base = next(folder / place for place in variant.places if (folder / place).is_dir())
    store = FolderStore(base)
    found = [(name, label) for name in store.names() if (label := _wnid(name, variant)) is not None]
    if not found:
        example = "0/ to 999/" if variant.numbered else "n01440764/"
        raise WlsupError(f"{base} has no pictures in folders of eval set {entry.name!r}, such as {example}.")
    wnids = sorted({wnid for _, wnid in found})
    ids = {wnid: position for position, wnid in enumerate(wnids)}
    train = imagenet_base(bank) / "train"
    lacking = [wnid for wnid in wnids if not (train / wnid).is_dir()]
    if lacking:
        raise WlsupError(
            f"{train} lacks {len(lacking)} of the {len(wnids)} classes of eval set {entry.name!r}, such as "
            f"{lacking[0]}. Its bank is their training pictures: give the bank, ImageNet's folder."
        )
    # Class by class: of a bank of 1.3 million pictures only these folders are listed.
    names = [f"{wnid}/{name}" for wnid in wnids for name in FolderStore(train / wnid).names()]
    labels = [ids[name.partition("/")[0]] for name in names]
    try:
        class_names = [names_of[0] for names_of in class_names_of(wnids).values()]
    except WlsupError:  # classes outside WordNet's list: their folders' names will do
        class_names = wnids
    tests = ([name for name, _ in found], [ids[wnid] for _, wnid in found])
    return FolderRows(FolderStore(train), (names, labels), tests, class_names, store)


def _wnid(name: str, variant: Variant) -> str | None:
    """Return the class of a picture by its folder, None for what lies elsewhere, such as a README."""
    folder, slash, _ = name.partition("/")
    if not slash:
        return None
    if not variant.numbered:
        return folder if is_wnid(folder) else None
    wnids = imagenet_wnids()
    return wnids[int(folder)] if folder.isdigit() and int(folder) < len(wnids) else None
