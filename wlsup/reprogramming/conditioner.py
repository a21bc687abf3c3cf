"""Captions reprogrammed into visual tokens that condition adapters, and what keeps an untrained start from harm.

An untrained reprogrammer gives noise. Adapters that start at random and are fed noise add noise to every block, and
may not recover. Four measures, each its own switch: the adapters' gates start at zero (theirs: ``gate``), the tokens
get the statistics of the network's own patch tokens, the reprogrammer is warmed up first while the adapters stay as
they are, and batches whose loss is not finite are left out. `experiments/reprogrammer_cure.py` measures them: the
gates are what helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wlsup.batch import Condition
from wlsup.errors import WlsupError, choose
from wlsup.models.caption_tokens import load_tokenizer
from wlsup.models.vision import VisionEncoder
from wlsup.ranks import global_sum
from wlsup.reprogramming.cross_modal import TokenProgram, encode_tokens

__all__ = ["CaptionReprogrammer", "FiniteGuard", "ReprogrammerSpec"]


@dataclass(frozen=True)
class ReprogrammerSpec:
    """Captions as visual tokens, learned from nothing.

    Args:
        match: "statistics" gives the tokens mean and deviation of the network's own patch tokens, channel by channel;
            "none" leaves them as they are learned.
        warmup_batches: train the reprogrammer alone for so many batches, before the adapters and a regulariser's
            terms begin.
        skip_nonfinite: stop after so many batches in a row whose loss is not finite; 0: do not look.
        tokenizer: "mini", a hub id or a local folder of a causal language model's tokenizer.
        max_length: captions are cut to this many tokens, and to the number of patches.
    """

    match: Literal["none", "statistics"] = "statistics"
    warmup_batches: int = 0
    skip_nonfinite: int = 10
    tokenizer: str = "mini"
    max_length: int = 64

    def __post_init__(self) -> None:
        choose("match of the reprogrammer", self.match, ("none", "statistics"))
        if min(self.warmup_batches, self.skip_nonfinite) < 0:
            raise WlsupError(
                f"reprogrammer.warmup_batches ({self.warmup_batches}) and skip_nonfinite ({self.skip_nonfinite}) must "
                "be at least 0."
            )


class FiniteGuard:
    """Counts batches whose loss is not finite, and ends a run that has nothing else; `Guards` skips their steps.

    A batch whose loss is not finite on one process counts on all, so that all end together.

    Args:
        limit: so many in a row end the run; 0 looks at none.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.skipped, self._in_a_row = limit, 0, 0

    def __call__(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses as they are.

        Raises:
            WlsupError: the limit is reached.
        """
        bad = ~torch.isfinite(losses["loss"].detach())
        if not self.limit or not bool(global_sum(bad.float())):
            self._in_a_row = 0
            return losses
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            parts = ", ".join(f"{name} {float(value.detach()):g}" for name, value in losses.items())
            raise WlsupError(
                f"The loss was not finite for {self.limit} batches in a row ({parts}). Lower model.lr, or let the "
                "adapters start shut (gate: tanh) and warm the reprogrammer up (reprogrammer.warmup_batches)."
            )
        return losses


class CaptionReprogrammer(nn.Module):
    """Captions to tokens of a frozen vision network's width, as a `Condition` for adapters.

    Source: ours, after Neekhara et al. 2022 (`TokenProgram`). The warm-up is ours too: the caption's tokens, in place
    of patches, are run through the frozen network without adapters, for its feature to be matched to that of the
    caption's picture among the batch's (InfoNCE).

    Args:
        encoder: the frozen network, for its width and number of patches.
        spec: see `ReprogrammerSpec`.
    """

    def __init__(self, encoder: VisionEncoder, spec: ReprogrammerSpec) -> None:
        super().__init__()
        rows, columns = encoder.grid_size
        self.spec, self.patches = spec, rows * columns
        self.tokenizer = load_tokenizer(spec.tokenizer, min(spec.max_length, self.patches))
        self.program = TokenProgram(len(self.tokenizer), encoder.embed_dim, spec.match)
        self.guard = FiniteGuard(spec.skip_nonfinite)
        # Beside the program's weight, so that a checkpoint holds it.
        self.program.register_buffer("warmed", torch.tensor(0))

    @property
    def width(self) -> int:
        """D, of the tokens."""
        return self.program.weight.shape[1]

    @property
    def warming(self) -> bool:
        """Whether the warm-up goes on."""
        return int(self.program.warmed) < self.spec.warmup_batches

    def calibrate(self, encoder: VisionEncoder, images: Tensor) -> None:
        """Measure, once, the statistics to match on pictures (B, 3, H, W) and those of the other processes."""
        if self.spec.match == "statistics" and not self.program.calibrated:
            self.program.calibrate(encoder, images, over_ranks=True)

    def forward(self, captions: Sequence[str], encoded: Condition) -> Condition:
        """Return the condition with its tokens in place of the text encoder's.

        Args:
            captions: B strings.
            encoded: of the text encoder; its pooled features and who has a caption stay.

        Returns:
            Tokens (B, T, D) and mask (B, T), the end token among them.
        """
        tokens = self.tokenizer(list(captions), device=self.program.weight.device)
        return replace(encoded, tokens=self.program(tokens.ids), mask=tokens.mask)

    def warm_up(self, encoder: VisionEncoder, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what the warm-up matches of one batch, and count it.

        Args:
            encoder: the frozen network without adapters, in eval mode.
            images: (B, 3, H, W).
            captions: B strings.

        Returns:
            (B, D) features of the pictures and (B, D) of the captions, of unit length, in fp32.
        """
        ids = self.tokenizer(list(captions), length=self.patches, device=images.device).ids
        text = F.normalize(encode_tokens(encoder, self.program(ids)).float(), dim=-1)
        with torch.no_grad():
            image = F.normalize(encoder.features(images).float(), dim=-1)
        self.program.warmed += 1
        return image, text
