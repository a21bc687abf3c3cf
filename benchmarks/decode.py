"""What decoding and cropping a JPEG costs: images/s on one core, each library against plain Pillow.

Run:  python benchmarks/decode.py [--photos TAR] [--quick] [--json]

The task is the training loader's: a JPEG's bytes to a random resized crop of 224 x 224 (area 0.4 to 1, bicubic,
antialiased) as a uint8 tensor, at shorter sides of 256, 512 and 1,024 pixels; every row draws the same boxes. "plain
Pillow" opens, converts to RGB, crops and resizes with Pillow. Every other row goes through the product's own code
(headers parsed, limits checked, EXIF honoured, truncation refused), with the one decoder named. Beside the time stands
how far the crops are from plain Pillow's: largest and mean difference, of 255 levels. Of "auto" a second ratio has both
sides go on to the normalised float batch, by the same function. Pictures are Flickr8k's photos from ../shared/data
enlarged, or, where these are not there, generated ones with a photograph's spectrum.

One thread; CPU time of the process; plain Pillow is timed again before every candidate; a row is the median over the
pairs. Decoders that are not installed are named and left out: pip install wlsup[fast]

Bars: "auto" >= 2.4x plain Pillow at 256, >= 1.7x at 512, >= 3x at 1,024.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wlsup.batch import ImageSpec
from wlsup.data.decoders import DECODERS, available_decoders, open_picture
from wlsup.data.keyed import keyed_random
from wlsup.data.transforms import TrainTransform, normalize, random_crop_box

SPEC = ImageSpec(size=224, resize=256)
SCALE, RATIO = (0.4, 1.0), (3 / 4, 4 / 3)
BARS = {256: 2.4, 512: 1.7, 1024: 3.0}
PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "flickr8k_1k" / "flickr8k_1k_160px.tar"


Load = Callable[[bytes, str], torch.Tensor]


def photographs(path: Path, number: int) -> list[Image.Image]:
    """Read some photos, or make pictures that decode like photos."""
    if path.is_file():
        with tarfile.open(path) as archive:
            members = [member for member in archive if member.name.endswith(".jpg")][:: 1000 // number][:number]
            contents = [archive.extractfile(member).read() for member in members]
        return [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
    made = []
    for seed in range(number):
        random = np.random.default_rng(seed)
        canvas = np.zeros((120, 160, 3))
        for scale in (1, 4, 16, 40):
            noise = random.integers(0, 256, (120 // scale, 160 // scale, 3), dtype=np.uint8)
            canvas += np.asarray(Image.fromarray(noise).resize((160, 120), Image.BICUBIC)) * (scale / 61)
        made.append(Image.fromarray(canvas.clip(0, 255).astype(np.uint8)))
    return made


def enlarged(picture: Image.Image, short: int) -> bytes:
    """Return a JPEG (quality 90) with the given shorter side."""
    scale = short / min(picture.size)
    buffer = io.BytesIO()
    size = (round(picture.width * scale), round(picture.height * scale))
    picture.resize(size, Image.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def plain_pillow(data: bytes, key: str) -> torch.Tensor:
    """The usual loader: Pillow alone."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, height, width = random_crop_box(
        picture.height, picture.width, SCALE, RATIO, keyed_random(0, 0, key, "crop")
    )
    box = (left, top, left + width, top + height)
    view = picture.crop(box).resize((SPEC.size, SPEC.size), Image.BICUBIC)
    return torch.from_numpy(np.array(view)).permute(2, 0, 1)


def product(decoder: str) -> Load:
    """The product's loader with one decoder."""
    transform = TrainTransform(SPEC, SCALE, decoder=decoder)
    return lambda data, key: transform(open_picture(data), keyed_random(0, 0, key, "crop"))


def views(load: Load, pictures: list[bytes]) -> list[torch.Tensor]:
    """Load each picture once."""
    return [load(data, str(number)) for number, data in enumerate(pictures)]


def seconds(load: Load, pictures: list[bytes], passes: int, batch: bool = False) -> float:
    """Time one pass, the mean of ``passes``, in CPU time; with ``batch`` as far as the normalised batch."""
    begin = time.process_time()
    for _ in range(passes):
        loaded = views(load, pictures)
        if batch:
            normalize(loaded, SPEC)
    return (time.process_time() - begin) / passes


def compare(load: Load, pictures: list[bytes], pairs: int, passes: int, batch: bool = False) -> dict[str, float]:
    """Interleave plain Pillow and the candidate."""
    for each in (plain_pillow, load):
        seconds(each, pictures, 1)
    times = [
        (seconds(plain_pillow, pictures, passes, batch), seconds(load, pictures, passes, batch)) for _ in range(pairs)
    ]
    return {
        "ratio": statistics.median(before / after for before, after in times),
        "images_per_second": len(pictures) / statistics.median(after for _, after in times),
        "pillow_per_second": len(pictures) / statistics.median(before for before, _ in times),
    }


def difference(load: Load, pictures: list[bytes]) -> dict[str, float]:
    """Hold the candidate's crops against plain Pillow's."""
    pairs = zip(views(load, pictures), views(plain_pillow, pictures), strict=True)
    levels = torch.stack([(ours.int() - pillow.int()).abs() for ours, pillow in pairs])
    return {"largest_difference": levels.max().item(), "mean_difference": levels.float().mean().item()}


def main() -> int:
    """Print the table; exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="a tar of JPEGs")
    parser.add_argument("--quick", action="store_true", help="few pictures, few pairs")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "opencv" in available_decoders():
        import cv2

        cv2.setNumThreads(1)
    number, pairs = (8, 3) if options.quick else (40, 9)
    photos = photographs(options.photos, number)
    rows, missed = {}, []
    for short, bar in BARS.items():
        pictures = [enlarged(photo, short) for photo in photos]
        passes = 1024 // short  # as much work at every size
        candidates = {name: product(name) for name in DECODERS if name == "auto" or name in available_decoders()}
        for name, load in candidates.items():
            rows[f"{short} {name}"] = row = compare(load, pictures, pairs, passes) | difference(load, pictures)
            if name == "auto":
                row["ratio_to_batch"] = compare(load, pictures, pairs, passes, batch=True)["ratio"]
            if not options.json:
                print(
                    f"{short:>5} px  {name:<12} {row['images_per_second']:>7.0f} images/s  {row['ratio']:.2f}x plain "
                    f"Pillow ({row['pillow_per_second']:.0f}/s)  difference at most {row['largest_difference']:.0f}, "
                    f"mean {row['mean_difference']:.3f}"
                    + (f"  to the batch {row['ratio_to_batch']:.2f}x, bar {bar}" if name == "auto" else ""),
                    flush=True,
                )
        if rows[f"{short} auto"]["ratio"] < bar:
            missed.append(short)
    absent = sorted(set(DECODERS[1:]) - set(available_decoders()))
    if options.json:
        print(json.dumps({"rows": rows, "bars": BARS, "missed": missed, "not_installed": absent}, indent=2))
    else:
        print(f"not installed: {', '.join(absent) or 'none'}; bars missed at: {', '.join(map(str, missed)) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
