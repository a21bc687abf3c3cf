"""The picture of captioned pictures: each is there as it was, with room for all that was said."""

import torch

from wlsup.evaluation.caption_pictures import caption_grid

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def grid(images, *captions):
    normalised = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    generated, references = captions or (["a dog"] * len(images), [["a cat"]] * len(images))
    return caption_grid(normalised, generated, references, MEAN, STD)


def test_pictures_are_shown_in_their_own_colours_one_below_the_other():
    images = torch.rand(2, 3, 64, 64)
    shown = grid(images)
    assert shown.shape[1] == 2 * (128 + 4)
    for row, picture in enumerate(images):
        part = shown[:, row * 132 : row * 132 + 128, :128]
        assert torch.allclose(part[:, ::2, ::2], picture, atol=1 / 255)


def test_generated_and_human_captions_can_be_told_apart_and_change_the_picture():
    images = torch.rand(1, 3, 128, 128)
    first, second, third = (
        grid(images, [said], [[human]]) for said, human in (("a dog", "a cat"), ("a pig", "a cat"), ("a dog", "a pig"))
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)
    swapped = grid(images, ["a cat"], [["a dog"]])
    assert not torch.equal(first, swapped)


def test_rows_grow_with_what_is_said_and_any_text_is_taken():
    images = torch.rand(1, 3, 128, 128)
    short, long = grid(images), grid(images, ["word " * 100], [["long " * 100] * 5])
    assert long.shape[1] > short.shape[1]
    assert long.shape[2] == short.shape[2]
    assert grid(images, ["犬 \N{DOG FACE} собака"], [["", "x" * 500]]).shape[0] == 3
    assert grid(images, [""], [["a"]]).isfinite().all()
