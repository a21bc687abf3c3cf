"""The mini world: the same bytes everywhere, splits that share nothing, captions that are true and never say it all."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from wlsup.batch import ImageSpec
from wlsup.data.mini import (
    CAPTIONS_PER_IMAGE,
    MINI_EVAL_SETS,
    MINI_SPLITS,
    mini_captions,
    mini_eval_set,
    pretraining_pictures,
)
from wlsup.data.mini_grammar import (
    MAX_WORDS,
    MIN_WORDS,
    describe,
    facts_of,
    place_of,
    relations_of,
)
from wlsup.data.mini_grounds import COLOURS, GROUNDS
from wlsup.data.mini_render import SHAPES, Draws, coverage, local_axes, noise
from wlsup.data.mini_scenes import Scene, SceneObject, caption_scene
from wlsup.data.mini_words import COLOUR_WORDS, SHAPE_WORDS
from wlsup.errors import WlsupError

SPEC = ImageSpec(size=64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), resize=64)


def digest(images: torch.Tensor, *texts: str) -> str:
    found = hashlib.sha256(images.contiguous().numpy().tobytes())
    found.update("\n".join(texts).encode())
    return found.hexdigest()[:16]


def picture_names(images: torch.Tensor) -> set[bytes]:
    return {hashlib.sha256(image.numpy().tobytes()).digest() for image in images}


@pytest.fixture(scope="module")
def splits():
    return {split: mini_captions(split, 300, seed=0) for split in MINI_SPLITS}


@pytest.fixture(scope="module")
def eval_sets():
    return {name: mini_eval_set(name, SPEC) for name in MINI_EVAL_SETS}


# The values are copied from this code's own output: they say that every machine paints and writes the same.
@pytest.mark.parametrize(
    ("split", "expected"),
    list(zip(MINI_SPLITS, ("1183be5b8acd13b3", "00d32015d3857f3a", "f069959c02b140c8"), strict=True)),
)
def test_scenes_and_captions_have_the_committed_bytes(splits, split, expected):
    part = splits[split]
    assert digest(part.images[:20], *(text for group in part.captions[:20] for text in group)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    list(
        zip(
            MINI_EVAL_SETS,
            ("48515f6ee1bd20dc", "f87c26a58d6be05c", "7cdf20ae8ef9b1af", "74aff08994c34536"),
            strict=True,
        )
    ),
)
def test_eval_sets_have_the_committed_bytes(eval_sets, name, expected):
    found = eval_sets[name]
    pictures = torch.cat([found.train.pictures[:20], found.test.pictures[:20]])
    assert digest(pictures, str(found.train.labels.tolist())) == expected


def test_a_smaller_size_is_a_prefix_and_another_seed_another_world(splits):
    small = mini_captions("train", 7, seed=0)
    assert torch.equal(small.images, splits["train"].images[:7])
    assert small.captions == splits["train"].captions[:7]
    other = mini_captions("train", 7, seed=1)
    assert not picture_names(other.images) & picture_names(splits["train"].images)
    assert not set(other.keys) & set(splits["train"].keys)


def test_pretraining_pictures_are_those_of_the_pretrain_split(splits):
    assert torch.equal(pretraining_pictures(5, seed=0, start=3), splits["pretrain"].images[3:8])


def test_splits_share_no_key_no_picture_and_no_caption(splits):
    for first, second in (("pretrain", "train"), ("pretrain", "validation"), ("train", "validation")):
        a, b = splits[first], splits[second]
        assert not set(a.keys) & set(b.keys)
        assert not picture_names(a.images) & picture_names(b.images)
        assert not {text for group in a.captions for text in group} & {text for group in b.captions for text in group}
    for part in splits.values():
        assert len(set(part.keys)) == len(part)
        assert len(picture_names(part.images)) == len(part)


def test_every_picture_has_several_different_captions(splits):
    for part in splits.values():
        assert all(len(set(group)) == CAPTIONS_PER_IMAGE >= 3 for group in part.captions)


def test_captions_have_five_to_twenty_five_words_from_a_vocabulary_of_a_few_hundred(splits):
    captions = [text for part in splits.values() for group in part.captions for text in group]
    for text in captions:
        assert MIN_WORDS <= len(text.replace(",", "").split()) <= MAX_WORDS
        assert text == text.lower().strip()
        assert "  " not in text
    assert 150 <= len({word for text in captions for word in text.split()}) <= 400
    assert len(set(captions)) > 0.95 * len(captions)


def test_captions_say_something_and_never_everything():
    for index in range(150):
        scene = caption_scene(Draws(1, index))
        everything = facts_of(scene)
        for attempt in range(6):
            caption = describe(scene, Draws(2, index, attempt))
            assert len(caption.facts) >= 2
            assert caption.facts < everything


def test_captions_name_only_shapes_and_colours_that_are_there():
    shapes = {word: shape for shape, pairs in SHAPE_WORDS.items() for pair in pairs for word in pair}
    for index in range(150):
        scene = caption_scene(Draws(3, index))
        there = {thing.shape for thing in scene.objects}
        colours = {thing.colour for thing in scene.objects} | {thing.texture_colour for thing in scene.objects}
        colours |= set(scene.ground_colours)
        allowed = {word for colour in colours for word in COLOUR_WORDS[colour]}
        # Words that grounds use for themselves, whatever the objects are.
        allowed |= {"green", "blue", "red", "grey", "brown"} & set(_ground_words(scene))
        for attempt in range(6):
            words = describe(scene, Draws(4, index, attempt)).text.split()
            for colour in (word for names in COLOUR_WORDS.values() for word in names if " " not in word):
                assert colour not in words or colour in allowed, (words, colour)
            for noun in (word for word in shapes if " " not in word):
                # "half circle", "brown planks" and "with rings" use a shape's noun for something else.
                if noun in words and noun not in ("circle", "circles", "plank", "planks", "rings"):
                    assert shapes[noun] in there, (words, noun)


def _ground_words(scene: Scene) -> list[str]:
    from wlsup.data.mini_words import GROUND_PHRASES

    return " ".join(GROUND_PHRASES[scene.ground]).split()


def _thing(x: float, y: float, radius: float = 9.0) -> SceneObject:
    return SceneObject("circle", "red", "medium", "plain", "white", x, y, radius, 0.0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((12, 32), (50, 32), ["left of"]),
        ((50, 32), (12, 32), ["right of"]),
        ((32, 12), (32, 50), ["above"]),
        ((32, 50), (32, 12), ["below"]),
        ((20, 32), (40, 32), ["left of", "near"]),
        ((20, 20), (45, 45), []),
    ],
)
def test_relations_follow_the_geometry(first, second, expected):
    scene = Scene(np.zeros((3, 64, 64), np.uint8), [_thing(*first), _thing(*second)], "sand", ())
    assert [relation for relation in relations_of(scene, 0, 1) if relation != "far from"] == expected


def test_inside_and_overlap_come_from_the_scene_and_have_a_converse():
    scene = Scene(np.zeros((3, 64, 64), np.uint8), [_thing(32, 32, 16), _thing(32, 32, 5)], "sand", ())
    scene.inside = [(1, 0)]
    assert relations_of(scene, 1, 0) == ["inside"]
    assert relations_of(scene, 0, 1) == ["around"]
    scene.inside, scene.overlap = [], [(1, 0)]
    assert relations_of(scene, 1, 0) == ["covering"]
    assert relations_of(scene, 0, 1) == ["behind"]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [(10, 10, "top left"), (32, 54, "bottom"), (54, 32, "right"), (32, 32, "middle"), (27, 41, None)],
)
def test_places_follow_the_geometry(x, y, expected):
    scene = Scene(np.zeros((3, 64, 64), np.uint8), [_thing(x, y)], "sand", ())
    assert place_of(scene, 0) == expected


def test_objects_lie_apart_unless_they_overlap_or_nest_and_none_is_cut_off():
    counts = set()
    for index in range(300):
        scene = caption_scene(Draws(5, index))
        counts.add(len(scene.objects))
        joined = {frozenset(pair) for pair in scene.inside + scene.overlap}
        for i, a in enumerate(scene.objects):
            assert min(a.x, a.y) >= a.radius
            assert max(a.x, a.y) <= 64 - a.radius
            for j in range(i):
                b = scene.objects[j]
                if frozenset((i, j)) not in joined:
                    assert (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius) ** 2
    assert counts == {1, 2, 3, 4}


def test_an_object_shows_its_named_colour_against_its_ground():
    for index in range(120):
        scene = caption_scene(Draws(6, index))
        if len(scene.objects) > 1 or scene.dim or scene.objects[0].texture != "plain":
            continue
        thing = scene.objects[0]
        u, v = local_axes((slice(0, 64), slice(0, 64)), thing.x, thing.y, thing.angle)
        mask = coverage(SHAPES[thing.shape](u / thing.radius, v / thing.radius) * thing.radius) > 0.99
        seen = scene.image[:, mask].mean(axis=1)
        apart = {name: float(np.abs(seen - np.array(rgb)).sum()) for name, rgb in COLOURS.items()}
        assert min(apart, key=apart.get) == thing.colour


def test_every_ground_shape_and_split_is_drawn():
    scenes = [caption_scene(Draws(7, index)) for index in range(400)]
    assert {scene.ground for scene in scenes} == set(GROUNDS)
    assert {thing.shape for scene in scenes for thing in scene.objects} == set(SHAPES)
    assert any(scene.dim for scene in scenes)
    assert any(scene.inside for scene in scenes)
    assert any(scene.overlap for scene in scenes)


def test_noise_is_exact_in_any_order_of_summation():
    from wlsup.data.mini_render import _interpolation

    values = Draws(8).bytes(9, 9)
    exact = _interpolation(8).astype(np.float64) @ values.astype(np.float64) @ _interpolation(8).T.astype(np.float64)
    assert np.array_equal((exact.astype(np.float32) / np.float32(255)), noise(Draws(8), 8))


@pytest.mark.parametrize("name", MINI_EVAL_SETS)
def test_eval_sets_are_balanced_and_sized(eval_sets, name):
    found = eval_sets[name]
    assert found.name == name
    assert found.domain == ("in" if name == "mini_shapes" else "out")
    assert len(found.class_names) == 10
    assert len(found.train), len(found.test) == (1000, 500)
    assert torch.bincount(found.train.labels).tolist() == [100] * 10
    assert torch.bincount(found.test.labels).tolist() == [50] * 10
    image, label = found.train[3]
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.float32
    assert isinstance(label, int)
    images, labels = found.test.tensors()
    assert torch.equal(images[5], found.test[5][0])
    assert int(labels[5]) == found.test[5][1]
    assert torch.equal(images[5], (found.test.pictures[5].float() / 255 - 0.5) / 0.25)


def test_eval_sets_share_no_picture_with_pretraining_or_with_one_another(eval_sets, splits):
    seen = picture_names(splits["pretrain"].images) | picture_names(pretraining_pictures(500, seed=1))
    for found in eval_sets.values():
        for half in (found.train, found.test):
            names = picture_names(half.pictures)
            assert len(names) == len(half)
            assert not names & seen
            seen |= names


def test_digits_are_real_handwriting_and_no_writing_is_in_both_halves():
    from sklearn.datasets import load_digits

    from wlsup.data import mini_evalsets

    images, targets = mini_evalsets._handwritten()
    digits = load_digits()
    assert np.array_equal(images[:, 1:9, 1:9], np.minimum(digits.images * 16, 255).astype(np.float32))
    assert np.array_equal(targets, digits.target)
    chosen = mini_evalsets._chosen_digits(102, targets)
    assert len(set(chosen.tolist())) == len(chosen) == 1500


def test_another_size_is_resampled_and_the_encoders_statistics_are_used():
    spec = ImageSpec(size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    small, full = mini_eval_set("mini_shapes", spec).test, mini_eval_set("mini_shapes", SPEC).test
    image = small[0][0]
    assert image.shape == (3, 32, 32)
    back = image * torch.tensor(spec.std).view(3, 1, 1) + torch.tensor(spec.mean).view(3, 1, 1)
    halves = (full[0][0] * 0.25 + 0.5).view(3, 32, 2, 32, 2).mean((2, 4))
    assert (back - halves).abs().mean() < 0.02
    assert back.min() >= 0
    assert back.max() <= 1


def test_mistakes_are_told():
    with pytest.raises(WlsupError, match="pretrain, train, validation"):
        mini_captions("test", 4)
    with pytest.raises(WlsupError, match="at least 1"):
        mini_captions("train", 0)
    with pytest.raises(WlsupError, match="mini_shapes"):
        mini_eval_set("mini_shape", SPEC)


def test_more_test_pictures_come_after_the_500():
    few, many = (mini_eval_set("mini_textures", SPEC, more) for more in (0, 30))
    assert (len(many.train), len(many.test)) == (len(few.train), len(few.test) + 30)
    assert torch.equal(many.test.pictures[: len(few.test)], few.test.pictures)
    assert torch.equal(many.train.pictures, few.train.pictures)
    assert many.test.labels[-30:].bincount().tolist() == [3] * 10
    with pytest.raises(WlsupError, match="no more than 500"):
        mini_eval_set("mini_digits", SPEC, 30)
