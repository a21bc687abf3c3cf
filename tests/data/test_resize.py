from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from wlsup.data.images import decode_rgb
from wlsup.data.keyed import keyed_random
from wlsup.data.resize import resized_crop
from wlsup.data.transforms import random_crop_box

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


def picture(channels_last: bool, height: int = 90, width: int = 120) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if channels_last:
        return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("interpolation", [BICUBIC, BILINEAR])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("box", [(0, 0, 90, 120), (7, 11, 64, 80), (60, 90, 30, 30), (5, 5, 1, 40), (3, 4, 32, 32)])
def test_a_resized_crop_has_torchvision_s_very_pixels(interpolation, channels_last, box):
    whole = picture(channels_last)
    before = whole.clone()
    view = resized_crop(whole, *box, 32, interpolation)
    assert torch.equal(view, vision.resized_crop(whole, *box, [32, 32], interpolation, antialias=True))
    assert view.shape == (3, 32, 32) and torch.equal(whole, before)


def test_a_random_crop_of_a_photograph_is_within_rounding_of_pillow_s(shared_data):
    largest, mean = 0, []
    with tarfile.open(shared_data / "flickr8k_1k" / "flickr8k_1k_160px.tar") as archive:
        photos = [archive.extractfile(m).read() for m in archive if m.name.endswith(".jpg")][:12]
    for number, data in enumerate(photos):
        pillow = Image.open(io.BytesIO(data)).convert("RGB")
        top, left, height, width = random_crop_box(
            pillow.height, pillow.width, (0.4, 1.0), (3 / 4, 4 / 3), keyed_random(0, 0, str(number))
        )
        theirs = np.asarray(pillow.crop((left, top, left + width, top + height)).resize((224, 224), Image.BICUBIC))
        ours = resized_crop(decode_rgb(data), top, left, height, width, 224, BICUBIC).permute(1, 2, 0).numpy()
        levels = np.abs(theirs.astype(int) - ours.astype(int))
        largest, mean = max(largest, levels.max()), [*mean, levels.mean()]
    assert largest <= 4 and np.mean(mean) < 0.1, (largest, np.mean(mean))
