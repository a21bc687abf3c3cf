"""A tiny dense model of every family that upcycling admits, for the tests beside this file."""

from __future__ import annotations

import copy
import functools

import torch
from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

_IDS = {"vocab_size": 97, "bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 0}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **_IDS}
_HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, **_IDS}
_LLAMA = {**_HIDDEN, "intermediate_size": 48, "num_key_value_heads": 1}
_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64, **_IDS}
CONFIGS = {
    "gpt2": GPT2Config(**_GPT),
    "gptj": GPTJConfig(**_GPT, rotary_dim=8),
    "gpt_neo": GPTNeoConfig(**_NEO, attention_types=[[["global", "local"], 1]]),
    "gpt_neox": GPTNeoXConfig(**_HIDDEN, intermediate_size=48),
    "opt": OPTConfig(**_HIDDEN, ffn_dim=48, word_embed_proj_dim=16),  # as OPT-350M: embeddings narrower
    "llama": LlamaConfig(**_LLAMA),
    "mistral": MistralConfig(**_LLAMA),
    "qwen2": Qwen2Config(**_LLAMA),
}
_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
VISION = {"vit": {}, "vit_swiglu": {"mlp_layer": SwiGLU}, "vit_glu": {"mlp_layer": GluMlp}}
FAMILIES = (*VISION, *CONFIGS)


def make(family: str):
    """Random weights, spread so that an MLP matters; in eval mode."""
    torch.manual_seed(1)
    return copy.deepcopy(_made(family))


@functools.lru_cache
def _made(family: str):
    if family in VISION:
        model = VisionTransformer(**_VIT, **VISION[family])
    else:
        model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def data(family: str, batch: int = 3):
    """Pictures or token ids."""
    generator = torch.Generator().manual_seed(2)
    if family in VISION:
        return torch.randn(batch, 3, 16, 16, generator=generator)
    return torch.randint(7, 97, (batch, 12), generator=generator)


def outputs(model, family: str, x):
    """(B, L, D) tokens, or (B, L, V) logits."""
    if family in VISION:
        return model.forward_features(x)
    return model(input_ids=x, use_cache=False).logits


def relative(given, wanted) -> float:
    """||given - wanted|| / ||wanted||."""
    return float(((given - wanted).norm() / wanted.norm()).detach())
