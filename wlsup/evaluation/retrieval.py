"""Image-text retrieval: how often a picture's own caption is among the nearest captions, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wlsup.errors import WlsupError
from wlsup.evaluation.neighbors import SIMILARITY_TOLERANCE, full_precision
from wlsup.evaluation.statistics import mean_over_pictures

__all__ = ["PROTOCOL", "retrieval_hits", "retrieval_intervals", "retrieval_recall"]

PROTOCOL = "retrieval:v1 cosine, expected recall among equals, bootstrap over the pairs that ask"
"""The id kept beside recalls."""


def retrieval_recall(
    image: Tensor, text: Tensor, ks: Sequence[int] = (1, 5, 10), *, keys: Sequence[str] | None = None, tile: int = 1024
) -> dict[str, dict[int, float]]:
    """Return recall@k in both directions, by cosine similarity, and what chance would give.

    Pairs at the same similarity as the right one (closer than 1e-6) stand in random order: the value is the expected
    recall. An encoder that maps everything to one point therefore scores exactly chance, where a rank by ``argsort``
    would give it anything up to 100 %.

    Args:
        image: (n, D) embeddings; need not be normalised.
        text: (n, D) embeddings, ``text[i]`` of the caption of ``image[i]``.
        ks: in any order.
        keys: n names of the pairs' pictures: pairs of the same picture do not count as wrong for one another. None
            when each pair has a picture of its own.
        tile: pairs compared at once, on both sides.

    Returns:
        ``{"image_to_text": {k: recall}, "text_to_image": {k: recall}, "chance": {k: recall}}``, fractions in [0, 1].

    Raises:
        WlsupError: if shapes disagree, there are no pairs, an embedding is not finite, or a k is below 1.
    """
    hits = retrieval_hits(image, text, ks, keys=keys, tile=tile)
    return {name: {k: float(each.mean()) for k, each in by_k.items()} for name, by_k in hits.items()}


@torch.no_grad()
def retrieval_hits(
    image: Tensor, text: Tensor, ks: Sequence[int] = (1, 5, 10), *, keys: Sequence[str] | None = None, tile: int = 1024
) -> dict[str, dict[int, Tensor]]:
    """Return what each pair adds to `retrieval_recall`: its expected hit, in [0, 1]; arguments and errors as there.

    Returns:
        ``{"image_to_text": {k: (n,) hits}, "text_to_image": {k: hits}, "chance": {k: hits}}``, fp64 on the CPU.
    """
    if image.ndim != 2 or image.shape != text.shape or not image.numel():
        raise WlsupError(
            f"Retrieval needs as many image as text embeddings, one or more, of one width: (n, D) each, not "
            f"{tuple(image.shape)} and {tuple(text.shape)}."
        )
    if min(ks, default=0) < 1:
        raise WlsupError(f"Recall@k needs k of at least 1, not {list(ks)}.")
    if keys is not None and len(keys) != len(image):
        raise WlsupError(f"There are {len(image)} pairs and {len(keys)} keys. Give one key a pair.")
    for name, embeddings in (("image", image), ("text", text)):
        finite = embeddings.isfinite().all(1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise WlsupError(f"Row {row} of the {name} embeddings is NaN or infinite: the model has diverged.")
    image, text = (torch.nn.functional.normalize(part.detach().float(), dim=1) for part in (image, text))
    pictures = _picture_ids(keys, len(image)).to(image.device)
    wrong = len(image) - torch.bincount(pictures)[pictures]
    with full_precision():
        forth, back = (_ranks(a, b, pictures, tile) for a, b in ((image, text), (text, image)))
    return {
        "image_to_text": {k: _hits(*forth, k) for k in ks},
        "text_to_image": {k: _hits(*back, k) for k in ks},
        "chance": {k: _hits(torch.zeros_like(wrong), wrong, k) for k in ks},
    }


def retrieval_intervals(hits: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[int, list[float]]]:
    """Return 95 % bootstrap intervals of both directions' recall over the pairs that ask, the pairs that answer kept.

    Args:
        hits: of `retrieval_hits`.

    Returns:
        ``{"image_to_text": {k: [low, high]}, "text_to_image": {k: [low, high]}}``.
    """
    return {
        direction: {k: list(mean_over_pictures(each)[1:]) for k, each in hits[direction].items()}
        for direction in ("image_to_text", "text_to_image")
    }


def _picture_ids(keys: Sequence[str] | None, n: int) -> Tensor:
    if keys is None:
        return torch.arange(n)
    ids: dict[str, int] = {}
    return torch.tensor([ids.setdefault(key, len(ids)) for key in keys])


def _ranks(queries: Tensor, targets: Tensor, pictures: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Return, for each query, how many wrong targets are closer than its own, and how many as close."""
    own = (queries * targets).sum(1, keepdim=True)
    closer, level = (torch.zeros(len(queries), dtype=torch.int64, device=queries.device) for _ in range(2))
    for rows in torch.arange(len(queries), device=queries.device).split(tile):
        for columns in torch.arange(len(targets), device=queries.device).split(tile):
            lead = queries[rows] @ targets[columns].T - own[rows]
            wrong = pictures[rows, None] != pictures[None, columns]
            closer[rows] += (wrong & (lead > SIMILARITY_TOLERANCE)).sum(1)
            level[rows] += (wrong & (lead.abs() <= SIMILARITY_TOLERANCE)).sum(1)
    return closer, level


def _hits(closer: Tensor, level: Tensor, k: int) -> Tensor:
    """Return expected hits at k when each query's own target is anywhere among the ``level`` ones beside it."""
    return ((k - closer).double() / (level + 1)).clamp(0, 1).cpu()
