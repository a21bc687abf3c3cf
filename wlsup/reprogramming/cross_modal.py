"""Cross-modal reprogramming: captions written into the pixels, or the patch tokens, of a frozen vision network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from wlsup.batch import ImageSpec
from wlsup.errors import WlsupError, choose
from wlsup.models.vision import VisionEncoder
from wlsup.ranks import global_sum
from wlsup.reprogramming.pixels import Pixels

__all__ = ["PatchProgram", "TextProgramSpec", "TokenProgram", "encode_tokens", "open_base_image"]

_SPACES = ("input", "token")
_SLOTS = ("replace", "append")
_MATCHES = ("none", "statistics")
_INIT_STD = 0.1


@dataclass(frozen=True)
class TextProgramSpec:
    """How a caption becomes something that a frozen vision network takes.

    Args:
        space: "input": each token is a patch of pixels (Neekhara et al. 2022); "token": each is a token of the
            network's width (ours).
        base_image: in input space, and for "append": a picture file under the patches; None for a grey canvas.
        alpha: in input space with a base image, how strongly the patches show over it.
        slots: in token space: "replace" puts the tokens in the patches' place, "append" behind those of the base image.
        match: in token space: "statistics" gives the tokens mean and deviation of the network's own patch tokens,
            channel by channel; "none" leaves them in (-1, 1).
        tokenizer: "mini", a hub id or a local folder of a causal language model's tokenizer.
        max_length: captions are cut to this many tokens, and to the number of patches.

    Raises:
        WlsupError: an unknown choice, a value out of its range, or an option that the space does not read.
    """

    space: Literal["input", "token"] = "input"
    base_image: str | None = None
    alpha: float = 0.2
    slots: Literal["replace", "append"] = "replace"
    match: Literal["none", "statistics"] = "statistics"
    tokenizer: str = "mini"
    max_length: int = 64

    def __post_init__(self) -> None:
        choose("space of the program", self.space, _SPACES)
        choose("slots of the program", self.slots, _SLOTS)
        choose("match of the program", self.match, _MATCHES)
        if not 0 < self.alpha <= 1:
            raise WlsupError(f"program.alpha must be above 0 and at most 1, not {self.alpha}.")
        if self.space == "input":
            self._refuse("slots", "match", because="is of program.space: token")
        if self.space == "token" or self.base_image is None:
            self._refuse("alpha", because="is of program.space: input with a program.base_image")

    def _refuse(self, *options: str, because: str) -> None:
        for option in options:
            if getattr(self, option) != getattr(TextProgramSpec, option):
                raise WlsupError(f"program.{option} {because}: set that, or leave program.{option} out.")


class PatchProgram(nn.Module):
    """Each token of a caption is a patch of pixels, ``tanh(Emb[t])``, laid out row by row.

    Source: Neekhara et al. 2022, "Cross-modal Adversarial Reprogramming", section 3.1. Slots that a caption leaves
    over hold the patch of the padding token. Over a base image the patches are added in normalised space, times alpha;
    then the sum is taken back to pixels, clamped to [0, 1] and normalised again.

    Args:
        vocabulary: number V of token ids.
        spec: the frozen network's input.
        patch: side p of a patch in pixels; must divide the canvas.
        base: (3, S, S) pixels in [0, 1], or None: (-1, 1) is then mapped to pixels in (0, 1).
        alpha: see `TextProgramSpec`.

    Raises:
        WlsupError: patches that do not fill the canvas.
    """

    def __init__(
        self, vocabulary: int, spec: ImageSpec, patch: int, base: Tensor | None = None, alpha: float = 0.2
    ) -> None:
        super().__init__()
        if spec.size % patch:
            raise WlsupError(f"Patches of {patch} pixels do not fill a canvas of {spec.size}: it must be a multiple.")
        self.patch, self.rows, self.alpha = patch, spec.size // patch, alpha
        self.weight = nn.Parameter(_INIT_STD * torch.randn(vocabulary, 3 * patch * patch))
        self.pixels = Pixels(spec)
        self.register_buffer("base", base, persistent=False)

    @property
    def slots(self) -> int:
        """Number of tokens that a canvas holds."""
        return self.rows**2

    def draw(self, ids: Tensor) -> Tensor:
        """(B, slots) token ids -> (B, 3, S, S) in (-1, 1)."""
        side, rows = self.patch, self.rows
        patches = torch.tanh(self.weight[ids]).view(len(ids), rows, rows, 3, side, side)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(ids), 3, rows * side, rows * side)

    def bare(self) -> Tensor:
        """Return the network's input without a caption, (1, 3, S, S): the base image, or grey."""
        side = self.rows * self.patch
        pixels = self.weight.new_full((3, side, side), 0.5) if self.base is None else self.base
        return self.pixels.normalised(pixels[None])[0]

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write captions into pixels.

        Args:
            ids: (B, slots), padded by the padding token.

        Returns:
            The frozen network's input (B, 3, S, S), normalised; the share of values that were clamped; and the sum of
            the squares of all the batch's patches: the published regulariser is its root over B, of the whole batch.
        """
        drawn = self.draw(ids)
        if self.base is None:
            pixels = (drawn + 1) / 2
        else:
            base, _ = self.pixels.normalised(self.base[None])
            pixels = self.pixels.of(base + self.alpha * drawn)
        images, clamped = self.pixels.normalised(pixels)
        return images, clamped, drawn.square().sum()


class TokenProgram(nn.Module):
    """Each token of a caption is a token of the frozen network's width, ``tanh(Emb[t])``.

    Source: ours, after Neekhara et al. 2022 with the first layer of the network left out. With ``match`` the tokens are
    layer-normalised and given mean and deviation, channel by channel, of the network's own patch tokens (`calibrate`),
    so that the first block meets the numbers it was trained on.

    Args:
        vocabulary: number V of token ids.
        width: D, of the network's tokens.
        match: "statistics" or "none".
    """

    def __init__(self, vocabulary: int, width: int, match: str = "statistics") -> None:
        super().__init__()
        choose("match of the program", match, _MATCHES)
        self.weight = nn.Parameter(_INIT_STD * torch.randn(vocabulary, width))
        self.match = match
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("calibrated", torch.tensor(False))

    @torch.no_grad()
    def calibrate(self, encoder: VisionEncoder, images: Tensor, over_ranks: bool = False) -> None:
        """Measure the network's patch tokens, before positions.

        Args:
            encoder: the network.
            images: (B, 3, H, W), normalised.
            over_ranks: each process brings pictures of its own, and what is measured is of all of them.
        """
        tokens = encoder.backbone.patch_embed(images)
        tokens = tokens.reshape(-1, tokens.shape[-1]).float()
        count = global_sum(tokens.new_tensor(len(tokens)), over_ranks)
        mean = global_sum(tokens.sum(0), over_ranks) / count
        self.mean.copy_(mean)
        self.std.copy_((global_sum((tokens - mean).square().sum(0), over_ranks) / (count - 1)).sqrt())
        self.calibrated.fill_(True)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, D).

        Raises:
            WlsupError: statistics are to be matched and were not measured.
        """
        tokens = torch.tanh(self.weight[ids])
        if self.match == "none":
            return tokens
        if not self.calibrated:
            raise WlsupError("The program does not know the statistics to match yet: call calibrate() with pictures.")
        return nn.functional.layer_norm(tokens, tokens.shape[-1:]) * self.std + self.mean


def encode_tokens(
    encoder: VisionEncoder, tokens: Tensor, slots: str = "replace", images: Tensor | None = None
) -> Tensor:
    """Run a frozen encoder on tokens of one's own, by hooks: its code and weights stay as they are.

    Args:
        encoder: a ViT; adapters on it work as ever.
        tokens: (B, T, D); for "replace" T is the number of its patches.
        slots: "replace": they stand in the patches' place, and get their positions. "append": they stand behind the
            patches of ``images``, with the positions of the first T patches.
        images: (1 or B, 3, S, S), normalised, for "append"; None for a canvas of the mean colour.

    Returns:
        (B, D) pooled, by the encoder's own convention; under "append" a mean is over all tokens.

    Raises:
        WlsupError: another number of tokens than patches, or "append" to a network with rotary positions.
    """
    choose("slots of the program", slots, _SLOTS)
    grid, size = encoder.grid_size, encoder.image_spec.size
    patches = grid[0] * grid[1]
    canvas = tokens.new_zeros(1, 3, size, size) if images is None or slots == "replace" else images
    canvas = canvas.expand(len(tokens), -1, -1, -1)
    if slots == "replace":
        if tokens.shape[1] != patches:
            raise WlsupError(f"{tokens.shape[1]} tokens cannot stand in place of {patches} patches: pad them.")

        def replace(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return tokens.to(output.dtype).reshape(output.shape)

        handle = encoder.backbone.patch_embed.register_forward_hook(replace)
    else:
        if encoder.backbone.pos_embed is None:
            raise WlsupError("slots: append needs a network with learned positions; use slots: replace for this one.")
        if tokens.shape[1] > patches:
            raise WlsupError(f"{tokens.shape[1]} tokens cannot take the positions of {patches} patches: cut them.")
        skip = 0 if encoder.backbone.no_embed_class else encoder.num_prefix_tokens
        placed = tokens + encoder.position_embedding(grid)[:, skip : skip + tokens.shape[1]]

        def append(module: nn.Module, inputs: tuple) -> tuple:
            return torch.cat([inputs[0], placed.to(inputs[0].dtype)], dim=1), *inputs[1:]

        # Before the norm that CLIP's networks begin with, and outside the blocks, which checkpointing runs once more.
        handle = encoder.backbone.norm_pre.register_forward_pre_hook(append)
    try:
        return encoder(canvas).pooled
    finally:
        handle.remove()


def open_base_image(path: str, size: int) -> Tensor:
    """Read a picture file, its middle square resized: (3, size, size) pixels in [0, 1].

    Raises:
        WlsupError: no such file, or no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(Path(path).expanduser()) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise WlsupError(
            f"program.base_image {path!r} cannot be read ({type(error).__name__}). Give a picture file, or null."
        ) from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1) / 255
