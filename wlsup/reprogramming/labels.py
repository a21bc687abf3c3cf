"""Classes of captions, by the words in them: a labelling rule that a person can read and replace."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wlsup.errors import WlsupError

__all__ = ["MINI_GROUNDS", "WordLabels"]

MINI_GROUNDS: dict[str, list[str]] = {
    "sand": ["sand", "sandy", "desert"],
    "grass": ["grass", "lawn", "meadow"],
    "water": ["water", "blue waves", "sea", "pond"],
    "brick": ["brick", "bricks"],
    "snow": ["in the snow", "fresh snow", "snowy", "on snow"],
    "night": ["night", "starry", "dark sky"],
    "sky": ["cloudy sky", "clouds", "in the air"],
    "wood": ["wooden", "wood", "brown planks"],
    "tiles": ["tiled", "on tiles", "grey tiles", "floor tiles"],
    "gravel": ["gravel", "rough stones", "stony", "pebbles"],
}
"""Ten of the grounds that the mini captions name, by the words they use for them."""


class WordLabels:
    """A caption belongs to the class whose words it contains; with words of none or of several, to no class.

    Args:
        classes: name -> words or phrases, matched whole and whatever their case.

    Raises:
        WlsupError: fewer than two classes, a class without words, or words of two classes.
    """

    def __init__(self, classes: Mapping[str, Sequence[str]]) -> None:
        if len(classes) < 2:
            raise WlsupError(f"Captions need at least two classes, and there are {len(classes)}: {list(classes)}.")
        owner: dict[str, str] = {}
        for name, words in classes.items():
            if not words or isinstance(words, str):
                raise WlsupError(f"Class {name!r} needs a list of words that captions of it contain, not {words!r}.")
            for word in words:
                if owner.setdefault(word.casefold(), name) != name:
                    raise WlsupError(f"The word {word!r} stands for {owner[word.casefold()]!r} and {name!r}.")
        self.names = list(classes)
        self._patterns = [
            re.compile(rf"\b(?:{'|'.join(re.escape(word) for word in words)})\b", re.IGNORECASE)
            for words in classes.values()
        ]

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.names)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B,) int64 class ids, -1 for no class."""
        found = [[i for i, pattern in enumerate(self._patterns) if pattern.search(text)] for text in captions]
        return torch.tensor([classes[0] if len(classes) == 1 else -1 for classes in found])
