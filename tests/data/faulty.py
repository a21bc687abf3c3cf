"""Data sets with planted faults of every kind."""

import io
import struct
import tarfile
import zlib

import numpy as np
from data_makers import encode, noise_jpeg, write_tar
from native import img2dataset_shard
from PIL import Image

from wlsup.data.shard_index import save_index
from wlsup.data.shards import build_index


def noise(size, seed=0, mode="RGB"):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def broken(data):
    """Bytes with the header and the end in place and rubbish between."""
    return data[:200] + b"\xff\xc4\x00\x03\x99" * 40 + data[-2:]


def bomb():
    """A PNG of 144 megapixels by its header."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1501 * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def plant_faults(root):
    """Write twenty good pictures and ten kinds of faults; return captions, images and {(kind, name)}."""
    folder = root / "images"
    folder.mkdir()
    rows = [(f"good{i:02d}.jpg", f"a good picture number {i}") for i in range(20)]
    files = {name: noise_jpeg(i) for i, (name, _) in enumerate(rows)}
    long_jpeg = encode(noise((300, 300), 50), "JPEG", quality=95)
    files["corrupt.jpg"] = broken(long_jpeg)
    files["truncated.jpg"] = long_jpeg[: len(long_jpeg) * 2 // 3]
    files["zero.jpg"] = b""
    files["tiny.png"] = encode(noise((1, 1)))
    files["huge.png"] = bomb()
    files["copy.jpg"] = files["good03.jpg"]
    rows += [(name, f"caption of {name}") for name in files if not name.startswith("good")]
    rows += [("gone.jpg", "it is not there"), ("speechless.jpg", "  "), ("wordy.jpg", "word " * 10_000)]
    files["speechless.jpg"], files["wordy.jpg"], files["latin.jpg"] = noise_jpeg(60), noise_jpeg(61), noise_jpeg(62)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    table = "image,caption\n" + "".join(f"{name},{caption}\n" for name, caption in rows)
    (root / "captions.csv").write_bytes(table.encode() + b"latin.jpg,caf\xe9 au lait\n")
    expected = {
        ("corrupt", "corrupt.jpg"),
        ("truncated", "truncated.jpg"),
        ("zero-byte", "zero.jpg"),
        ("tiny", "tiny.png"),
        ("huge", "huge.png"),
        ("duplicate", "good03.jpg"),
        ("missing", "gone.jpg"),
        ("captionless", "speechless.jpg"),
        ("overlong", "wordy.jpg"),
        ("not-utf-8", "latin.jpg"),
    }
    return str(root / "captions.csv"), str(folder), expected


def write_faulty_shards(folder):
    """Six shards: one sound, one with bad samples, one cut, one missing, one grown, one whole with fewer samples."""
    folder.mkdir()
    for shard in range(6):
        img2dataset_shard(
            folder / f"{shard}.tar",
            [(f"http://x/{shard}{i}", f"caption {i} of {shard}", noise_jpeg(10 * shard + i)) for i in range(4)],
            stats=False,
        )
    with tarfile.open(folder / "1.tar", "a") as archive:
        for name, data in {
            "a.jpg": b"",
            "a.txt": b"zero bytes",
            "b.jpg": noise_jpeg(77)[:300],
            "b.txt": b"half",
            "c.jpg": noise_jpeg(78),
            "d.txt": b"no picture",
            "../e.jpg": noise_jpeg(79),
            "f.png": encode(noise((4, 4))),
            "f.txt": b"word " * 300,
            "g.jpg": noise_jpeg(0),
            "g.txt": b"again",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    save_index(build_index(sorted(folder.glob("*.tar"))), folder)
    (folder / "2.tar").write_bytes((folder / "2.tar").read_bytes()[:3000])
    (folder / "3.tar").unlink()
    (folder / "4.tar").write_bytes((folder / "4.tar").read_bytes() + bytes(10240))
    write_tar(folder / "5.tar", {"a.jpg": noise_jpeg(99), "a.txt": b"the only one"})
    return folder
