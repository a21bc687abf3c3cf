"""From pictures to features: one pass over a set with an encoder, in fp32, whatever cannot be read left out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from wlsup.errors import WlsupError
from wlsup.ranks import processes
from wlsup.waiting import END, PATIENCE, next_in_time

__all__ = ["Features", "extract_features", "merge_features", "shared_features"]


@dataclass
class Features:
    """An encoder's view of a labelled set.

    Args:
        features: (n, D) fp32 on the CPU, in the order of the data set.
        labels: (n,) int64 class ids, -1 for none.
        indices: (n,) int64 positions in the data set, ascending, each once.
        skipped: "position: reason" of the pictures that were left out because they could not be read.
    """

    features: Tensor
    labels: Tensor
    indices: Tensor
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)


def extract_features(
    extractor: Callable[[Tensor], Tensor],
    dataset: Dataset,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    sampler: Sampler | None = None,
    progress: Callable[[int, int], None] | None = None,
    patience: float = PATIENCE,
) -> Features:
    """Run ``extractor`` once over a data set.

    Nothing outside is disturbed: no gradients, no draw from torch's global random state (so that training goes on as
    if it had not been interrupted). Putting the model into eval mode is the caller's part.

    Args:
        extractor: (B, 3, H, W) on ``device`` -> (B, D); runs in fp32, with the caller's autocast switched off.
        dataset: item i is ``(picture, label)``, a float (3, H, W) tensor and an int; or ``(picture, label, reason)``,
            where a reason (a string, not None) says why the picture could not be read and leaves it out.
        batch_size: pictures a forward pass.
        num_workers: loader processes; 0 reads in this one.
        device: where ``extractor`` runs.
        normalize: scale each feature to unit length, as k-NN and retrieval want it; False keeps the lengths, for
            linear probes and spectra.
        sampler: which positions to visit, in which order; None for all. Positions visited more than once, as a padded
            `DistributedSampler` does, count once. See `merge_features` for putting the processes' parts together.
        progress: called with (pictures done, pictures to do) after each batch.
        patience: seconds to wait for one batch, 0 for ever.

    Returns:
        Features, ordered by position.

    Raises:
        WlsupError: if the set is empty, no picture could be read, none came in time, or items or features are not as
            above.
    """
    device = torch.device(device)
    size = len(dataset)
    todo = size if sampler is None else len(sampler)
    if not todo:
        raise WlsupError("The data set has no pictures to extract features from. Check its folder and split.")
    loader = DataLoader(
        _Indexed(dataset),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        timeout=patience if num_workers else 0,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # DataLoader draws a seed at every start: not from the training's random state
    )
    features: Tensor | None = None
    labels = torch.full((size,), -1, dtype=torch.int64)
    seen = torch.zeros(size, dtype=torch.bool)
    skipped: dict[int, str] = {}
    done = 0
    batches = iter(loader)
    try:
        while (batch := next_in_time(batches, num_workers, patience)) is not END:
            if isinstance(batch, WlsupError):
                raise batch
            indices, images, batch_labels, unreadable, visited = batch
            if images is not None:
                rows = _run(extractor, images, device, normalize)
                if features is None:
                    features = torch.empty(size, rows.shape[1])
                features[indices], labels[indices], seen[indices] = rows, batch_labels, True
            skipped.update(unreadable)
            done += visited
            if progress is not None:
                progress(done, todo)
    except BaseException:
        if num_workers:  # at once: workers that the garbage collector finds later may wait out a timeout each
            batches._shutdown_workers()
        raise
    reasons = [f"{index}: {reason}" for index, reason in sorted(skipped.items())]
    if features is None:
        raise WlsupError(f"None of the {todo} pictures could be read, starting with {reasons[0]}.")
    if not seen.all():
        features, labels = features[seen], labels[seen]
    return Features(features, labels, seen.nonzero().squeeze(1), reasons)


def shared_features(
    extractor: Callable[[Tensor], Tensor], dataset: Dataset, *, batch_size: int = 256, **options: Any
) -> Features:
    """Do as `extract_features` with the work shared over the processes, all of which call it and get all features.

    Each takes whole batches in turn, so that every picture stands in the batch in which one process would have it, none
    is seen twice, and the features are one process's to the bit.

    Args:
        extractor: see `extract_features`.
        dataset: likewise, the same one in every process.
        batch_size: likewise.
        options: likewise; no ``sampler``.

    Raises:
        WlsupError: as `extract_features`, in all processes when in one.
    """
    world, rank = processes()
    if world == 1:
        return extract_features(extractor, dataset, batch_size=batch_size, **options)
    starts = range(rank * batch_size, len(dataset), world * batch_size)
    mine = [index for start in starts for index in range(start, min(start + batch_size, len(dataset)))]
    own: Features | str | None = None
    try:
        if mine or not len(dataset):
            own = extract_features(extractor, dataset, batch_size=batch_size, sampler=mine or None, **options)
    except WlsupError as error:
        own = str(error)
    everyones: list[Features | str | None] = [None] * world
    dist.all_gather_object(everyones, own)
    for message in everyones:
        if isinstance(message, str):
            raise WlsupError(message)
    return merge_features([part for part in everyones if part is not None])


def merge_features(parts: Sequence[Features]) -> Features:
    """Put together what several processes extracted from one data set; positions seen by several count once.

    Args:
        parts: one `Features` a process, of the same width.

    Returns:
        Features, ordered by position.

    Raises:
        WlsupError: if there are no parts, or their widths differ.
    """
    widths = {part.features.shape[1] for part in parts}
    if len(widths) != 1:
        raise WlsupError(f"Features to merge must be of one width, not {sorted(widths)}.")
    size = 1 + max(int(part.indices.max()) if len(part) else -1 for part in parts)
    features, labels = torch.empty(size, widths.pop()), torch.full((size,), -1, dtype=torch.int64)
    seen = torch.zeros(size, dtype=torch.bool)
    for part in parts:
        features[part.indices], labels[part.indices], seen[part.indices] = part.features, part.labels, True
    if not seen.all():
        features, labels = features[seen], labels[seen]
    skipped = {reason for part in parts for reason in part.skipped}
    ordered = sorted(skipped, key=lambda reason: int(reason.partition(":")[0]))
    return Features(features, labels, seen.nonzero().squeeze(1), ordered)


class _Indexed(Dataset):
    """A data set whose items know their position; a user's mistake is an item too, for the main process to raise."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, int, str | None] | WlsupError:
        try:
            return index, *_parse(index, self.dataset[index])
        except WlsupError as error:
            return error


def _parse(index: int, item: Any) -> tuple[Tensor | None, int, str | None]:
    if not isinstance(item, (tuple, list)) or len(item) not in (2, 3):
        kind = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
        raise WlsupError(
            f"Item {index} of the data set must be (picture, label) or (picture, label, reason it is unreadable), "
            f"not a {kind}."
        )
    image, label, reason = (*item, None)[:3]
    if reason is not None:
        return None, -1, str(reason)
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise WlsupError(
            f"The picture of item {index} must be a normalised float tensor (3, H, W), not {kind}. "
            "Give the data set the encoder's evaluation transform."
        )
    try:
        return image, operator.index(label), None
    except TypeError:
        raise WlsupError(f"The label of item {index} must be an integer class id, not {label!r}.") from None


_Batch = tuple[Tensor, Tensor | None, Tensor, dict[int, str], int]


def _collate(items: list[tuple[int, Tensor | None, int, str | None] | WlsupError]) -> _Batch | WlsupError:
    for item in items:
        if isinstance(item, WlsupError):
            return item
    # A picture repeated in a batch would make the writes below race.
    read = {index: (image, label) for index, image, label, reason in items if reason is None}
    unreadable = {index: reason for index, _, _, reason in items if reason is not None}
    shapes = {tuple(image.shape) for image, _ in read.values()}
    if len(shapes) > 1:
        return WlsupError(
            f"Pictures of one set must be of one shape, not {', '.join(map(str, sorted(shapes)))}. "
            "Resize and crop them in the data set's transform."
        )
    images = torch.stack([image for image, _ in read.values()]).float() if read else None
    labels = torch.tensor([label for _, label in read.values()], dtype=torch.int64)
    return torch.tensor(list(read), dtype=torch.int64), images, labels, unreadable, len(items)


def _run(extractor: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, normalize: bool) -> Tensor:
    """Return the features (B, D) of a batch, fp32 on the CPU."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        rows = extractor(images.to(device, non_blocking=True))
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(images):
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise WlsupError(
                f"An extractor must return one feature a picture, of shape ({len(images)}, D), not {shape}."
            )
        rows = rows.float()
        return (torch.nn.functional.normalize(rows, dim=1) if normalize else rows).cpu()
