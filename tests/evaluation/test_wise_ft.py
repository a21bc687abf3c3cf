"""The straight line between two states: exact at its ends, and a place on it that test pictures do not choose."""

import pytest
import torch

from wlsup.errors import WlsupError
from wlsup.evaluation.wise_ft import ALPHAS, check_alphas, choose_alpha, interpolate


def ends(dtype=torch.float32):
    start = {"w": torch.randn(3, 4).to(dtype), "steps": torch.tensor(0), "table": torch.tensor([True, False])}
    end = {"w": torch.randn(3, 4).to(dtype), "steps": torch.tensor(7), "table": torch.tensor([False, False])}
    return start, end


def test_it_is_the_papers_line():
    start, end = ends()
    for alpha in ALPHAS:
        expected = (1 - alpha) * start["w"].double() + alpha * end["w"].double()
        assert torch.allclose(interpolate(start, end, alpha)["w"].double(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_its_ends_are_the_tensors_themselves(dtype):
    start, end = ends(dtype)
    assert interpolate(start, end, 0)["w"] is start["w"]
    assert interpolate(start, end, 1)["w"] is end["w"]
    assert interpolate(start, end, 0.3)["w"].dtype == dtype


def test_low_precision_is_blended_in_fp32():
    start, end = {"w": torch.tensor([1.0, 1.0]).bfloat16()}, {"w": torch.tensor([1.0078125, 3.0]).bfloat16()}
    expected = (0.7 * start["w"].float() + 0.3 * end["w"].float()).bfloat16()
    assert torch.equal(interpolate(start, end, 0.3)["w"], expected)


def test_what_did_not_move_stays_to_the_bit():
    same = {"w": torch.randn(1000)}
    for alpha in ALPHAS:
        assert torch.equal(interpolate(same, {"w": same["w"].clone()}, alpha)["w"], same["w"])


def test_counters_and_tables_are_copied_from_the_fine_tuned_end():
    start, end = ends()
    for alpha in (0, 0.5, 1):
        blended = interpolate(start, end, alpha)
        assert blended["steps"] == 7
        assert torch.equal(blended["table"], end["table"])


def test_held_tensors_are_the_fine_tuned_ones_but_at_the_pretrained_end():
    start = {"lora.A.weight": torch.zeros(2), "lora.B.weight": torch.zeros(2)}
    end = {"lora.A.weight": torch.ones(2), "lora.B.weight": torch.ones(2)}
    blended = interpolate(start, end, 0.25, held=["lora.*A.weight"])
    assert blended["lora.A.weight"].tolist() == [1, 1]
    assert blended["lora.B.weight"].tolist() == [0.25, 0.25]
    assert interpolate(start, end, 0, held=["lora.*A.weight"])["lora.A.weight"].tolist() == [0, 0]


def test_two_models_have_no_line_between_them():
    start, end = ends()
    with pytest.raises(WlsupError, match=r"1 tensors differ, first extra \(None at alpha 0, \(2,\) at 1\)"):
        interpolate(start, {**end, "extra": torch.ones(2)}, 0.5)
    with pytest.raises(WlsupError, match="first w"):
        interpolate(start, {**end, "w": torch.ones(4, 3)}, 0.5)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(WlsupError, match="in \\[0, 1\\]"):
            interpolate(start, end, alpha)


def test_a_grid_has_both_ends():
    assert check_alphas([1, 0.5, 0, 0.5]) == (0.0, 0.5, 1.0)
    for wrong in ([], [0.5], [0, 0.5], [0, 1, 1.5], [0, 1, float("nan")]):
        with pytest.raises(WlsupError, match="both ends"):
            check_alphas(wrong)


def test_the_best_mean_on_validation_pictures_is_chosen_and_of_equals_the_lowest():
    choice = choose_alpha((0.0, 0.5, 1.0), {"a": [0.5, 0.7, 0.6], "b": [0.5, 0.6, 0.7]})
    assert choice["validation"] == {"sets": ["a", "b"], "accuracy": pytest.approx([0.5, 0.65, 0.65])}
    assert choice["chosen_alpha"] == 0.5
    assert "validation" in choice["rule"]


def test_with_no_set_at_home_it_is_the_papers_default():
    choice = choose_alpha(ALPHAS, {})
    assert choice["chosen_alpha"] == 0.5
    assert choice["validation"] == {"sets": [], "accuracy": []}
    assert "no in-domain set" in choice["rule"]
    assert choose_alpha((0.0, 0.4, 1.0), {})["chosen_alpha"] == 0.4
