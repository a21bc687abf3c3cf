"""A frozen text encoder from transformers: captions in, a `Condition` out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wlsup.batch import Condition
from wlsup.errors import WlsupError
from wlsup.models.weights import tensors_sha256

__all__ = ["TextEncoder", "TextSpec"]

_log = logging.getLogger("wlsup")

MINI_TEXT = Path(__file__).parent.parent / "assets" / "mini" / "text"


@dataclass(frozen=True)
class TextSpec:
    """Which text encoder, and how it reads.

    Args:
        weights: "mini", a hub id of transformers (``google-bert/bert-base-uncased``) or a local folder of one.
        pooling: "mean" over tokens (Sentence-BERT's convention), "cls", or "auto": the model's own pooled output where
            it was trained to give one (CLIP, SigLIP), else "mean".
        max_length: captions are cut to this many tokens. SigLIP reads them padded to all its positions, as trained.
    """

    weights: str = "mini"
    pooling: Literal["auto", "mean", "cls"] = "auto"
    max_length: int = 64


class TextEncoder(nn.Module):
    """A text encoder that is only read.

    Args:
        spec: which one.

    Raises:
        WlsupError: the folder or hub id holds no text encoder and tokenizer; the message says where it looked. Or its
            pooled output is not as wide as its tokens.
    """

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model, self.tokenizer = _load(spec.weights)
        self.width: int = self.model.config.hidden_size
        limit = getattr(self.model.config, "max_position_embeddings", spec.max_length)
        self.max_length = min(spec.max_length, limit)
        self.base = {"id": spec.weights, "sha256": tensors_sha256(self.model.state_dict())}
        self._kept: dict[str, int] = {}  # where in _features a caption's lies
        self._features = torch.empty(0, self.width)
        self._own_pooling = spec.pooling == "auto" and self.model.config.model_type in _POOLED_BY_TRAINING
        self._padded_to = limit if self.model.config.model_type in _PADDED_BY_TRAINING else None
        pooled = getattr(self.model.config, "projection_size", self.width)  # SigLIP's may differ from its tokens'
        if self._own_pooling and pooled != self.width:
            raise WlsupError(
                f"The text encoder {spec.weights!r} pools a caption into {pooled} channels, and its tokens have "
                f"{self.width}: set --model.text.pooling mean."
            )

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Condition:
        """B captions -> tokens (B, M, C), mask (B, M), pooled (B, C), all present."""
        device = next(self.model.parameters()).device
        batch = self.tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,  # SigLIP's tokenizers keep it to themselves
            return_tensors="pt",
        ).to(device)
        ids, seen = batch["input_ids"], batch["attention_mask"]
        if self._padded_to is None:
            output = self.model(input_ids=ids, attention_mask=seen)
        else:  # padding is read like words, and what the last position made of it all is the pooled output
            rest = self._padded_to - ids.shape[1]
            sides = (rest, 0) if self.tokenizer.padding_side == "left" else (0, rest)
            ids, seen = F.pad(ids, sides, value=self.tokenizer.pad_token_id), F.pad(seen, sides)
            output = self.model(input_ids=ids)
        tokens, mask = output.last_hidden_state.float(), seen.bool()
        if self._own_pooling:
            pooled = output.pooler_output.float()
        elif self.spec.pooling == "cls":
            pooled = tokens[:, 0]
        else:
            weight = mask.unsqueeze(-1).to(tokens.dtype)
            pooled = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
        return Condition(tokens, mask, pooled, torch.ones(len(captions), dtype=torch.bool, device=device))

    def pooled(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, C): those of `remember`, if all are among them, else read now."""
        rows = [self._kept.get(caption, -1) for caption in captions]
        device = next(self.model.parameters()).device
        if -1 in rows:
            return self(list(captions)).pooled
        self._features = self._features.to(device)  # once: a step then sends its row numbers alone
        return self._features[torch.tensor(rows, device=device)]

    def remember(self, captions: Iterable[str], batch_size: int = 256) -> None:
        """Keep the pooled feature of every caption, C numbers in fp32, the same whatever their order."""
        distinct = sorted(set(captions), key=lambda caption: (len(caption), caption))  # little padding
        parts = [distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size)]
        self._features = torch.cat([self(part).pooled for part in parts])
        self._kept = {caption: row for row, caption in enumerate(distinct)}
        _log.info("data.cache_features: the text encoder ran once over %d captions", len(distinct))


_PADDED_BY_TRAINING = ("siglip_text_model", "siglip2_text_model")
_POOLED_BY_TRAINING = ("clip_text_model", *_PADDED_BY_TRAINING)
_BY_NAME = {  # transformers' own choice of a class leaves these out
    "siglip": "SiglipTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
    "siglip2_text_model": "Siglip2TextModel",
}


def _load(weights: str) -> tuple[nn.Module, object]:
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, PretrainedConfig

    transformers.utils.logging.disable_progress_bar()
    place = str(MINI_TEXT) if weights == "mini" else weights
    if Path(place).is_absolute() and not Path(place).is_dir():
        raise WlsupError(f"No text encoder at {place}: not a folder. Give a transformers folder, a hub id or 'mini'.")
    try:
        name = _BY_NAME.get(PretrainedConfig.get_config_dict(place)[0].get("model_type"))
        tokenizer = AutoTokenizer.from_pretrained(place)
        if name is None:
            config = AutoConfig.from_pretrained(place)
            known = type(getattr(config, "text_config", config)) in AutoModelForTextEncoding._model_mapping
            loader = AutoModelForTextEncoding if known else AutoModel
        else:
            loader = getattr(transformers, name, AutoModel)  # which says that this transformers is too old for it
        model = loader.from_pretrained(place).float()
    except ImportError as error:
        raise WlsupError(
            f"The tokenizer of the text encoder {weights!r} needs a package that is not here: install it, as with "
            f"`pip install sentencepiece`. ({_first_line(error)})"
        ) from error
    except (OSError, ValueError) as error:
        from huggingface_hub.constants import HF_HUB_CACHE

        raise WlsupError(
            f"No text encoder and tokenizer in {weights!r}: looked for a local folder of that name and in the hub's "
            f"cache {HF_HUB_CACHE}, and could not fetch it. On a machine with a network run `hf download {weights}`, "
            f"or give a folder that holds config.json, model.safetensors and tokenizer.json. ({_first_line(error)})"
        ) from error
    return model.eval(), tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
