"""The language model: next words of a scene's captions, one behind another, at any position.

What stands in front of a caption, another caption of the same scene, says something about it: so the model learns to
use a context, which is what a prefix of picture tokens will be to it.
"""

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


@torch.no_grad()
def _perplexity(model: GPT2LMHeadModel, pairs: list[tuple[list[int], list[int]]], pad: int) -> float:
    """Perplexity of each caption behind its context, which itself does not count."""
    ids, labels = _rows([[*context, *caption] for context, caption in pairs], pad)
    for row, (context, _) in enumerate(pairs):
        labels[row, : len(context)] = -100
    return round(math.exp(_loss(model, ids, labels).item()), 3)


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

    def ended(split: str, count: int) -> list[list[list[int]]]:
        groups = caption_groups(count, split)
        return [[[*ids, eos] for ids in tokenizer(group, add_special_tokens=False)["input_ids"]] for group in groups]

    training, held_out = ended("train", scenes), ended("validation", 400)
    batch, most = 80, 3
    progress = Progress("lm", steps)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        documents = []
        for row in torch.randint(len(training), (batch,), generator=generator).tolist():
            captions = training[row]
            order = torch.randperm(len(captions), generator=generator)
            count = int(torch.randint(1, most + 1, (1,), generator=generator))
            documents.append([bos, *(token for place in order[:count].tolist() for token in captions[place])])
        ids, labels = _rows(documents, pad)
        longest = ids.shape[1]
        # Half of the captions begin somewhere along the positions, as they do behind a prefix of picture tokens.
        shift = torch.randint(_POSITIONS - longest + 1, (batch, 1), generator=generator)
        shift *= torch.rand(batch, 1, generator=generator) < 0.5
        loss = _loss(model, ids, labels, torch.arange(longest) + shift)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.update(step, next_word=loss)
    model.eval()
    alone = [caption for captions in held_out for caption in captions]
    perplexity = {
        "held_out_perplexity": _perplexity(model, [([bos], caption) for caption in alone], pad),
        "held_out_perplexity_behind_a_caption_of_the_same_scene": _perplexity(
            model, [([bos, *captions[0]], captions[1]) for captions in held_out], pad
        ),
        "held_out_perplexity_behind_a_caption_of_another_scene": _perplexity(
            model,
            [([bos, *held_out[row - 1][0]], captions[1]) for row, captions in enumerate(held_out)],
            pad,
        ),
    }
    counts = Counter(token for captions in training for caption in captions for token in caption)
    total = sum(counts.values())
    surprise = [-math.log(max(counts[token], 0.5) / total) for caption in alone for token in caption]
    model.save_pretrained(folder)
    halve(folder / "model.safetensors")
    return {
        "recipe": "GPT-2: next word of [BOS] then 1 to 3 captions of a scene, each with [EOS]; half at a random offset",
        "parameters": sum(p.numel() for p in model.parameters()),
        "scenes": scenes,
        "steps": steps,
        "batch": batch,
        "learning_rate": 2e-3,
        "loss": {key: round(value, 4) for key, value in progress.smooth.items()},
        **perplexity,
        "held_out_unigram_perplexity": round(math.exp(sum(surprise) / len(surprise)), 3),
        "seed": seed,
    }
