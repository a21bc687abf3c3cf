"""The captioning part of results.json as a person reads it."""

import io

from rich.console import Console

from wlsup.evaluation.caption_table import caption_markdown, caption_text, print_caption_table, samples_markdown

CAPTIONING = {
    "generation": "greedy",
    "pictures": 128,
    "references": 640,
    "scores": {
        "bleu_4": {"value": 0.12349, "ci95": [0.1, 0.15]},
        "cider_d": {"value": 1.5, "ci95": [1.25, 1.75]},
        "loss": {"value": 2.0, "ci95": [1.9, 2.1]},
    },
    "absent": {"meteor": "no data"},
    "protocol": "p",
}


def test_every_score_its_interval_and_what_is_absent_are_shown():
    for shown in (caption_text(CAPTIONING, "mae_lm"), caption_markdown(CAPTIONING, "mae_lm")):
        assert "128 held-out pictures, 640 human captions: mae_lm, greedy" in shown
        for said in ("BLEU-4", "0.123", "[0.100, 0.150]", "CIDEr-D", "1.500", "caption loss, nats a token"):
            assert said in shown
        assert "No METEOR (nltk): no data." in shown
        assert shown.endswith("Protocol: p.")


def test_it_is_printed_as_it_is_written():
    console = Console(file=io.StringIO())
    print_caption_table(CAPTIONING, "mae_lm", console)
    assert caption_text(CAPTIONING, "mae_lm") in console.file.getvalue()


def test_samples_are_a_table_whatever_captions_hold():
    samples = [{"key": "a|b.jpg", "generated": "one\ntwo", "references": ["x | y", "z"]}]
    assert samples_markdown(samples).splitlines()[2] == r"| a\|b.jpg | one two | x \| y<br>z |"
