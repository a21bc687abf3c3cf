from __future__ import annotations

import io
import random
import tarfile

import numpy as np
import pytest
import torch
from data_makers import encode, noise_jpeg
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from wlsup.batch import ImageSpec
from wlsup.data import decoders
from wlsup.data.decoders import (
    DECODERS,
    JpegPicture,
    available_decoders,
    check_decoder,
    decode,
    open_picture,
    reduction_of,
)
from wlsup.data.images import UnreadableImage, decode_rgb
from wlsup.data.jpeg import jpeg_header
from wlsup.data.keyed import keyed_random
from wlsup.data.transforms import TrainTransform, random_crop_box
from wlsup.errors import WlsupError

BICUBIC = InterpolationMode.BICUBIC
WHOLE = [
    name for name in ("simplejpeg", "torchvision", "opencv", "pil", "auto") if name in ("auto", *available_decoders())
]
REDUCED = [name for name in ("simplejpeg", "opencv", "pil_draft", "auto") if name in ("auto", *available_decoders())]


def photo(short: int = 300, seed: int = 0) -> Image.Image:
    """A picture with a photograph's spectrum: noise at several scales."""
    random_ = np.random.default_rng(seed)
    canvas = np.zeros((short, short * 4 // 3, 3))
    for scale in (4, 16, 64):
        noise = random_.integers(0, 256, (short // scale + 1, short * 4 // 3 // scale + 1, 3), dtype=np.uint8)
        canvas += np.asarray(Image.fromarray(noise).resize((short * 4 // 3, short), Image.BICUBIC)) * (scale / 84)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, **options) -> bytes:
    return encode(picture, "JPEG", **{"quality": 88, **options})


PICTURES = {
    "4:2:0": jpeg(photo(), subsampling=2),
    "4:4:4": jpeg(photo(), subsampling=0),
    "4:2:2": jpeg(photo(), subsampling=1),
    "progressive": jpeg(photo(), progressive=True),
    "grey": jpeg(photo().convert("L")),
    "odd sides": jpeg(photo().crop((0, 0, 313, 251))),
    "tiny": noise_jpeg(0, (4, 4)),
    "restart markers": jpeg(photo(), restart_marker_blocks=5),
}


@pytest.mark.parametrize("decoder", WHOLE)
@pytest.mark.parametrize("kind", PICTURES)
def test_a_whole_jpeg_has_pillow_s_pixels_whatever_decodes_it(decoder, kind):
    assert isinstance(open_picture(PICTURES[kind]), JpegPicture)
    ours = decode(PICTURES[kind], decoder=decoder)
    assert torch.equal(ours, decode_rgb(PICTURES[kind])) and ours.dtype == torch.uint8


@pytest.mark.parametrize("decoder", REDUCED)
@pytest.mark.parametrize("kind", sorted(set(PICTURES) - {"tiny"}))
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_jpeg_has_the_same_pixels_whatever_decodes_it(decoder, kind, reduction):
    picture = open_picture(PICTURES[kind])
    name = REDUCED[0] if decoder == "auto" else decoder
    ours, reference = picture._decode(name, reduction), picture._decode("pil_draft", reduction)
    assert ours is not None and reference is not None
    assert ours.shape[-2:] == tuple(-(-side // reduction) for side in picture.shape[-2:])
    assert torch.equal(ours, reference)


def enlarged(shared_data, short: int, number: int) -> list[bytes]:
    with tarfile.open(shared_data / "flickr8k_1k" / "flickr8k_1k_160px.tar") as archive:
        photos = [archive.extractfile(m).read() for m in archive if m.name.endswith(".jpg")][:number]
    found = []
    for data in photos:
        small = Image.open(io.BytesIO(data))
        scale = short / min(small.size)
        large = small.resize((round(small.width * scale), round(small.height * scale)), Image.BICUBIC)
        found.append(jpeg(large, quality=92))
    return found


@pytest.mark.parametrize("decoder", REDUCED)
@pytest.mark.parametrize("short", [500, 1000])
def test_a_reduced_view_of_a_photograph_is_exact_enough(shared_data, decoder, short):
    errors, mean = [], []
    for seed, large in enumerate(enlarged(shared_data, short, 6)):
        picture = open_picture(large)
        top, left = 8 * seed, 16 * seed
        height, width = (side // 8 * 8 - 96 for side in picture.shape[1:])  # on the grid: the same crop
        assert reduction_of(height, width, 112) >= 2
        view = picture.resized_crop(top, left, height, width, 112, BICUBIC, decoder)
        exact = vision.resized_crop(decode_rgb(large), top, left, height, width, [112, 112], BICUBIC, antialias=True)
        difference = view.float() - exact.float()
        errors.append(10 * torch.log10(255**2 / difference.square().mean()).item())
        mean.append(difference.abs().mean().item())
    assert min(errors) > 30 and max(mean) < 3, (errors, mean)


def mean_difference_from_pillow(data: bytes, box: tuple[int, int, int, int], size: int) -> float:
    top, left, height, width = box
    pillow = Image.open(io.BytesIO(data)).crop((left, top, left + width, top + height))
    theirs = torch.from_numpy(np.array(pillow.resize((size, size), Image.BICUBIC))).permute(2, 0, 1)
    ours = open_picture(data).resized_crop(*box, size, BICUBIC)
    return (ours.float() - theirs.float()).abs().mean().item()


@pytest.mark.parametrize(("short", "most"), [(512, 1), (1024, 2)])
def test_random_crops_stay_near_pillow_s_and_only_shrunk_ones_differ(shared_data, short, most):
    differences = {True: [], False: []}
    for number, data in enumerate(enlarged(shared_data, short, 12)):
        sides = open_picture(data).shape[1:]
        box = random_crop_box(*sides, (0.4, 1.0), (3 / 4, 4 / 3), keyed_random(0, 0, str(number)))
        reduced = reduction_of(box[2], box[3], 224) > 1
        differences[reduced].append(mean_difference_from_pillow(data, box, 224))
    assert np.mean(differences[True] + differences[False]) < most and max(differences[False], default=0) < 0.1


def test_edges_are_snapped_to_the_nearest_of_the_grid(shared_data):
    # By a quarter of a pixel of the picture at 1/4: 2.8 levels. Cutting the fractions off would shift it by three
    # quarters: 8.1 levels. A box on the grid gives 0.6.
    data = enlarged(shared_data, 1024, 6)
    assert np.mean([mean_difference_from_pillow(picture, (3, 3, 960, 960), 224) for picture in data]) < 4
    assert np.mean([mean_difference_from_pillow(picture, (4, 4, 960, 960), 224) for picture in data]) < 1


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_the_exact_decoders_give_the_exact_crop(decoder):
    data = PICTURES["4:2:0"]
    view = open_picture(data).resized_crop(10, 20, 280, 350, 32, BICUBIC, decoder)
    assert torch.equal(view, vision.resized_crop(decode_rgb(data), 10, 20, 280, 350, [32, 32], BICUBIC, antialias=True))


def test_nothing_is_reduced_below_the_crop_s_final_size():
    assert [reduction_of(side, 9999, 224) for side in (100, 447, 448, 895, 896, 1791, 1792, 9000)] == [
        1,
        1,
        2,
        2,
        4,
        4,
        8,
        8,
    ]
    for side in range(224, 2000, 7):
        assert side // reduction_of(side, side, 224) >= 224


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("decoder", WHOLE)
def test_exif_rotation_is_applied_by_every_decoder(orientation, decoder):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(photo(96), exif=exif)
    picture = open_picture(data)
    assert isinstance(picture, JpegPicture) and picture.shape == decode_rgb(data).shape
    assert torch.equal(picture.pixels(decoder), decode_rgb(data))
    crop = picture.resized_crop(8, 16, 64, 72, 16, BICUBIC, decoder).float()
    exact = vision.resized_crop(decode_rgb(data), 8, 16, 64, 72, [16, 16], BICUBIC, antialias=True).float()
    assert (crop - exact).abs().mean() < 6


def xmp_rotated() -> bytes:
    plain = jpeg(photo(64))
    body = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    return plain[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + plain[2:]


@pytest.mark.parametrize(
    "data",
    [
        jpeg(Image.new("CMYK", (16, 16), (0, 255, 255, 0))),
        jpeg(photo(32), keep_rgb=True),
        encode(photo(32), "PNG"),
        xmp_rotated(),
    ],
    ids=["cmyk", "rgb", "png", "xmp"],
)
def test_what_decoders_may_treat_differently_is_left_to_pillow(data):
    assert jpeg_header(data) is None
    assert torch.equal(open_picture(data), decode_rgb(data)) and torch.equal(decode(data), decode_rgb(data))


def verdict(function):
    try:
        return function()
    except UnreadableImage as error:
        return error.reason


@pytest.mark.parametrize("decoder", sorted({*WHOLE, *REDUCED}))
@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "restart markers"])
def test_truncated_jpegs_are_refused_by_every_decoder_as_by_pillow(decoder, kind):
    data = PICTURES[kind]
    for fraction in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.995):
        cut = data[: int(len(data) * fraction)]
        with pytest.raises(UnreadableImage):
            decode_rgb(cut)
        with pytest.raises(UnreadableImage):
            decode(cut, decoder=decoder)
        with pytest.raises(UnreadableImage):
            opened = open_picture(cut)
            opened.resized_crop(0, 0, 280, 390, 32, BICUBIC, decoder)


@pytest.mark.parametrize("decoder", WHOLE)
def test_flipped_bytes_get_pillow_s_verdict_from_every_decoder(decoder):
    chance = random.Random(1)
    whole = jpeg(photo(48))
    for _ in range(120):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 4, 16))):
            data[int(chance.random() ** 2 * len(data))] = chance.randrange(256)
        data = bytes(data)
        ours, pillow = (
            verdict(lambda data=data: decode(data, decoder=decoder)),
            verdict(lambda data=data: decode_rgb(data)),
        )
        assert isinstance(ours, str) == isinstance(pillow, str), (ours, pillow)
        if not isinstance(ours, str):
            assert ours.shape == pillow.shape


def test_bombs_are_refused_by_their_headers():
    data = bytearray(jpeg(photo(64)))
    frame = data.index(b"\xff\xc0")
    for height, width in ((60_000, 60_000), (65_000, 8)):
        data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        with pytest.raises(UnreadableImage, match="pixels, (above|more elongated)"):
            open_picture(bytes(data))
    with pytest.raises(UnreadableImage, match="above the limit of 100"):
        decode(jpeg(photo(64)), max_pixels=100)


def test_training_views_are_keyed_and_the_same_with_every_reducing_decoder():
    spec = ImageSpec(size=32, resize=36)
    views = [
        TrainTransform(spec, decoder=name)(open_picture(PICTURES["4:2:0"]), keyed_random(0, 3, "k")) for name in REDUCED
    ]
    assert views[0].shape == (3, 32, 32) and all(torch.equal(view, views[0]) for view in views)
    exact = TrainTransform(spec, decoder="pil")(open_picture(PICTURES["4:2:0"]), keyed_random(0, 3, "k"))
    assert torch.equal(exact, TrainTransform(spec)(decode_rgb(PICTURES["4:2:0"]), keyed_random(0, 3, "k")))


def test_an_unknown_or_absent_decoder_is_refused_with_those_there_are(monkeypatch):
    with pytest.raises(WlsupError, match="Unknown decoder 'turbo'.*Valid: auto, simplejpeg"):
        check_decoder("turbo")
    monkeypatch.setattr(decoders, "available_decoders", lambda: ("torchvision", "pil_draft", "pil"))
    with pytest.raises(WlsupError, match=r"decoder='opencv' is not installed.*torchvision.*wlsup\[fast\]"):
        check_decoder("opencv")
    assert all(check_decoder(name) for name in ("auto", "pil", "pil_draft", "torchvision")) and DECODERS[0] == "auto"


def test_without_the_extra_libraries_auto_falls_back(monkeypatch):
    monkeypatch.setattr(decoders, "available_decoders", lambda: ("torchvision", "pil_draft", "pil"))
    used = []
    for name, function in list(decoders._LIBRARIES.items()):
        monkeypatch.setitem(
            decoders._LIBRARIES, name, lambda *a, name=name, function=function: used.append(name) or function(*a)
        )
    picture = open_picture(PICTURES["4:2:0"])
    picture.pixels()
    picture.resized_crop(0, 0, 280, 390, 32, BICUBIC)
    assert used == ["torchvision", "pil_draft"]
