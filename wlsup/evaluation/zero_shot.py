"""Zero-shot classification: a class is what its name, put into sentences, looks like in the shared space.

Shapes: C classes, T templates, m queries, E channels of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.evaluation.statistics import wilson

__all__ = ["PROTOCOL", "Prompts", "class_embeddings", "read_prompts", "zero_shot"]

PROTOCOL = "zero-shot:v1 CLIP: class names in the set's templates, mean of unit text embeddings, cosine"
"""The id kept beside zero-shot numbers."""


@dataclass(frozen=True)
class Prompts:
    """How a set's classes are put into words.

    Args:
        templates: sentences with ``{}`` in the class's place.
        names: words for classes whose names are none.
        source: the file's name.
    """

    templates: tuple[str, ...]
    names: dict[str, str]
    source: str

    def of(self, class_name: str) -> list[str]:
        """Return the T sentences of a class; underscores in a name are read as spaces."""
        words = self.names.get(class_name, class_name.replace("_", " "))
        return [template.replace("{}", words) for template in self.templates]


def read_prompts(eval_set: str, path: Path | None = None) -> Prompts:
    """Return a set's prompts: of a file, else the package's own for that set, else its default ones.

    Args:
        eval_set: the set's name.
        path: lines with ``{}`` are templates, lines ``class = words`` name classes, lines with # are comments.

    Raises:
        WlsupError: if the file cannot be read or holds no template.
    """
    if path is not None:
        try:
            text, source = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise WlsupError(f"Templates {path} cannot be read ({error}). Give a text file.") from error
    else:
        folder = files("wlsup").joinpath("assets/templates")
        own = folder.joinpath(f"{eval_set}.txt")
        file = own if own.is_file() else folder.joinpath("default.txt")
        text, source = file.read_text(encoding="utf-8"), file.name
    templates, names = [], {}
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        name, equals, words = line.partition(" = ")
        if "{}" in line:
            templates.append(line)
        elif equals:
            names[name.strip()] = words.strip()
        else:
            raise WlsupError(f"{source}: {line!r} is neither a template with {{}} nor `class = words`.")
    if not templates:
        raise WlsupError(f"{source} has no template: a line such as `a photo of a {{}}.` is needed.")
    return Prompts(tuple(templates), names, source)


def class_embeddings(embed: Callable[[list[str]], Tensor], class_names: Sequence[str], prompts: Prompts) -> Tensor:
    """Return (C, E) unit rows: of each class the mean of its sentences' unit embeddings.

    Source: Radford et al. 2021 (CLIP), section 3.1.4, prompt ensembling in embedding space; Zhai et al. 2022 (LiT) use
    the same.

    Args:
        embed: B sentences -> (B, E) of unit length.
        class_names: C.
        prompts: of the set.
    """
    rows = [torch.nn.functional.normalize(embed(prompts.of(name)).float().cpu(), dim=1) for name in class_names]
    return torch.nn.functional.normalize(torch.stack([part.mean(0) for part in rows]), dim=1)


def zero_shot(pictures: Tensor, labels: Tensor, classes: Tensor) -> dict[str, Any]:
    """Return the share of pictures whose own class is the nearest, by cosine.

    Args:
        pictures: (m, E) of unit length.
        labels: (m,) int64 in 0..C - 1.
        classes: (C, E) of `class_embeddings`.

    Returns:
        {"accuracy", "ci95" (Wilson's), "chance": 1 / C, "n": m}.

    Raises:
        WlsupError: if widths differ, there is no picture, or an embedding is not finite.
    """
    if pictures.ndim != 2 or pictures.shape[1:] != classes.shape[1:] or not len(pictures):
        raise WlsupError(
            f"Zero-shot needs pictures (m, E) and classes (C, E) of one width, not {tuple(pictures.shape)} and "
            f"{tuple(classes.shape)}."
        )
    if not pictures.isfinite().all() or not classes.isfinite().all():
        raise WlsupError("An embedding is NaN or infinite: the model has diverged.")
    right = int(((pictures.float() @ classes.T).argmax(1) == labels).sum())
    accuracy, low, high = wilson(right, len(pictures))
    return {"accuracy": accuracy, "ci95": [low, high], "chance": 1 / len(classes), "n": len(pictures)}
