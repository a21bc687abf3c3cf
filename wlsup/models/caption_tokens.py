"""Captions as token ids of a causal language model, each ended by the end token that a captioner must learn to say.

Shapes: B captions, T tokens of the longest, the end token among them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wlsup.errors import WlsupError

__all__ = ["CaptionTokenizer", "CaptionTokens", "load_tokenizer", "transformers_folder"]

MINI_LANGUAGE = Path(__file__).parent.parent / "assets" / "mini" / "lm"


@dataclass
class CaptionTokens:
    """Captions padded on the right.

    Args:
        ids: (B, T) int64; after the words comes one end token, after it padding.
        mask: (B, T) bool, True at the words and the end token.
    """

    ids: Tensor
    mask: Tensor


class CaptionTokenizer:
    """A language model's tokenizer, as captioning uses it, whatever the model's own habits.

    Nothing is put in front of a caption and one end token after it, so that GPT-2's tokenizer (which adds nothing),
    OPT's (a start token) and Llama's (likewise) give the same form. Models without a padding token, GPT-2 among them,
    are padded with the end token: labels keep the first one (`wlsup.objectives.captioning.caption_labels`).

    Args:
        tokenizer: of transformers.
        weights: where it came from, for messages and for `base`.
        max_length: T is at most this, the end token included.

    Raises:
        WlsupError: a tokenizer without an end token, or a length that leaves no room for a word.
    """

    def __init__(self, tokenizer: Any, weights: str, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise WlsupError(
                f"The tokenizer of {weights!r} has no end token (eos_token), so a captioner could not learn to stop. "
                "Set eos_token in its tokenizer_config.json, or give another language model."
            )
        if max_length < 2:
            raise WlsupError(f"language.max_length must be at least 2 (a word and the end token), not {max_length}.")
        self._tokenizer = tokenizer
        self.max_length = max_length
        self.end_id = int(tokenizer.eos_token_id)
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.start_id = self.end_id if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
        self.base = {"id": weights, "sha256": hashlib.sha256(vocabulary.encode()).hexdigest()}

    def __len__(self) -> int:
        """Number of token ids, added ones included."""
        return len(self._tokenizer)

    def __call__(
        self, captions: list[str], *, length: int | None = None, device: torch.device | str | None = None
    ) -> CaptionTokens:
        """Tokenize captions.

        Args:
            captions: B strings. One that does not fit is cut, and then has no end token: it does not end there.
            length: pad to this many tokens; None: to the longest caption of the batch.
            device: where ids and mask go.

        Returns:
            ids and mask, (B, T) each.
        """
        encoded = self._tokenizer(captions, add_special_tokens=False, truncation=True, max_length=self.max_length)
        rows = [ids if len(ids) >= self.max_length else [*ids, self.end_id] for ids in encoded["input_ids"]]
        width = length or max(map(len, rows))
        ids = torch.tensor([[*row, *[self.pad_id] * (width - len(row))] for row in rows], dtype=torch.int64)
        real = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
        return CaptionTokens(ids.to(device), real.to(device))

    def decode(self, ids: Tensor) -> list[str]:
        """(B, T) ids -> B captions, each up to its first end token."""
        captions = []
        for row in ids.tolist():
            words = row[: row.index(self.end_id)] if self.end_id in row else row
            captions.append(self._tokenizer.decode(words, skip_special_tokens=True).strip())
        return captions

    def pad(self, ids: Tensor, length: int) -> Tensor:
        """(B, T) -> (B, length), padded on the right."""
        return F.pad(ids, (0, length - ids.shape[1]), value=self.pad_id)


def load_tokenizer(weights: str, max_length: int) -> CaptionTokenizer:
    """Load the tokenizer of a language model without the model.

    Args:
        weights: "mini", a hub id or a local folder.
        max_length: see `CaptionTokenizer`.

    Raises:
        WlsupError: there is none; the message says where it looked.
    """
    from transformers import AutoTokenizer

    place = transformers_folder(weights)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except Exception as error:  # transformers, tokenizers and the hub's client raise their own by turns
        raise missing("tokenizer", weights, error) from error
    return CaptionTokenizer(tokenizer, weights, max_length)


def transformers_folder(weights: str) -> str:
    """Return what transformers is to load for ``weights``.

    Raises:
        WlsupError: an absolute path that is no folder.
    """
    place = str(MINI_LANGUAGE) if weights == "mini" else weights
    if Path(place).is_absolute() and not Path(place).is_dir():
        raise WlsupError(f"No language model at {place}: not a folder. Give a transformers folder, a hub id or 'mini'.")
    return place


def missing(what: str, weights: str, error: Exception) -> WlsupError:
    """Return the one message for weights that are not there or cannot be read."""
    from huggingface_hub.constants import HF_HUB_CACHE

    lines = str(error).strip().splitlines()
    return WlsupError(
        f"No {what} in {weights!r}: looked for a local folder of that name and in the hub's cache {HF_HUB_CACHE}, and "
        f"could not fetch it. On a machine with a network run `hf download {weights}`, or give a folder that holds "
        f"config.json, model.safetensors and tokenizer.json. ({lines[0][:200] if lines else type(error).__name__})"
    )
