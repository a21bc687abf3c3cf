"""What an input program promises: the published equations, in the frozen network's own range of pixels."""

import pytest
import torch

from wlsup.batch import ImageSpec
from wlsup.errors import WlsupError
from wlsup.reprogramming.input import InputProgram, InputSpec

SPEC = ImageSpec(size=16, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.1), resize=16)


def normalised(pixels):
    return (pixels - torch.tensor(SPEC.mean).view(3, 1, 1)) / torch.tensor(SPEC.std).view(3, 1, 1)


def test_the_picture_lies_in_the_middle_and_the_program_around_it():
    program = InputProgram(SPEC, InputSpec(picture_size=8))
    with torch.no_grad():
        program.weight.copy_(torch.randn_like(program.weight))
    white = normalised(torch.ones(2, 3, 16, 16))
    images, clamped = program(white)
    pixels = program.pixels.of(images)
    assert torch.allclose(pixels[..., 4:12, 4:12], torch.ones(2, 3, 8, 8), atol=1e-5)
    frame = torch.ones(16, 16, dtype=torch.bool)
    frame[4:12, 4:12] = False
    expected = ((torch.tanh(program.weight) + 1) / 2)[:, frame]
    assert torch.allclose(pixels[0][:, frame], expected, atol=1e-5)  # P = tanh(W), [-1, 1] to [0, 1]
    assert clamped == 0
    pixels.sum().backward()
    assert program.weight.grad[:, ~frame].abs().max() == 0 < program.weight.grad[:, frame].abs().min()


def test_over_the_picture_the_sum_is_clamped_and_said_to_be():
    program = InputProgram(SPEC, InputSpec(picture_size=8, cover="all"))
    with torch.no_grad():
        program.weight.fill_(10.0)
    images, clamped = program(normalised(torch.ones(1, 3, 16, 16)))
    assert program.pixels.of(images).max() <= 1 + 1e-5
    assert clamped == pytest.approx(64 / 256)  # white + 1 leaves the range where the picture lies, and only there
    assert program.saturation() == 1
    assert InputProgram(SPEC, InputSpec(8)).saturation() == 0


def test_a_program_begins_as_mid_grey_and_its_penalty_counts_the_frame_only():
    program = InputProgram(SPEC, InputSpec(picture_size=8))
    grey = program.pixels.of(program(normalised(torch.zeros(1, 3, 16, 16)))[0])
    assert torch.allclose(grey[..., 0, 0], torch.full((1, 3), 0.5))
    assert program.penalty() == 0
    with torch.no_grad():
        program.weight.fill_(2.0)
    assert program.penalty() == 4 * 3 * (256 - 64)


def test_pictures_are_shrunk_without_aliasing_to_half_the_canvas_by_default():
    assert InputProgram(SPEC).picture_size == 8
    stripes = ((torch.arange(16) % 4 == 1) | (torch.arange(16) % 4 == 2)).float().expand(1, 3, 16, 16)
    placed = InputProgram(SPEC, InputSpec(picture_size=4)).place(normalised(stripes))
    assert placed[..., 7:9, 7:9].abs().max() < 0.3  # fine stripes are grey from afar; without smoothing they are white


@pytest.mark.parametrize("size", [0, 16, 20])
def test_a_picture_without_room_around_it_is_refused(size):
    with pytest.raises(WlsupError, match="must be smaller to leave the program room: give 1 to 15"):
        InputProgram(SPEC, InputSpec(picture_size=size))


def test_an_unknown_cover_is_refused():
    with pytest.raises(WlsupError, match="cover of the program"):
        InputSpec(cover="corner")
