"""The k-NN table: what a person reads off it, coloured, plain and in Markdown."""

from __future__ import annotations

import io

from rich.console import Console

from wlsup.evaluation.table import knn_markdown, knn_text, print_knn_table


def entry(domain: str, pretrained: float, delta: float, half: float, **more) -> dict:
    return {
        "domain": domain,
        "k": 20,
        "temperature": 0.07,
        "train": 2000,
        "test": 1000,
        "pretrained": pretrained,
        "finetuned": pretrained + delta,
        "delta": delta,
        "ci95": [delta - half, delta + half],
        **more,
    }


RESULTS = {
    "approach": "film",
    "preset": "mini",
    "seed": 0,
    "knn": {
        "mini_digits": entry("out", 0.812, 0.045, 0.020),
        "mini_shapes": entry("in", 0.712, -0.031, 0.012, accuracy_by_k={"10": {}}),
        "mini_textures": entry("out", 0.400, 0.015, 0.030),
        "mini_landcover": entry("out", 0.500, -0.0002, 0.010),
    },
}


def terminal(results: dict, width: int = 120) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, color_system="standard", legacy_windows=False
    )
    print_knn_table(results, console)
    return console.file.getvalue()


def test_plain_text_says_everything_in_percent_with_one_decimal():
    lines = [line.split() for line in knn_text(RESULTS).splitlines()]
    assert lines[0] == ["k-NN,", "T", "=", "0.07:", "film,", "mini,", "seed", "0"]
    assert ["mini_shapes", "in", "20", "71.2", "+-2.8", "68.1", "+-2.9", "-3.1", "[-4.3,", "-1.9]", "loss"] in lines
    assert ["mini_digits", "out", "20", "81.2", "+-2.4", "85.7", "+-2.2", "+4.5", "[+2.5,", "+6.5]", "gain"] in lines
    assert [
        "mini_textures",
        "out",
        "20",
        "40.0",
        "+-3.0",
        "41.5",
        "+-3.0",
        "+1.5",
        "[-1.5,",
        "+4.5]",
        "unsure",
    ] in lines
    assert [
        "mini_landcover",
        "out",
        "20",
        "50.0",
        "+-3.1",
        "50.0",
        "+-3.1",
        "0.0",
        "[-1.0,",
        "+1.0]",
        "unsure",
    ] in lines
    assert ["mean", "in", "71.2", "+-2.8", "68.1", "+-2.9", "-3.1", "[-4.3,", "-1.9]", "loss"] in lines
    # of three sets, by MOVER: sqrt(2.0^2 + 3.0^2 + 1.0^2) / 3 = 1.2 points around the mean change of 1.99
    assert ["mean", "out", "57.1", "+-1.7", "59.1", "+-1.6", "+2.0", "[+0.7,", "+3.2]", "gain"] in lines


def test_in_domain_sets_come_first_then_out_of_domain_then_the_means():
    names = [line.split()[0] for line in knn_text(RESULTS).splitlines()[3:]]
    assert names[:4] == ["mini_shapes", "mini_digits", "mini_textures", "mini_landcover"]
    assert names[5:7] == ["mean", "mean"]


def test_plain_text_is_ascii_and_fits_80_columns():
    text = knn_text(RESULTS)
    assert text.isascii()
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_terminal_shows_green_for_gains_red_for_losses_and_dim_for_what_may_be_noise():
    shown = {line.split()[0]: line for line in terminal(RESULTS).splitlines() if "mini_" in line}
    green, red, dim = "\x1b[32m", "\x1b[31m", "\x1b[2m"
    assert green in shown["mini_digits"]
    assert red not in shown["mini_digits"]
    assert red in shown["mini_shapes"]
    assert green not in shown["mini_shapes"]
    for name in ("mini_textures", "mini_landcover"):
        assert dim in shown[name]
        assert green not in shown[name]
        assert red not in shown[name]


def test_an_interval_that_touches_0_is_no_gain():
    touching = {"knn": {"a": entry("in", 0.5, 0.02, 0.02), "b": entry("in", 0.5, -0.02, 0.02)}}
    assert "gain" not in "".join(knn_text(touching).splitlines()[:-3])
    assert "loss" not in "".join(knn_text(touching).splitlines()[:-3])
    assert "\x1b[32m" not in terminal(touching)
    assert "\x1b[31m" not in terminal(touching)


def test_an_encoder_that_answers_as_before_is_unchanged_and_not_unsure():
    sets = {"a": entry("in", 0.5, 0.0, 0.0), "b": entry("out", 0.5, 0.0, 0.0), "c": entry("out", 0.5, 0.0, 0.1)}
    frozen = {"knn": sets}
    verdicts = [(line.split()[0], line.split()[-1]) for line in knn_text(frozen).splitlines() if " 50.0 " in line]
    means = [("mean", "unchanged"), ("mean", "unsure")]
    assert verdicts == [("a", "unchanged"), ("b", "unchanged"), ("c", "unsure"), *means]
    assert "unchanged" in terminal(frozen, width=40)


def test_a_narrow_terminal_cuts_no_number():
    shown = terminal(RESULTS, width=40)
    for number in ("71.2", "68.1", "-3.1", "-4.3", "+6.5", "unsure", "mini_landcover"):
        assert number in shown


def test_a_pipe_gets_plain_text():
    console = Console(file=io.StringIO())
    print_knn_table(RESULTS, console)
    assert console.file.getvalue() == knn_text(RESULTS) + "\n"


def test_markdown_is_a_table_with_gains_and_losses_bold():
    lines = knn_markdown(RESULTS).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {9}
    assert "| mini_digits | out | 20 | 81.2 +-2.4 | 85.7 +-2.2 | **+4.5** | [+2.5, +6.5] | **gain** |" in rows
    assert "| mini_textures | out | 20 | 40.0 +-3.0 | 41.5 +-3.0 | +1.5 | [-1.5, +4.5] | unsure |" in rows
    assert "| mean | out |  | 57.1 +-1.7 | 59.1 +-1.6 | **+2.0** | [+0.7, +3.2] | **gain** |" in rows
    assert lines[1] == ""  # a Markdown table needs a blank line above it


def test_a_pretrained_score_alone_is_shown_without_a_change():
    alone = {"domain": "in", "k": 20, "temperature": 0.07, "pretrained": 0.712}
    lines = [line.split() for line in knn_text({"knn": {"mini_shapes": alone}}).splitlines()]
    assert ["mini_shapes", "in", "20", "71.2"] in lines
    assert ["mean", "in", "71.2"] in lines


def test_the_protocol_stands_below_every_form_of_it():
    told = RESULTS | {"protocol": "knn-dino:v1 something"}
    for shown in (knn_text(told), knn_markdown(told), terminal(told)):
        assert "Protocol: knn-dino:v1 something" in shown


def test_no_number_stands_without_an_interval():
    for line in knn_text(RESULTS).splitlines()[3:-3]:
        if not line.startswith("-"):
            assert line.count("+-") == 2 and line.count("[") == 1, line


def test_no_sets_make_an_empty_table_and_no_error():
    assert "pretrained" in knn_text({"knn": {}})
    assert "pretrained" in terminal({"knn": {}})
