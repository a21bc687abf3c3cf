"""The language model: next words of captions, at any position, so that a prefix of picture tokens leaves it at home."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from mini_pretraining.common import Progress, caption_groups, decayed, halve, learning_rate, seed_everything
from mini_pretraining.tokens import save_language_tokenizer

__all__ = ["make_language_model"]

_POSITIONS = 128


def _rows(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right: ids and labels, -100 at padding."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad)
    labels = torch.full((len(sequences), longest), -100)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = labels[row, : len(sequence)] = torch.tensor(sequence)
    return ids, labels


def _loss(model: GPT2LMHeadModel, ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
    # Padding is on the right of a causal model: nothing real can see it, so no mask is needed.
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def make_language_model(
    folder: Path, tokenizer_folder: Path, *, steps: int, seed: int, scenes: int = 12_000
) -> dict[str, object]:
    """Train the language model and write it, with its tokenizer, to ``folder`` for AutoModelForCausalLM."""
    generator = seed_everything(seed)
    tokenizer = save_language_tokenizer(tokenizer_folder, folder)
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=_POSITIONS,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(decayed([model], 0.01), lr=2e-3, betas=(0.9, 0.98))

    def sequences(split: str, count: int) -> list[list[int]]:
        captions = [caption for group in caption_groups(count, split) for caption in group]
        return [[bos, *ids, eos] for ids in tokenizer(captions, add_special_tokens=False)["input_ids"]]

    training, held_out = sequences("train", scenes), sequences("validation", 400)
    ids, labels = _rows(training, pad)
    lengths = torch.tensor([len(sequence) for sequence in training])
    batch = 128
    progress = Progress("lm", steps)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        rows = torch.randint(len(ids), (batch,), generator=generator)
        longest = int(lengths[rows].max())
        # Half of the captions begin somewhere along the positions, as they do behind a prefix of picture tokens.
        shift = torch.randint(_POSITIONS - longest + 1, (batch, 1), generator=generator)
        shift *= torch.rand(batch, 1, generator=generator) < 0.5
        loss = _loss(model, ids[rows, :longest], labels[rows, :longest], torch.arange(longest) + shift)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.update(step, next_word=loss)
    model.eval()
    with torch.no_grad():
        perplexity = math.exp(_loss(model, *_rows(held_out, pad)).item())
    counts = Counter(token for sequence in training for token in sequence[1:])
    total = sum(counts.values())
    surprise = [-math.log(max(counts[token], 0.5) / total) for sequence in held_out for token in sequence[1:]]
    model.save_pretrained(folder)
    halve(folder / "model.safetensors")
    return {
        "recipe": "GPT-2: next word of [BOS] caption [EOS], half of them at a random position offset",
        "parameters": sum(p.numel() for p in model.parameters()),
        "scenes": scenes,
        "steps": steps,
        "batch": batch,
        "learning_rate": 2e-3,
        "loss": {key: round(value, 4) for key, value in progress.smooth.items()},
        "held_out_perplexity": round(perplexity, 3),
        "held_out_unigram_perplexity": round(math.exp(sum(surprise) / len(surprise)), 3),
        "seed": seed,
    }
