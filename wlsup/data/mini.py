"""The mini world: captioned scenes and labelled sets, painted by the package itself, with nothing to download.

It mirrors the real thing one for one: plain scenes for ImageNet (what the encoder is pretrained on), captioned scenes
for COCO, ``mini_shapes`` for CIFAR (in domain), and out of domain ``mini_digits`` for SVHN, ``mini_landcover`` for
EuroSAT and ``mini_textures`` for DTD.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wlsup.data.mini_evalsets import MINI_EVAL_SETS, MiniPictures, mini_eval_set, normalised
from wlsup.data.mini_grammar import describe
from wlsup.data.mini_render import Draws
from wlsup.data.mini_scenes import Scene, caption_scene, plain_scene
from wlsup.errors import WlsupError, choose

__all__ = [
    "CAPTIONS_PER_IMAGE",
    "MINI_EVAL_SETS",
    "MINI_SPLITS",
    "MiniPictures",
    "MiniScenes",
    "MiniSplit",
    "mini_captions",
    "mini_eval_set",
    "normalised",
    "pretraining_pictures",
]

MiniSplit = Literal["pretrain", "train", "validation"]
MINI_SPLITS: tuple[str, ...] = ("pretrain", "train", "validation")
CAPTIONS_PER_IMAGE = 5

# First word of the seeds of each split's pictures; the captions' is one higher.
_SALTS = {"pretrain": 11, "train": 21, "validation": 31}
# Which quarters of all sentences, by checksum, a split may use: no sentence can occur in two splits.
_QUARTERS = {"pretrain": (0,), "train": (1, 2), "validation": (3,)}


@dataclass
class MiniScenes:
    """Pictures with their captions.

    Args:
        images: (n, 3, 64, 64) uint8.
        captions: ``captions[i]``: `CAPTIONS_PER_IMAGE` different sentences, all true of image i.
        keys: n names, unique over splits, seeds and positions.
        scenes: what is in each picture; their ``image`` is the same as ``images[i]``.
    """

    images: Tensor
    captions: list[list[str]]
    keys: list[str]
    scenes: list[Scene]

    def __len__(self) -> int:
        return len(self.keys)


def _captions(scene: Scene, draws: Draws, quarters: tuple[int, ...]) -> list[str]:
    captions: list[str] = []
    while len(captions) < CAPTIONS_PER_IMAGE:
        text = describe(scene, draws).text
        if zlib.crc32(text.encode()) % 4 in quarters and text not in captions:
            captions.append(text)
    return captions


def mini_captions(split: MiniSplit, size: int, seed: int = 0) -> MiniScenes:
    """Captioned pictures of the mini world.

    The same arguments give the same bytes on any machine, and a smaller ``size`` a prefix of a larger one.

    Args:
        split: "pretrain" paints plain scenes (the encoder's pretraining pictures), "train" and "validation" caption
            scenes. No two splits share a key, a picture or a caption.
        size: number of pictures, at least 1.
        seed: of the pictures and their captions, at least 0.

    Raises:
        WlsupError: on an unknown split, a size below 1 or a negative seed.
    """
    choose("mini split", split, MINI_SPLITS)
    if size < 1 or seed < 0:
        raise WlsupError(
            f"mini captions: size {size} and seed {seed} given; size must be at least 1 and seed at least 0."
        )
    compose = plain_scene if split == "pretrain" else caption_scene
    salt = _SALTS[split]
    scenes = [compose(Draws(salt, seed, index)) for index in range(size)]
    return MiniScenes(
        images=torch.from_numpy(np.stack([scene.image for scene in scenes])),
        captions=[
            _captions(scene, Draws(salt + 1, seed, index), _QUARTERS[split]) for index, scene in enumerate(scenes)
        ],
        keys=[f"mini/{split}/{seed}/{index:06d}" for index in range(size)],
        scenes=scenes,
    )


def pretraining_pictures(size: int, seed: int = 0, start: int = 0) -> Tensor:
    """The pictures of ``mini_captions("pretrain", ...)`` without their captions, which cost more than the painting.

    Args:
        size: number of pictures.
        seed: as of `mini_captions`.
        start: position of the first one in the endless row of that seed.

    Returns:
        (size, 3, 64, 64) uint8.
    """
    pictures = [plain_scene(Draws(_SALTS["pretrain"], seed, index)).image for index in range(start, start + size)]
    return torch.from_numpy(np.stack(pictures))
