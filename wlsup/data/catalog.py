"""What ``wlsup data fetch`` knows: each data set's official address, checksum, size, licence and layout on disk.

The checksums of CIFAR, SVHN, EuroSAT and DTD are those torchvision publishes; COCO's are those its users agree on.
This file is plain data and imports neither torch nor the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

from wlsup.errors import choose

__all__ = ["CATALOG", "CatalogEntry", "RemoteFile", "catalog_entry"]

_GB = 1_000_000_000
_MB = 1_000_000


@dataclass(frozen=True)
class RemoteFile:
    """One file to download.

    Args:
        url: its official address.
        size: in bytes, for the free-space check and the progress; about right is enough. None if unknown.
        md5: published checksum, as 32 hexadecimal digits; None if none is published.
        sha256: likewise, 64 digits.
        unpacked: bytes it takes once unpacked; 0 for a file that is used as it is.
        gives: paths below ``ROOT/name/`` that are there once this file is in place; ``*`` matches any one name.
    """

    url: str
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None
    unpacked: int = 0
    gives: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name, as its address ends."""
        return PurePosixPath(urlsplit(self.url).path).name

    @property
    def is_archive(self) -> bool:
        """Whether the file is unpacked after it is verified."""
        return self.name.lower().endswith((".tar.gz", ".tgz", ".tar", ".zip"))


@dataclass(frozen=True)
class CatalogEntry:
    """One data set.

    Args:
        name: as the commands know it; its files lie in ``ROOT/name/``.
        title: in words.
        kind: "captions" for a source of captioned pictures, "eval" for a labelled set.
        files: what to download; empty where nothing can be.
        layout: the tree after unpacking, one line a folder or file.
        licence: what may be done with it, in a sentence.
        by_hand: how to get what cannot be downloaded; "" where ``files`` suffices.
        by_hand_gives: as `RemoteFile.gives`, of what is got by hand.
        domain: of an eval set, relative to pretraining on ImageNet: "in" or "out".
        samples: expected number by split.
    """

    name: str
    title: str
    kind: Literal["captions", "eval"]
    files: tuple[RemoteFile, ...]
    layout: tuple[str, ...]
    licence: str
    by_hand: str = ""
    by_hand_gives: tuple[str, ...] = ()
    domain: Literal["in", "out"] | None = None
    samples: dict[str, int] = field(default_factory=dict)

    @property
    def markers(self) -> tuple[str, ...]:
        """Paths below ``ROOT/name/`` that are there once the set is complete."""
        return (*(path for file in self.files for path in file.gives), *self.by_hand_gives)

    @property
    def download_bytes(self) -> int:
        """Bytes to download, as far as known."""
        return sum(file.size or 0 for file in self.files)

    @property
    def disk_bytes(self) -> int:
        """Bytes needed while downloading and unpacking."""
        return self.download_bytes + sum(file.unpacked for file in self.files)


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"
_COCO = "http://images.cocodataset.org/"

_ENTRIES = (
    CatalogEntry(
        "cifar10",
        "CIFAR-10: 10 classes of 32 x 32 photos",
        "eval",
        (
            RemoteFile(
                _CIFAR + "cifar-10-python.tar.gz",
                170_498_071,
                "c58f30108f718f92721af3b95e74349a",
                unpacked=187 * _MB,
                gives=tuple(
                    f"cifar-10-batches-py/{name}"
                    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
                ),
            ),
        ),
        ("cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}",),
        "No licence stated; cite Krizhevsky (2009).",
        domain="in",
        samples={"train": 50_000, "test": 10_000},
    ),
    CatalogEntry(
        "cifar100",
        "CIFAR-100: 100 classes of 32 x 32 photos",
        "eval",
        (
            RemoteFile(
                _CIFAR + "cifar-100-python.tar.gz",
                169_001_437,
                "eb9058c3a382ffc7106e4002c42a8d85",
                unpacked=187 * _MB,
                gives=("cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta"),
            ),
        ),
        ("cifar-100-python/{train,test,meta}",),
        "No licence stated; cite Krizhevsky (2009).",
        domain="in",
        samples={"train": 50_000, "test": 10_000},
    ),
    CatalogEntry(
        "svhn",
        "Street View House Numbers, cropped digits of 32 x 32",
        "eval",
        (
            RemoteFile(
                _SVHN + "train_32x32.mat",
                182_040_794,
                "e26dedcc434d2e4c54c9b2d4a06d8373",
                gives=("train_32x32.mat",),
            ),
            RemoteFile(
                _SVHN + "test_32x32.mat", 64_275_384, "eb5a983be6a315427106f1b164d9cef3", gives=("test_32x32.mat",)
            ),
        ),
        ("train_32x32.mat", "test_32x32.mat"),
        "Non-commercial use only; cite Netzer et al. (2011).",
        domain="out",
        samples={"train": 73_257, "test": 26_032},
    ),
    CatalogEntry(
        "eurosat",
        "EuroSAT (RGB): 10 classes of Sentinel-2 land cover, 64 x 64",
        "eval",
        (
            RemoteFile(
                "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
                "c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
                94_280_567,
                "c8fa014336c82ac7804f0398fcb19387",
                unpacked=110 * _MB,
                gives=("2750/AnnualCrop", "2750/Forest", "2750/SeaLake"),
            ),
        ),
        ("2750/<class>/<class>_<number>.jpg",),
        "MIT; cite Helber et al. (2019). No official split: the package's own is stratified and hashed.",
        domain="out",
        samples={"all": 27_000},
    ),
    CatalogEntry(
        "dtd",
        "Describable Textures: 47 classes of texture",
        "eval",
        (
            RemoteFile(
                "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
                625_239_812,
                "fff73e5086ae6bdbea199a49dfb8a4c1",
                unpacked=650 * _MB,
                gives=("dtd/images", "dtd/labels/train1.txt", "dtd/labels/val1.txt", "dtd/labels/test1.txt"),
            ),
        ),
        ("dtd/images/<class>/*.jpg", "dtd/labels/{train,val,test}{1..10}.txt", "dtd/imdb/imdb.mat"),
        "Research use; cite Cimpoi et al. (2014).",
        domain="out",
        samples={"train": 1_880, "val": 1_880, "test": 1_880},
    ),
    CatalogEntry(
        "coco",
        "MS-COCO 2017: photos with five captions each",
        "captions",
        (
            RemoteFile(
                _COCO + "annotations/annotations_trainval2017.zip",
                252_907_541,
                "f4bbac642086de4f52a3fdda2de5fa2c",
                unpacked=814 * _MB,
                gives=("annotations/captions_train2017.json", "annotations/captions_val2017.json"),
            ),
            RemoteFile(
                _COCO + "zips/val2017.zip",
                815_585_330,
                "442b8da7639aecaf257c1dceb8ba8c80",
                unpacked=825 * _MB,
                gives=("val2017",),
            ),
            RemoteFile(
                _COCO + "zips/train2017.zip",
                19_336_861_798,
                "cced6f7f71b7629ddf16f17bbcfab6b2",
                unpacked=20 * _GB,
                gives=("train2017",),
            ),
        ),
        ("annotations/captions_{train,val}2017.json", "train2017/*.jpg", "val2017/*.jpg"),
        "Annotations CC BY 4.0; the photos keep their Flickr licences. Cite Lin et al. (2014).",
        samples={"train": 118_287, "val": 5_000},
    ),
    CatalogEntry(
        "cc3m",
        "Conceptual Captions 3M: alt-texts of web pictures, as a TSV of caption and address",
        "captions",
        (),
        ("images/<2 hex>/<24 hex>.jpg", "images/ledger.sqlite"),
        "Captions free for any use with acknowledgement of Google LLC; the pictures belong to their sites. "
        "Cite Sharma et al. (2018).",
        by_hand=(
            "The TSV of cc3m has no stable direct address. Open "
            "https://ai.google.com/research/ConceptualCaptions/download in a browser, accept, save "
            "Train_GCC-training.tsv (3,318,333 rows, about 500 MB), then run "
            "`wlsup data fetch cc3m --tsv Train_GCC-training.tsv`, which downloads the pictures row by row."
        ),
        by_hand_gives=("images/ledger.sqlite",),
        samples={"train": 3_318_333},
    ),
    CatalogEntry(
        "imagenet_captions",
        "ImageNet-Captions: Flickr title, tags and description of ImageNet training photos",
        "captions",
        (
            RemoteFile(
                "https://github.com/mlfoundations/imagenet-captions/raw/"
                "5cf98361f5e67661fd5b2c6ee219567484440da9/imagenet_captions.zip",
                unpacked=140 * _MB,
                gives=("imagenet_captions.json",),
            ),
        ),
        ("imagenet_captions.json",),
        "Texts keep their authors' Flickr licences; the pictures are ImageNet's. Cite Fang et al. (2022).",
        samples={"train": 463_622},
    ),
    CatalogEntry(
        "imagenet",
        "ImageNet (ILSVRC 2012)",
        "eval",
        (),
        ("train/<wnid>/*.JPEG", "val/<wnid>/*.JPEG"),
        "Non-commercial research under ImageNet's terms, which each user must accept in person.",
        by_hand=(
            "ImageNet cannot be downloaded without an account. From https://image-net.org/download (ILSVRC2012) get "
            "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, unpack them into one folder a class (wnid), and put "
            "or link these as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG."
        ),
        by_hand_gives=("train/n*", "val/n*"),
        domain="in",
        samples={"train": 1_281_167, "val": 50_000},
    ),
    # Of these nobody publishes checksums. The bank of each is ImageNet's train/.
    CatalogEntry(
        "imagenet_v2",
        "ImageNet-V2, matched frequency: ImageNet's validation set collected anew",
        "eval",
        (
            RemoteFile(
                "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
                1_260 * _MB,
                unpacked=1_300 * _MB,
                gives=("imagenetv2-matched-frequency-format-val/0", "imagenetv2-matched-frequency-format-val/999"),
            ),
        ),
        ("imagenetv2-matched-frequency-format-val/<0..999>/*.jpeg",),
        "MIT for the code; the photos keep their Flickr licences. Cite Recht et al. (2019). Needs imagenet as bank.",
        domain="in",
        samples={"test": 10_000},
    ),
    CatalogEntry(
        "imagenet_a",
        "ImageNet-A: photos of 200 classes that a ResNet-50 gets wrong",
        "eval",
        (
            RemoteFile(
                "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",
                688 * _MB,
                unpacked=690 * _MB,
                gives=("imagenet-a/n01498041",),
            ),
        ),
        ("imagenet-a/<wnid>/*.jpg",),
        "MIT for the code; the photos keep their licences. Cite Hendrycks et al. (2021). Needs imagenet as bank.",
        domain="out",
        samples={"test": 7_500},
    ),
    CatalogEntry(
        "imagenet_r",
        "ImageNet-R: art, cartoons, toys and other renditions of 200 classes",
        "eval",
        (
            RemoteFile(
                "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
                2_190 * _MB,
                unpacked=2_200 * _MB,
                gives=("imagenet-r/n01443537",),
            ),
        ),
        ("imagenet-r/<wnid>/*.jpg",),
        "MIT for the code; the pictures keep their licences. Cite Hendrycks et al. (2021). Needs imagenet as bank.",
        domain="out",
        samples={"test": 30_000},
    ),
    CatalogEntry(
        "imagenet_sketch",
        "ImageNet-Sketch: black and white sketches of ImageNet's 1,000 classes",
        "eval",
        (),
        ("sketch/<wnid>/*.JPEG",),
        "Licence by its authors' repository; cite Wang et al. (2019). Needs imagenet as bank.",
        by_hand=(
            "ImageNet-Sketch has no direct address. From https://github.com/HaohanWang/ImageNet-Sketch follow the link "
            "to ImageNet-Sketch.zip, unpack it, and put or link its sketch/<wnid>/*.JPEG here."
        ),
        by_hand_gives=("sketch/n*",),
        domain="out",
        samples={"test": 50_889},
    ),
)

CATALOG: dict[str, CatalogEntry] = {entry.name: entry for entry in _ENTRIES}


def catalog_entry(name: str) -> CatalogEntry:
    """Return the entry ``name``; Raises `WlsupError` listing the names if there is none."""
    return CATALOG[choose("data set", name, CATALOG)]
