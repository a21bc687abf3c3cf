"""Labelled pictures to learn a program from, drawn at random or gone through in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wlsup.batch import EvalSet
from wlsup.draws import per_sample
from wlsup.errors import WlsupError
from wlsup.reprogramming.classifier import FrozenClassifier

__all__ = ["LabelledPart", "eval_set_of", "fit_classifier", "paired_points", "split_train"]

_TRIES = 20


class LabelledPart:
    """Some positions of a labelled set, read when asked for.

    Args:
        dataset: item i is (picture, label), or (picture, label, reason) with a reason why it cannot be read.
        positions: which items.
    """

    def __init__(self, dataset: Dataset, positions: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.positions = list(range(len(dataset)) if positions is None else positions)

    def __len__(self) -> int:
        return len(self.positions)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return ``count`` pictures and labels, drawn with replacement by torch's random state: (B, 3, H, W), (B,).

        Raises:
            WlsupError: next to nothing of the set can be read.
        """
        items: list[tuple[Tensor, int]] = []
        for _ in range(_TRIES):
            chosen = per_sample(self._choose, count - len(items)).tolist()
            items += self._read([self.positions[index] for index in chosen])
            if len(items) == count:
                return _stack(items)
        raise WlsupError("Too few pictures of the labelled set can be read. `wlsup data check` says which and why.")

    def _choose(self, count: int, stream: torch.Generator | None) -> Tensor:
        return torch.randint(len(self), (count,), generator=stream)

    def batches(self, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all that can be read, in order."""
        for start in range(0, len(self), size):
            items = self._read(self.positions[start : start + size])
            if items:
                yield _stack(items)

    def right(self, predict: Callable[[Tensor], Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """Classify all that can be read.

        Args:
            predict: (B, 3, H, W) -> (B, classes) logits.
            device: where it runs.

        Returns:
            Which answers were right, (n,) bool, and the labels, (n,).
        """
        answers, truths = [], []
        for images, labels in self.batches():
            answers.append(predict(images.to(device)).argmax(-1).cpu() == labels)
            truths.append(labels)
        return torch.cat(answers), torch.cat(truths)

    def _read(self, positions: Sequence[int]) -> list[tuple[Tensor, int]]:
        items = (self.dataset[position] for position in positions)
        return [(item[0], int(item[1])) for item in items if len(item) < 3 or item[2] is None]


def split_train(dataset: Dataset, held_out: float = 0.2) -> tuple[LabelledPart, LabelledPart]:
    """Split a training set in two by position, the same everywhere: to learn from, and to choose by.

    Args:
        dataset: the training split; the test split has no part in it.
        held_out: share of it to choose by, in (0, 1).

    Raises:
        WlsupError: too few pictures.
    """
    size = len(dataset)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    held = round(held_out * size)
    if held < 1 or held >= size:
        raise WlsupError(f"A training set of {size} pictures cannot be split: {held_out:g} of it are to be held out.")
    return LabelledPart(dataset, sorted(order[held:])), LabelledPart(dataset, sorted(order[:held]))


def eval_set_of(datamodule: Any, name: str, classes: int, option: str) -> EvalSet:
    """Return one of a data module's eval sets.

    Args:
        datamodule: of the run.
        name: of the set.
        classes: how many it must have.
        option: that said so, for the message.

    Raises:
        WlsupError: the set is not among them, or has another number of classes.
    """
    sets = {eval_set.name: eval_set for eval_set in datamodule.eval_datasets()}
    if name not in sets:
        raise WlsupError(
            f"The labelled set {name!r} is not among the run's eval sets ({', '.join(sets) or 'none'}). Add it to "
            "data.eval_sets, or choose one of these."
        )
    found = len(sets[name].class_names)
    if found != classes:
        raise WlsupError(f"{name} has {found} classes; {option} says {classes}. Set {option} to {found}.")
    return sets[name]


@torch.no_grad()
def fit_classifier(classifier: FrozenClassifier, source: EvalSet, most: int, device: torch.device) -> FrozenClassifier:
    """Fit a frozen classifier's head on a set's training split.

    Args:
        classifier: on ``device``, its encoder in eval mode.
        source: what it is to tell apart.
        most: use at most so many pictures, chosen the same everywhere.
        device: where it runs.
    """
    size = len(source.train)
    positions = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:most].sort().values.tolist()
    features, truths = [], []
    for images, labels in LabelledPart(source.train, positions).batches():
        features.append(classifier.encoder.features(images.to(device)))
        truths.append(labels.to(device))
    return classifier.fit(torch.cat(features), torch.cat(truths), len(source.class_names))


def paired_points(ours: Tensor, theirs: Tensor) -> str:
    """Return the difference of two accuracies on the same samples in points, with its 95 % interval, in words.

    Args:
        ours: (n,) bool, which answers were right.
        theirs: likewise.
    """
    difference = 100 * (ours.double() - theirs.double())
    mean, half = float(difference.mean()), 1.96 * float(difference.std()) / len(difference) ** 0.5
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}] points (95 % interval, paired, normal approximation)"


def _stack(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
