"""Map-style data sets that return whole batches, replace what cannot be read, and depend on no order or worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wlsup.batch import CaptionBatch, ImageBatch, ImageSpec
from wlsup.data.images import UnreadableImage
from wlsup.data.keyed import keyed_random
from wlsup.data.loader import Failure
from wlsup.data.sources import Pictures, open_at
from wlsup.data.transforms import EvalTransform, TrainTransform, normalize
from wlsup.errors import WlsupError

__all__ = ["CaptionDataset", "PictureDataset"]

_TRIES = 50


class PictureDataset(Dataset):
    """Pictures without captions.

    Items are asked for as (epoch, index), or as an index for epoch 0. In training a picture that cannot be read is
    replaced by another, chosen by (seed, epoch, key) and not in the batch already; in evaluation it is left out. Both
    are reported in ``skipped``.

    Args:
        keys: n stable names.
        pictures: n pictures.
        transform: for training or for evaluation.
        spec: gives mean and std.
        seed: of replacements and augmentation.
    """

    def __init__(
        self,
        keys: Sequence[str],
        pictures: Pictures,
        transform: TrainTransform | EvalTransform,
        spec: ImageSpec,
        seed: int = 0,
    ) -> None:
        self.keys = keys
        self.pictures = pictures
        self.transform = transform
        self.spec = spec
        self.seed = seed

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, item: int | tuple[int, int]) -> Any:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> Any:
        """Return one batch of the given items, or a `Failure`."""
        try:
            asked = [item if isinstance(item, tuple) else (0, item) for item in items]
            views, indices, skipped = self._read_batch(asked)
            size = self.spec.size
            images = normalize(views, self.spec) if views else torch.zeros(0, 3, size, size)
            return self._batch(images, indices, asked[0][0] if asked else 0, skipped)
        except WlsupError as error:
            return Failure(str(error))

    def _batch(self, images: Tensor, indices: list[int], epoch: int, skipped: list[str]) -> Any:
        """Make the batch out of what was read."""
        return ImageBatch(
            images=images,
            labels=torch.full((len(indices),), -1),
            indices=torch.tensor(indices, dtype=torch.int64),
            skipped=skipped,
            valid=torch.ones(len(indices), dtype=torch.bool),
        )

    def _read_batch(self, asked: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[int], list[str]]:
        """Return views (3, S, S) uint8, the index each shows, and "key: reason" of what could not be read."""
        views: dict[int, tuple[Tensor, int]] = {}  # position in the batch -> view and index shown
        bad: dict[int, str] = {}  # index -> reason
        for position, (epoch, index) in enumerate(asked):
            view = self._view(epoch, index, bad)
            if view is not None:
                views[position] = (view, index)
        if bad and isinstance(self.transform, TrainTransform):
            good = [index for _, index in views.values()]
            taken = {index for _, index in asked}
            for position, (epoch, index) in enumerate(asked):
                if position not in views:
                    views[position] = self._replace(epoch, index, taken, good, bad)
        ordered = [views[position] for position in sorted(views)]
        skipped = [f"{self.keys[index]}: {reason}" for index, reason in bad.items()]
        return [view for view, _ in ordered], [index for _, index in ordered], skipped

    def _view(self, epoch: int, index: int, bad: dict[int, str]) -> Tensor | None:
        """Read and transform one picture; note in ``bad`` why it cannot be."""
        try:
            if isinstance(self.transform, TrainTransform):
                stream = keyed_random(self.seed, epoch, self.keys[index], "crop")
                return self.transform(open_at(self.pictures, index), stream)
            return self.transform(self.pictures.read(index))
        except UnreadableImage as error:
            bad[index] = error.reason
            return None

    def _replace(
        self, epoch: int, index: int, taken: set[int], good: list[int], bad: dict[int, str]
    ) -> tuple[Tensor, int]:
        """Choose, by key, another picture for one that cannot be read; ``taken`` is extended by what was tried."""
        stream = keyed_random(self.seed, epoch, self.keys[index], "replacement")
        for _ in range(_TRIES):
            other = int(stream.random() * len(self.keys))
            if other in taken:
                continue
            taken.add(other)
            view = self._view(epoch, other, bad)
            if view is not None:
                return view, other
        if good:  # a set hardly larger than its batch: rather a picture twice than none
            other = good[int(stream.random() * len(good))]
            view = self._view(epoch, other, bad)
            if view is not None:
                return view, other
        raise WlsupError(
            f"No readable picture was found in place of {self.keys[index]!r} ({bad[index]}) in {_TRIES} tries, which "
            f"also failed on {', '.join(_quoted(self.keys[other] for other in bad if other != index)) or 'no other'}. "
            "Check the pictures: the whole source seems to be damaged or unreachable."
        )


class CaptionDataset(PictureDataset):
    """Captioned pictures: in training one caption is drawn by (seed, epoch, key); in evaluation it is the first.

    Args:
        keys: n stable names.
        captions: n lists of at least one caption.
        pictures: n pictures.
        transform: for training or for evaluation.
        spec: gives mean and std.
        seed: of captions, replacements and augmentation.
    """

    def __init__(
        self,
        keys: Sequence[str],
        captions: Sequence[Sequence[str]],
        pictures: Pictures,
        transform: TrainTransform | EvalTransform,
        spec: ImageSpec,
        seed: int = 0,
    ) -> None:
        super().__init__(keys, pictures, transform, spec, seed)
        self.captions = captions

    def _batch(self, images: Tensor, indices: list[int], epoch: int, skipped: list[str]) -> CaptionBatch:
        return CaptionBatch(
            images=images,
            captions=[self._caption(epoch, index) for index in indices],
            keys=[self.keys[index] for index in indices],
            skipped=skipped,
        )

    def _caption(self, epoch: int, index: int) -> str:
        captions = self.captions[index]
        if len(captions) == 1 or not isinstance(self.transform, TrainTransform):
            return captions[0]
        return captions[int(keyed_random(self.seed, epoch, self.keys[index], "caption").random() * len(captions))]


def _quoted(keys: Iterable[str]) -> list[str]:
    listed = [repr(key) for key in keys]
    return [*listed[:3], "..."] if len(listed) > 3 else listed
