"""Colours that can be told from what is behind them."""

from dataclasses import fields

import pytest

from wlsup.evaluation.report.figures.style import DARK, LIGHT, axes, name_rows, points, slug


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_all_that_is_read_has_a_contrast_of_four_and_a_half(palette):
    for field in fields(palette):
        if field.name not in ("paper", "panel", "rule"):
            for ground in (palette.paper, palette.panel):
                assert contrast(getattr(palette, field.name), ground) >= 4.5, (field.name, ground)


def test_contrast_is_that_of_the_web_guidelines():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)


def test_changes_are_signed_points_with_a_true_minus():
    assert [points(x) for x in (0.0123, -0.0456, 0.0004, -0.0004)] == ["+1.2", "−4.6", "0.0", "0.0"]


def test_names_become_ids():
    assert slug("mini_shapes") == "mini-shapes"
    names = ["film (lr 1.0), <b>", "film (lr 1-0) b", "日本", "日", "x"]
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all(letter.isalnum() or letter == "-" for short in slugs for letter in short)
    assert all(short.isascii() for short in slugs)


def test_a_long_name_leaves_the_figure_its_room_and_does_not_reach_its_neighbours():
    names = [
        "film",
        "full (model.encoder_lr 1e-05, model.regularizer.distill 10.0, model.regularizer.replay 10.0 and 3 more)",
    ]
    figure, one = axes(LIGHT, 0.9 + 0.21 * len(names))
    name_rows(one, names)
    one.set_ylim(len(names) - 0.4, -0.6)
    figure.draw_without_rendering()
    assert one.get_position().width > 0.5
    first, second = (label.get_window_extent() for label in one.get_yticklabels())
    assert first.y0 >= second.y1 - 1
    assert second.x0 >= 0
    told = [label.get_text() for label in one.get_yticklabels()]
    assert told[0] == "film"
    assert told[1].startswith("full (model.encoder_lr") and told[1].endswith("…")
