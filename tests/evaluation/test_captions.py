"""All scores of a set of captions: their intervals, their protocol, and what is said of those that cannot be had."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_caption_metrics import corpus  # noqa: E402
from tiny_wordnet import use_none, use_wordnet  # noqa: E402

from wlsup.errors import WlsupError  # noqa: E402
from wlsup.evaluation.caption_metrics import TOKENIZATION, bleu, bleu_statistics, cider_d, rouge_l  # noqa: E402
from wlsup.evaluation.captions import score_captions  # noqa: E402

WITHOUT_DATA = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch, tmp_path):
    pytest.importorskip("nltk", reason="nltk comes with `pip install wlsup[test]`")
    use_none(monkeypatch, tmp_path)


def text(words):
    return [" ".join(said) for said in words[0]], [[" ".join(one) for one in group] for group in words[1]]


def test_scores_are_the_metrics_of_the_captions_tokens():
    generated, references = words = corpus(30, 0)
    said, truth = text(words)
    result = score_captions([caption.upper() + " !" for caption in said], truth, resamples=10)
    values = {name: entry["value"] for name, entry in result["scores"].items()}
    assert list(values) == WITHOUT_DATA
    pairs = list(zip(generated, references, strict=True))
    assert [values[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleu(sum(bleu_statistics(*p) for p in pairs)))
    assert values["rouge_l"] == pytest.approx(np.mean([rouge_l(*pair) for pair in pairs]))
    assert values["cider_d"] == pytest.approx(cider_d(generated, references).mean())
    assert (result["pictures"], result["references"]) == (30, sum(map(len, references)))
    assert TOKENIZATION in result["protocol"]


def test_intervals_are_those_of_a_bootstrap_that_draws_pictures():
    generated, references = words = corpus(60, 1)
    result = score_captions(*text(words), resamples=2000)["scores"]
    rng, drawn = np.random.default_rng(5), []
    statistics = np.stack([bleu_statistics(*pair) for pair in zip(generated, references, strict=True)])
    cider = cider_d(generated, references)
    for _ in range(2000):
        pictures = rng.integers(0, 60, 60)
        drawn.append([*bleu(statistics[pictures].sum(0)), cider[pictures].mean()])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    for column, name in enumerate([*WITHOUT_DATA[:4], "cider_d"]):
        entry = result[name]
        width = high[column] - low[column]
        assert entry["ci95"] == pytest.approx([low[column], high[column]], abs=0.15 * width)
        assert entry["ci95"][0] < entry["value"] < entry["ci95"][1]


def test_the_same_seed_gives_the_same_interval_and_another_does_not():
    words = text(corpus(20, 2))
    once, again, other = (score_captions(*words, resamples=150, seed=seed) for seed in (0, 0, 1))
    assert once == again
    assert once["scores"]["bleu_1"]["ci95"] != other["scores"]["bleu_1"]["ci95"]
    assert once["scores"]["bleu_1"]["value"] == other["scores"]["bleu_1"]["value"]


def test_what_cannot_be_computed_has_a_reason_and_no_number():
    result = score_captions(["a dog"], [["a dog runs"]], resamples=5)
    assert set(result["absent"]) == {"cider_d", "meteor"}
    assert not {"cider_d", "meteor"} & set(result["scores"])
    assert "WordNet" in result["absent"]["meteor"]


def test_meteor_is_scored_where_its_data_is_and_named_in_the_protocol(monkeypatch, tmp_path):
    use_wordnet(monkeypatch, tmp_path / "data")
    result = score_captions(["a dog runs", "a cat"], [["a hound runs"], ["a cat"]], resamples=5)
    assert result["scores"]["meteor"]["value"] == pytest.approx(((1 - 0.5 / 27) + (1 - 0.5 / 8)) / 2)
    assert "WordNet 3.0" in result["protocol"]
    assert not result["absent"]


@pytest.mark.parametrize(("generated", "references"), [([], []), (["a"], [[]]), (["a", "b"], [["a"]])])
def test_one_caption_and_a_reference_a_picture_or_an_error(generated, references):
    with pytest.raises(WlsupError, match="one generated caption and at least one reference"):
        score_captions(generated, references)


def test_settings_out_of_range_are_refused():
    with pytest.raises(WlsupError, match="resamples"):
        score_captions(["a"], [["a"]], resamples=0)
