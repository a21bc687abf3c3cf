"""Pictures with what was said of them beside them, as one picture, for TensorBoard."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["caption_grid"]

_TEXT_WIDTH = 480
_FONT_SIZE = 18  # readable in TensorBoard too, which shows pictures at two thirds of their size
_LINE = 22
_CHARACTERS = 50
_GENERATED, _HUMAN = (170, 60, 0), (70, 70, 70)


def caption_grid(
    images: Tensor,
    generated: Sequence[str],
    references: Sequence[Sequence[str]],
    mean: Sequence[float],
    std: Sequence[float],
    least_side: int = 128,
) -> Tensor:
    """Lay out one row a picture: the picture, the generated caption in colour, and below it people's in grey.

    Pillow's own font draws the text; letters that it lacks are boxes, so log the text as text too.

    Args:
        images: (B, 3, H, W), normalised.
        generated: B captions.
        references: B lists of human captions.
        mean: of the normalisation, per channel.
        std: of the normalisation, per channel.
        least_side: small pictures are enlarged, by whole factors and without smoothing, to at least this many pixels.

    Returns:
        (3, rows, columns) in [0, 1], white between the rows.
    """
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    pixels = (images.float().cpu() * scale + shift).clamp(0, 1)
    factor = max(1, -(-least_side // images.shape[-2]))
    pixels = pixels.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    rows = [
        _row((255 * picture).round().byte().permute(1, 2, 0).numpy(), caption, humans)
        for picture, caption, humans in zip(pixels, generated, references, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows)).permute(2, 0, 1).float() / 255


def _row(picture: np.ndarray, generated: str, references: Sequence[str]) -> np.ndarray:
    lines = [(line, _GENERATED) for line in textwrap.wrap(generated or "(nothing)", _CHARACTERS)]
    lines += [(line, _HUMAN) for reference in references for line in textwrap.wrap(reference, _CHARACTERS)]
    height, width = picture.shape[:2]
    canvas = Image.new("RGB", (width + _TEXT_WIDTH, max(height, _LINE * len(lines)) + 4), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=_FONT_SIZE)
    for number, (line, colour) in enumerate(lines):
        draw.text((width + 8, _LINE * number), line, fill=colour, font=font)
    return np.asarray(canvas)
