"""How good captions are: BLEU-1 to 4, ROUGE-L, CIDEr-D and, where its data is, METEOR, with intervals over pictures.

Shapes: n pictures, C columns whose sums give every score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from wlsup.errors import WlsupError
from wlsup.evaluation.caption_metrics import (
    ORDERS,
    TOKENIZATION,
    Tokens,
    bleu,
    bleu_statistics,
    caption_tokens,
    cider_d,
    meteor,
    meteor_absent,
    rouge_l,
)
from wlsup.evaluation.statistics import Interval

__all__ = ["PROTOCOL", "score_captions"]

PROTOCOL = (
    f"tokens {TOKENIZATION} (NFKC, lower case, words of letters, marks and digits, punctuation off); BLEU-1..4 of the "
    "corpus, closest reference length, unsmoothed; ROUGE-L with beta 1.2; CIDEr-D with sigma 6, n = 1..4, document "
    "frequencies of the scored pictures' references; intervals by bootstrap over pictures, document frequencies held"
)

_CHUNK = 100  # resamples drawn at a time: of 40,000 pictures they are 32 MB


def score_captions(
    generated: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Score one generated caption a picture against all that people wrote.

    Args:
        generated: n captions.
        references: n lists of at least one caption.
        seed: of the bootstrap.
        resamples: of the pictures, for the intervals.
        confidence: of the intervals, in (0, 1).

    Returns:
        {"pictures": n, "references": how many in all, "scores": {"bleu_1": {"value": float, "ci95": [low, high]}, ...,
        "bleu_4", "rouge_l", "cider_d", "meteor"}, "absent": {score: why it could not be computed}, "protocol": str}.
        BLEU, ROUGE-L and METEOR lie in [0, 1], CIDEr-D in [0, 10].

    Raises:
        WlsupError: no picture, one without a reference, or not one caption a picture.
    """
    if not generated or len(generated) != len(references) or not all(references):
        raise WlsupError(
            f"Scoring needs one generated caption and at least one reference a picture, not {len(generated)} captions "
            f"and {[len(group) for group in references[:5]]} references (first 5 of {len(references)} pictures)."
        )
    words = [caption_tokens(caption) for caption in generated]
    truth = [[caption_tokens(reference) for reference in group] for group in references]
    absent = {}
    sums = np.stack([bleu_statistics(*pair) for pair in zip(words, truth, strict=True)])
    means: dict[str, np.ndarray] = {"rouge_l": _each(rouge_l, words, truth)}
    if len(words) > 1:
        means["cider_d"] = cider_d(words, truth)
    else:
        absent["cider_d"] = "its document frequencies need at least two pictures"
    protocol, reason = PROTOCOL, meteor_absent()
    if reason is None:
        from nltk.corpus import wordnet

        means["meteor"] = _each(meteor, words, truth)
        protocol += f"; METEOR (2007) by nltk, WordNet {wordnet.get_version()}"
    else:
        absent["meteor"] = reason
    columns = np.concatenate([sums, np.stack(list(means.values()), axis=1)], axis=1)

    def scored(added: np.ndarray) -> np.ndarray:
        return np.concatenate([bleu(added[..., : sums.shape[1]]), added[..., sums.shape[1] :] / len(words)], axis=-1)

    names = [*(f"bleu_{order}" for order in range(1, ORDERS + 1)), *means]
    intervals = _bootstrap(columns, scored, seed, resamples, confidence)
    return {
        "pictures": len(words),
        "references": sum(map(len, truth)),
        "scores": {
            name: {"value": interval.estimate, "ci95": [interval.low, interval.high]}
            for name, interval in zip(names, intervals, strict=True)
        },
        "absent": absent,
        "protocol": protocol,
    }


def _bootstrap(
    columns: np.ndarray, score: Callable[[np.ndarray], np.ndarray], seed: int, resamples: int, confidence: float
) -> list[Interval]:
    """Return estimate and interval of each score of the columns' sums, (n, C) in all: every score here is one of sums.

    How often a resample takes each picture is a multinomial draw, so that its sums are one product of matrices.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise WlsupError(f"resamples must be at least 1 and confidence in (0, 1), not {resamples} and {confidence}.")
    generator, n = np.random.default_rng(seed), len(columns)
    drawn = []
    for start in range(0, resamples, _CHUNK):
        taken = generator.multinomial(n, np.full(n, 1 / n), size=min(_CHUNK, resamples - start))
        drawn.append(score(taken @ columns))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail], axis=0)
    estimate = score(columns.sum(axis=0))
    return [Interval(*map(float, three)) for three in zip(estimate, low, high, strict=True)]


def _each(score: Callable[..., float], words: Sequence[Tokens], truth: Sequence[Sequence[Tokens]]) -> np.ndarray:
    return np.array([score(*pair) for pair in zip(words, truth, strict=True)])
