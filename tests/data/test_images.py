from __future__ import annotations

import random
import struct
import time
import zlib

import numpy as np
import pytest
from data_makers import encode, noise_jpeg
from PIL import Image, ImageFile

from wlsup.data.images import UnreadableImage, decode_rgb, is_picture, read_rgb


def corner(data: bytes) -> list[int]:
    return decode_rgb(data)[:, 0, 0].tolist()


def test_a_plain_picture_comes_back_pixel_for_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = decode_rgb(encode(Image.fromarray(pixels)))
    assert tensor.shape == (3, 5, 7)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = np.zeros((24, 16, 3), dtype=np.uint8)
    upright[:8, :, 0] = 255  # red on top
    upright[16:, :8, 2] = 255  # blue below, on the left
    undo = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(undo(upright))), "PNG", exif=exif)
    assert np.array_equal(decode_rgb(data).permute(1, 2, 0).numpy(), upright)


def test_transparency_is_laid_over_white():
    assert corner(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == [255, 255, 255]
    assert corner(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))) == [255, 0, 0]
    assert corner(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))) == [127, 127, 127]
    assert corner(encode(Image.new("LA", (4, 4), (0, 0)))) == [255, 255, 255]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert corner(encode(palette)) == [10, 200, 30]
    assert corner(encode(palette, transparency=1)) == [255, 255, 255]
    assert corner(encode(Image.new("RGB", (4, 4), (9, 9, 9)), transparency=(9, 9, 9))) == [255, 255, 255]


def test_grey_bilevel_and_cmyk_are_converted():
    assert corner(encode(Image.new("L", (4, 4), 77))) == [77, 77, 77]
    assert corner(encode(Image.new("1", (4, 4), 1))) == [255, 255, 255]
    red = corner(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 257, 32_768, 65_535]], dtype=np.uint16)
    try:
        encoded = encode(Image.fromarray(values), kind)
    except OSError as error:
        pytest.skip(f"this Pillow does not write it: {error}")
    assert decode_rgb(encoded)[0, 0].tolist() == [0, 1, 128, 255]


def test_float_and_wide_integers_are_read_or_refused_by_their_range():
    unit = np.linspace(0, 1, 4, dtype=np.float32).reshape(1, 4)
    assert decode_rgb(encode(Image.fromarray(unit), "TIFF"))[0, 0].tolist() == [0, 85, 170, 255]
    assert decode_rgb(encode(Image.fromarray(unit * 255), "TIFF"))[0, 0].tolist() == [0, 85, 170, 255]
    for values in (unit - 0.5, unit * np.nan, unit * 1000):
        with pytest.raises(UnreadableImage, match="floating-point pixels"):
            decode_rgb(encode(Image.fromarray(values), "TIFF"))
    with pytest.raises(UnreadableImage, match="outside 16 bits"):
        decode_rgb(encode(Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_read(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert corner(data) == [255, 0, 0]


def test_truncated_pictures_are_refused_even_when_another_library_allows_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)
    for data in (noise_jpeg(0, (160, 160)), encode(Image.fromarray(noise))):
        for fraction in (0.02, 0.3, 0.6, 0.95):
            with pytest.raises(UnreadableImage):
                decode_rgb(data[: int(len(data) * fraction)])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_what_is_no_picture_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UnreadableImage, match="zero bytes"):
        decode_rgb(b"")
    with pytest.raises(UnreadableImage, match="not a picture of a known format"):
        decode_rgb(b"<html>404 not found</html>")
    with pytest.raises(UnreadableImage, match="No such file"):
        read_rgb(tmp_path / "absent.jpg")
    (tmp_path / "here.jpg").write_bytes(noise_jpeg(1))
    assert read_rgb(tmp_path / "here.jpg").shape == (3, 32, 40)


def test_formats_that_start_other_programs_are_not_opened():
    with pytest.raises(UnreadableImage, match="known format"):
        decode_rgb(encode(Image.new("RGB", (8, 8)), "EPS"))


def empty_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bombs_are_refused_before_they_are_decoded():
    started = time.perf_counter()
    for width, height in ((12_000, 12_000), (60_000, 60_000), (2_000_000_000, 1)):
        with pytest.raises(UnreadableImage, match="pixels"):
            decode_rgb(empty_png(width, height))
    with pytest.raises(UnreadableImage, match=r"more elongated than 100:1"):
        decode_rgb(encode(Image.new("L", (100_000, 1))))
    with pytest.raises(UnreadableImage, match="above the limit of 15"):
        decode_rgb(encode(Image.new("L", (4, 4))), max_pixels=15)
    assert decode_rgb(encode(Image.new("L", (4, 4))), max_pixels=16).shape == (3, 4, 4)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_flipped_bytes_give_a_picture_or_a_reason_never_a_crash(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(pixels), kind)
    chance = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 4, 16))):
            data[int(chance.random() ** 2 * len(data))] = chance.randrange(256)
        try:
            assert decode_rgb(bytes(data)).shape[0] == 3
        except UnreadableImage as error:
            assert error.reason and "\n" not in error.reason


def test_picture_names_are_told_by_their_ending():
    assert is_picture("a/B.JPG") and is_picture("x.webp")
    assert not is_picture("a/._b.jpg") and not is_picture("notes.txt") and not is_picture("jpg")
