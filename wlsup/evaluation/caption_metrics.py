"""The published scores of captions, a picture at a time: BLEU's counts, ROUGE-L, CIDEr-D, METEOR by nltk; the tokens.

Shapes: n pictures, K orders of n-grams (1 to 4).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = [
    "ORDERS",
    "TOKENIZATION",
    "Tokens",
    "bleu",
    "bleu_statistics",
    "caption_tokens",
    "cider_d",
    "meteor",
    "meteor_absent",
    "rouge_l",
]

TOKENIZATION = "wlsup-words-1"
"""The id of `caption_tokens`' rules: scores under another id are not comparable."""

ORDERS = 4
"""n-grams of 1 to 4 words are counted."""

Tokens = Sequence[str]

_BETA = 1.2
_SIGMA = 6.0


def caption_tokens(caption: str) -> list[str]:
    """Split a caption into words: the suite's own rules, `TOKENIZATION`, in place of the Java program that COCO uses.

    The text is brought to Unicode's NFKC form and lower case. Words are the longest runs of letters, marks and digits,
    with apostrophes between them; everything else separates words and is dropped. ``"The dog's black-and-white
    ball."`` gives ``the dog's black and white ball``.

    Args:
        caption: any text.

    Returns:
        Its words, none for a text without any.
    """
    text = unicodedata.normalize("NFKC", caption).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return [word for run in kept.split() if (word := run.strip("'"))]


def bleu_statistics(generated: Tokens, references: Sequence[Tokens]) -> np.ndarray:
    """Return what one picture adds to BLEU's sums.

    Source: Papineni et al. 2002, "BLEU", section 2. The reference length is the one closest to the caption's; of two
    equally close ones the shorter, as in COCO's evaluation.

    Args:
        generated: words of the generated caption.
        references: words of each of people's.

    Returns:
        (2 K + 2,) float64: n-grams that some reference has (each at most as often as one reference has it), n-grams
        that there are, both by order, the caption's length, the reference length.
    """
    most: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        most |= _ngrams(reference)
    statistics = np.zeros(2 * ORDERS + 2)
    for ngram, count in _ngrams(generated).items():
        statistics[len(ngram) - 1] += min(count, most[ngram])
        statistics[ORDERS + len(ngram) - 1] += count
    length = len(generated)
    statistics[-2:] = length, min((abs(len(r) - length), len(r)) for r in references)[1]
    return statistics


def bleu(sums: np.ndarray) -> np.ndarray:
    """Return BLEU-1 to 4 of a corpus; 0 where no n-gram of an order matches, unsmoothed.

    Source: Papineni et al. 2002, equations of section 2.3: geometric mean of the precisions times the brevity penalty.

    Args:
        sums: (..., 2 K + 2), `bleu_statistics` added up over pictures.

    Returns:
        (..., K) in [0, 1].
    """
    matched, there = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    length, reference = sums[..., -2:-1], sums[..., -1:]
    precision = np.divide(matched, there, out=np.zeros_like(matched), where=there > 0)
    with np.errstate(divide="ignore"):
        geometric = np.exp(np.cumsum(np.log(precision), axis=-1) / np.arange(1, ORDERS + 1))
    return geometric * np.exp(np.minimum(0, 1 - reference / np.maximum(length, 1)))


def rouge_l(generated: Tokens, references: Sequence[Tokens]) -> float:
    """Return the F measure of the longest common subsequence, recall weighing ``beta`` = 1.2 times precision.

    Source: Lin 2004, "ROUGE", section 3.1; best precision and best recall over the references, as in COCO's evaluation
    (Chen et al. 2015).

    Args:
        generated: words of the generated caption.
        references: words of each of people's.

    Returns:
        In [0, 1].
    """
    common = [(_common(generated, reference), len(reference)) for reference in references if reference]
    precision = max((length / len(generated) for length, _ in common if generated), default=0.0)
    recall = max((length / of for length, of in common), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def cider_d(generated: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """Return how far each caption says what people agree on: tf-idf cosine of clipped n-grams, with a length penalty.

    Source: Vedantam et al. 2015, "CIDEr", section 4 and, for CIDEr-D, section 4.2; times 10, as published.

    Args:
        generated: n captions' words.
        references: n lists of people's captions' words; they give the document frequencies.

    Returns:
        (n,) in [0, 10].
    """
    documents: Counter[tuple[str, ...]] = Counter()
    counted = [[_ngrams(reference) for reference in group] for group in references]
    for group in counted:
        documents.update(set().union(*group))
    total = np.log(float(len(counted)))

    def vector(counts: Counter[tuple[str, ...]]) -> tuple[dict[tuple[str, ...], float], np.ndarray, int]:
        weights = {ngram: count * (total - np.log(max(1.0, documents[ngram]))) for ngram, count in counts.items()}
        squares = np.zeros(ORDERS)
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        # The published code takes the number of bigrams for the length.
        return weights, np.sqrt(squares), sum(count for ngram, count in counts.items() if len(ngram) == 2)

    scores = np.zeros(len(counted))
    for position, (caption, group) in enumerate(zip(generated, counted, strict=True)):
        own, own_norm, own_length = vector(_ngrams(caption))
        for weights, norm, length in map(vector, group):
            products = np.zeros(ORDERS)
            for ngram, weight in own.items():
                if other := weights.get(ngram, 0.0):
                    products[len(ngram) - 1] += min(weight, other) * other
            norms = own_norm * norm
            cosine = np.divide(products, norms, out=np.zeros(ORDERS), where=norms > 0)
            penalty = np.exp(-((own_length - length) ** 2) / (2 * _SIGMA**2))
            scores[position] += 10 * cosine.mean() * penalty / len(group)
    return scores


def meteor_absent() -> str | None:
    """Say why METEOR cannot be computed here, or None: it needs nltk and WordNet's files."""
    try:
        from nltk.corpus import wordnet
    except ImportError:
        return "nltk is not installed (`pip install wlsup[meteor]`)"
    try:
        wordnet.synsets("dog")
    except LookupError:
        return "nltk has no WordNet (`python -m nltk.downloader wordnet`, or set the environment's NLTK_DATA)"
    except Exception as error:  # of an incomplete copy its reader raises whatever it stumbles over
        return f"nltk's WordNet cannot be read ({error}): fetch it again"
    return None


def meteor(generated: Tokens, references: Sequence[Tokens]) -> float:
    """Return METEOR by nltk: matches of words, stems and WordNet's synonyms, less a penalty for their order.

    Source: Lavie & Agarwal 2007, "METEOR" (alpha 0.9, beta 3, gamma 0.5), best of the references. COCO's evaluation
    runs another version, METEOR 1.5, in Java: the two are not comparable.

    Args:
        generated: words of the generated caption.
        references: words of each of people's.

    Returns:
        In [0, 1].
    """
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score

    return float(meteor_score(references, generated, wordnet=wordnet))


def _ngrams(words: Tokens) -> Counter[tuple[str, ...]]:
    def all_orders() -> Iterator[tuple[str, ...]]:
        for order in range(1, ORDERS + 1):
            yield from zip(*(words[start:] for start in range(order)), strict=False)

    return Counter(all_orders())


def _common(first: Tokens, second: Tokens) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for position, other in enumerate(second, 1):
            diagonal, row[position] = (
                row[position],
                diagonal + 1 if word == other else max(row[position - 1 : position + 1]),
            )
    return row[-1]
