"""What word labels promise: whole words, one class or none."""

import pytest

from wlsup.data.mini import mini_captions
from wlsup.errors import WlsupError
from wlsup.reprogramming.labels import MINI_GROUNDS, WordLabels


def test_a_caption_belongs_to_the_one_class_whose_words_it_has():
    labels = WordLabels({"in": ["kitchen", "living room"], "out": ["street", "sea"]})
    captions = [
        "A Kitchen.",
        "a living room",
        "a seat",
        "the sea, from the kitchen",
        "nothing",
        "streets",
        "street-art",
    ]
    assert labels(captions).tolist() == [0, 0, -1, -1, -1, -1, 1]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ({"a": ["x"]}, "at least two classes"),
        ({"a": ["x"], "b": []}, "needs a list of words"),
        ({"a": ["x"], "b": "word"}, "needs a list of words"),
        ({"a": ["x"], "b": ["X"]}, "stands for 'a' and 'b'"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(classes, said):
    with pytest.raises(WlsupError, match=said):
        WordLabels(classes)


def test_the_mini_grounds_are_those_of_the_scenes():
    scenes, labels = mini_captions("validation", 150), WordLabels(MINI_GROUNDS)
    found = {(scene.ground, label) for scene, texts in zip(scenes.scenes, scenes.captions, strict=True)
             for label in labels(texts).tolist() if label >= 0}  # fmt: skip
    named = {(ground, labels.names[label]) for ground, label in found}
    assert len({label for _, label in named}) == 10
    assert all(ground == label for ground, label in named), named
