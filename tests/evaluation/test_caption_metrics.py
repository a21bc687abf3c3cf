"""Each score against its published implementation on the same tokens, and against values worked out by hand."""

import csv
import importlib.util
import random
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_wordnet import NAMES, use_none, use_wordnet  # noqa: E402

from tests.conftest import lacking  # noqa: E402
from wlsup.evaluation.caption_metrics import (  # noqa: E402
    TOKENIZATION,
    bleu,
    bleu_statistics,
    caption_tokens,
    cider_d,
    meteor,
    meteor_absent,
    rouge_l,
)

WORDS = "a the dog dogs cat runs sleeps on in grass mat red small two people ball with of and".split()  # noqa: SIM905


def corpus(pictures, seed, shortest=4):
    """Captions that share words with their references, of lengths that tie, with one to five references each."""
    rng = random.Random(seed)
    generated, references = [], []
    for _ in range(pictures):
        truth = [rng.choices(WORDS, k=rng.randint(shortest, 12)) for _ in range(rng.randint(1, 5))]
        said = [word if rng.random() < 0.8 else rng.choice(WORDS) for word in rng.choice(truth)]
        generated.append(said[: rng.randint(shortest, 12)])
        references.append(truth)
    return generated, references


def peers(generated, references):
    """Return pycocoevalcap's BLEU-1..4, ROUGE-L and CIDEr-D, with the latter two's scores by picture."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        lacking("the published implementation comes with `pip install wlsup[test]`")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said = {i: [" ".join(words)] for i, words in enumerate(generated)}
    truth = {i: [" ".join(words) for words in group] for i, group in enumerate(references)}
    return (
        Bleu(4).compute_score(truth, said, verbose=0)[0],
        Rouge().compute_score(truth, said),
        Cider().compute_score(truth, said),
    )


def corpus_bleu(generated, references):
    return bleu(sum(bleu_statistics(*pair) for pair in zip(generated, references, strict=True)))


def assert_parity(generated, references):
    bleus, (rouge, rouges), (cider, ciders) = peers(generated, references)
    assert corpus_bleu(generated, references) == pytest.approx(bleus, abs=1e-6)
    own = [rouge_l(*pair) for pair in zip(generated, references, strict=True)]
    assert own == pytest.approx(rouges.tolist(), abs=1e-6)
    assert np.mean(own) == pytest.approx(rouge, abs=1e-6)
    assert cider_d(generated, references) == pytest.approx(ciders, abs=1e-6)
    assert cider_d(generated, references).mean() == pytest.approx(cider, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_pycocoevalcaps_on_the_same_tokens(seed):
    assert_parity(*corpus(60, seed))


def test_also_of_captions_of_one_or_two_words_and_with_none():
    generated, references = corpus(40, 7, shortest=1)
    generated[3] = []
    assert_parity(generated, references)


def test_also_on_real_captions(shared_data):
    by_picture = defaultdict(list)
    with (shared_data / "flickr8k_1k" / "captions.txt").open() as file:
        for row in csv.DictReader(file):
            by_picture[row["image"]].append(caption_tokens(row["caption"]))
    groups = [by_picture[key] for key in sorted(by_picture)][:200]
    assert all(len(group) == 5 for group in groups)
    # What one person says against what the four others say.
    assert_parity([group[0] for group in groups], [group[1:] for group in groups])


def test_tokens_are_what_their_id_says():
    assert TOKENIZATION == "wlsup-words-1"  # other rules need another id: scores are not comparable across them
    said = {
        "The dog's black-and-white ball.": "the dog's black and white ball",
        "Two boys' kites , 'high' up!!": "two boys kites high up",
        "A 3.5 m_long “board”": "a 3 5 m long board",
        "it’s ﬁne": "it's fine",
        "Ünïcode — re\N{COMBINING ACUTE ACCENT}sume\N{COMBINING ACUTE ACCENT}": "ünïcode résumé",
        "हिन्दी में": "हिन्दी में",
        " ... ": "",
        "": "",
    }
    for text, words in said.items():
        assert " ".join(caption_tokens(text)) == words


def test_bleu_clips_counts_as_its_paper_does():
    # Papineni et al. 2002, section 2.1: 2 of 7, where the unclipped precision is 7 of 7.
    references = [["the", "cat", "is", "on", "the", "mat"], ["there", "is", "a", "cat", "on", "the", "mat"]]
    statistics = bleu_statistics(["the", "the", "the", "the", "the", "the", "the"], references)
    assert statistics[0] == 2
    assert statistics[4] == 7
    assert bleu(statistics)[0] == pytest.approx(2 / 7)


def test_bleu_penalises_short_captions_by_the_closest_reference_the_shorter_of_two():
    reference = ["a", "b", "c", "d"]
    assert bleu(bleu_statistics(["a", "b"], [reference]))[0] == pytest.approx(np.exp(1 - 4 / 2))
    assert bleu_statistics(["a", "b", "c"], [["a", "b", "c", "d"], ["a", "b"]])[-1] == 2


def test_bleu_is_nought_where_no_ngram_matches_and_not_a_constant_that_stands_in_for_it():
    generated, references = [["a", "dog"], ["a", "cat"]], [[["a", "dog"]], [["a", "cat"]]]
    assert corpus_bleu(generated, references).tolist() == [1, 1, 0, 0]
    bleus, _, _ = peers(generated, references)
    assert bleus[3] > 1e-4  # there, of captions without any run of four words


def test_rouge_l_equals_its_papers_example():
    # Lin 2004, section 3.1: three words in common of four and four, two in the other order.
    assert rouge_l(["police", "kill", "the", "gunman"], [["police", "killed", "the", "gunman"]]) == pytest.approx(0.75)
    assert rouge_l(["the", "gunman", "kill", "police"], [["police", "killed", "the", "gunman"]]) == pytest.approx(0.5)


def test_cider_d_is_ten_for_the_same_words_and_nought_for_what_every_picture_has():
    references = [[["a", "dog", "runs", "on", "grass"]], [["a", "cat", "sleeps", "in", "bed"]]]
    assert cider_d(references[0] + references[1], references) == pytest.approx([10, 10])
    assert cider_d([["a"], ["a"]], references).tolist() == [0, 0]


def test_a_caption_without_a_word_scores_nought():
    references = [["a", "dog", "runs"]]
    assert bleu(bleu_statistics([], references)).tolist() == [0] * 4
    assert rouge_l([], references) == 0
    assert rouge_l(["a"], [[]]) == 0
    assert cider_d([[], ["x"]], [references, [["x"]]])[0] == 0


def test_meteor_counts_words_stems_and_synonyms_of_wordnet(monkeypatch, tmp_path):
    if importlib.util.find_spec("nltk") is None:
        lacking("nltk comes with `pip install wlsup[test]`")
    use_wordnet(monkeypatch, tmp_path)
    assert meteor_absent() is None
    said = ["a", "dog", "runs", "fast"]
    # Lavie & Agarwal 2007: m matches in c runs of n words each side give (1 - 0.5 (c / m)^3) F, with F = m / n.
    assert meteor(said, [["a", "dog", "runs", "fast"]]) == pytest.approx(1 - 0.5 / 4**3)
    assert meteor(said, [["a", "dog", "running", "fast"]]) == pytest.approx(1 - 0.5 / 4**3)
    assert meteor(said, [["a", "hound", "runs", "fast"]]) == pytest.approx(1 - 0.5 / 4**3)
    assert meteor(said, [["a", "cat", "runs", "fast"]]) == pytest.approx(0.75 * (1 - 0.5 * (2 / 3) ** 3))
    assert meteor(said, [["x"], ["a", "dog", "runs", "fast"]]) == pytest.approx(1 - 0.5 / 4**3)


def test_meteor_says_what_it_lacks(monkeypatch, tmp_path):
    if importlib.util.find_spec("nltk") is None:
        lacking("nltk comes with `pip install wlsup[test]`")
    with monkeypatch.context() as here:
        use_none(here, tmp_path)
        assert "nltk has no WordNet" in meteor_absent()
    with monkeypatch.context() as here:
        use_wordnet(here, tmp_path / "part", [name for name in NAMES if name != "index.sense"])
        assert "cannot be read" in meteor_absent()
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    assert "wlsup[meteor]" in meteor_absent()
