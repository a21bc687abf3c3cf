"""What a label map promises: the published order and number of labels, no label twice, a way out for many classes."""

import pytest
import torch

from wlsup.errors import WlsupError
from wlsup.reprogramming.label_map import FixedLabelMap, LabelMapSpec, LinearLabelMap, build_label_map

BASE = torch.tensor([0.5, -1.0, 3.0, 0.1, 2.0, -2.0])


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("ascending", [[5, 1], [3, 0], [4, 2]]),
        ("descending", [[2, 4], [0, 3], [1, 5]]),
        ("index", [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_labels_are_dealt_out_by_their_logit_on_the_base_picture(order, expected):
    label_map = FixedLabelMap(3, 6, per_class=2, order=order)
    label_map.assign(BASE)
    assert label_map.assigned.tolist() == expected


def test_a_class_is_the_max_or_the_mean_of_its_labels():
    logits = torch.tensor([[1.0, 5.0, 2.0, 4.0]])
    for reduce, expected in (("max", [5.0, 4.0]), ("mean", [3.0, 3.0])):
        assert FixedLabelMap(2, 4, 2, "index", reduce)(logits).tolist() == [expected]


def test_more_classes_than_labels_need_a_linear_map_of_the_probabilities():
    with pytest.raises(WlsupError, match=r"needs 8 labels, and the frozen classifier has 6.*label_map.kind to linear"):
        build_label_map(LabelMapSpec(kind="fixed", per_class=2), 4, 6)
    linear = build_label_map(LabelMapSpec(per_class=2), 4, 6)
    assert isinstance(linear, LinearLabelMap)
    assert isinstance(build_label_map(LabelMapSpec(per_class=2), 3, 6), FixedLabelMap)
    logits = torch.randn(2, 6)
    assert torch.allclose(linear(logits), linear.linear(logits.softmax(-1)))
    assert torch.allclose(linear(logits), linear(logits + 7), atol=1e-5)  # only probabilities count


@pytest.mark.parametrize("unread", [{"per_class": 2}, {"order": "index"}, {"reduce": "mean"}], ids=str)
def test_an_option_that_a_linear_map_does_not_read_is_refused(unread):
    with pytest.raises(WlsupError, match="linear does not read it"):
        LabelMapSpec(kind="linear", **unread)


@pytest.mark.parametrize("wrong", [{"kind": "table"}, {"order": "up"}, {"reduce": "sum"}, {"per_class": 0}], ids=str)
def test_an_unknown_setting_is_refused(wrong):
    with pytest.raises(WlsupError):
        LabelMapSpec(**wrong)
