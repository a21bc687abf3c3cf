"""Tiny causal language models of every admitted family, random weights, with the mini tokenizer."""

import shutil

import torch
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

from wlsup.models.caption_tokens import MINI_LANGUAGE

_IDS = {"vocab_size": 960, "bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 0}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **_IDS}
_HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, **_IDS}
_LLAMA = {**_HIDDEN, "intermediate_size": 64, "num_key_value_heads": 1}
CONFIGS = {
    "gpt2": GPT2Config(**_GPT),
    "gptj": GPTJConfig(**_GPT, rotary_dim=8),
    "gpt_neo": GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
        **_IDS,
    ),
    "gpt_neox": GPTNeoXConfig(**_HIDDEN, intermediate_size=64),
    # As OPT-350M: embeddings narrower than the model.
    "opt": OPTConfig(**_HIDDEN, ffn_dim=64, word_embed_proj_dim=16),
    "llama": LlamaConfig(**_LLAMA),
    "mistral": MistralConfig(**_LLAMA),
    "qwen2": Qwen2Config(**_LLAMA),
}


def write_family(folder, family):
    """Write a model of a family, and its tokenizer, into a folder; return the folder."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():  # so far apart that no two tokens tie
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI_LANGUAGE / name, folder / name)
    return folder
