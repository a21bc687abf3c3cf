"""Draw the README's pictures from the code: ``python docs/figures.py``."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from wlsup.batch import ImageSpec
from wlsup.data.mini import MINI_EVAL_SETS, mini_captions, mini_eval_set

HERE = Path(__file__).parent
SIDE, MARGIN = 160, 12


def enlarged(picture: torch.Tensor) -> Image.Image:
    """Return a uint8 (3, H, W) picture at the sheet's size."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def scenes(columns: int = 5, rows: int = 2) -> Image.Image:
    """Lay out captioned scenes, one caption under each."""
    drawn = mini_captions("train", columns * rows, seed=0)
    text_height = 66
    sheet = Image.new("RGB", (columns * (SIDE + MARGIN) + MARGIN, rows * (SIDE + text_height + MARGIN)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for index in range(columns * rows):
        left = MARGIN + (index % columns) * (SIDE + MARGIN)
        top = MARGIN + (index // columns) * (SIDE + text_height + MARGIN)
        sheet.paste(enlarged(drawn.images[index]), (left, top))
        words = "\n".join(textwrap.wrap(drawn.captions[index][0], 28)[:4])
        draw.multiline_text((left, top + SIDE + 4), words, fill="black", font=font, spacing=2)
    return sheet


def eval_sets(columns: int = 8) -> Image.Image:
    """Lay out a row of each evaluation set, its name in front."""
    spec = ImageSpec(64, (0.0,) * 3, (1.0,) * 3, resize=64)
    name_width = 120
    rows = len(MINI_EVAL_SETS)
    sheet = Image.new("RGB", (name_width + columns * (SIDE + MARGIN), rows * (SIDE + MARGIN) + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for row, name in enumerate(MINI_EVAL_SETS):
        top = MARGIN + row * (SIDE + MARGIN)
        draw.text((6, top + SIDE // 2), name, fill="black", font=font)
        test = mini_eval_set(name, spec).test
        for column in range(columns):
            picture = (test[column][0] * 255).round().to(torch.uint8)
            sheet.paste(enlarged(picture), (name_width + column * (SIDE + MARGIN), top))
    return sheet


if __name__ == "__main__":
    scenes().save(HERE / "mini_scenes.png", optimize=True)
    eval_sets().save(HERE / "mini_eval_sets.png", optimize=True)
