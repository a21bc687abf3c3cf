"""The text encoder: masked words, and one caption of a scene told from captions of other scenes. No pictures."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mini_pretraining.common import Progress, caption_groups, decayed, halve, learning_rate, seed_everything
from mini_pretraining.tokens import SPECIAL, save_text_tokenizer

__all__ = ["make_text_encoder"]

_IGNORED = -100


def _mask_words(
    ids: Tensor, mask: Tensor, special: int, mask_id: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Hide 20 % of the words: 80 % of these become [MASK], 10 % another word, 10 % stay (Devlin et al. 2019)."""
    chosen = (torch.rand(ids.shape, generator=generator) < 0.2) & mask.bool() & (ids >= special)
    labels = torch.where(chosen, ids, torch.full_like(ids, _IGNORED))
    dice = torch.rand(ids.shape, generator=generator)
    hidden = torch.where(chosen & (dice < 0.8), torch.full_like(ids, mask_id), ids)
    other = torch.randint(special, int(ids.max()) + 1, ids.shape, generator=generator)
    return torch.where(chosen & (dice >= 0.8) & (dice < 0.9), other, hidden), labels


def _pooled(model: BertModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    return tokens, (tokens * weight).sum(1) / weight.sum(1)


def _accuracy(model: BertModel, ids: Tensor, mask: Tensor) -> float:
    """Share of scenes whose first caption finds the second among those of all scenes given."""
    model.eval()
    with torch.no_grad():
        first, second = (F.normalize(_pooled(model, ids[:, k], mask[:, k])[1], dim=1) for k in (0, 1))
    model.train()
    return (first @ second.T).argmax(1).eq(torch.arange(len(first))).float().mean().item()


def make_text_encoder(
    folder: Path, tokenizer_folder: Path, *, steps: int, seed: int, scenes: int = 12_000
) -> dict[str, object]:
    """Train the text encoder and write it, with its tokenizer, to ``folder`` for AutoModel and AutoTokenizer."""
    generator = seed_everything(seed)
    tokenizer = save_text_tokenizer(tokenizer_folder, folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=64,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config)
    # The pooler is no part of the recipe (captions are pooled by the mean): let it pass the [CLS] token on as it is.
    nn.init.eye_(model.pooler.dense.weight)
    nn.init.zeros_(model.pooler.dense.bias)
    model.pooler.requires_grad_(False)
    head = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128))
    bias = nn.Parameter(torch.zeros(config.vocab_size))
    scale = nn.Parameter(torch.tensor(14.0).log())
    groups = decayed([model, head], 0.01)
    groups[1]["params"] += [bias, scale]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))

    def encode(captions: list[list[str]]) -> tuple[Tensor, Tensor]:
        flat = tokenizer([text for group in captions for text in group], padding=True, return_tensors="pt")
        shape = (len(captions), len(captions[0]), -1)
        return flat["input_ids"].view(shape), flat["attention_mask"].view(shape)

    ids, mask = encode(caption_groups(scenes))
    held_ids, held_mask = encode([group[:2] for group in caption_groups(512, "validation")])
    batch, special = 128, len(SPECIAL)
    progress = Progress("text", steps)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        rows = torch.randint(scenes, (batch,), generator=generator)
        pair = torch.rand(batch, ids.shape[1], generator=generator).argsort(1)[:, :2]
        some_ids = torch.cat([ids[rows, pair[:, 0]], ids[rows, pair[:, 1]]])
        some_mask = torch.cat([mask[rows, pair[:, 0]], mask[rows, pair[:, 1]]])
        longest = int(some_mask.sum(1).max())
        some_ids, some_mask = some_ids[:, :longest], some_mask[:, :longest]
        hidden, labels = _mask_words(some_ids, some_mask, special, tokenizer.mask_token_id, generator)
        # One pass serves both: a caption with hidden words is still to find its scene's other caption.
        hidden = torch.cat([hidden[:batch], some_ids[batch:]])
        labels[batch:] = _IGNORED
        tokens, pooled = _pooled(model, hidden, some_mask)
        where = labels != _IGNORED
        logits = head(tokens[where]) @ model.embeddings.word_embeddings.weight.T + bias
        masked = F.cross_entropy(logits, labels[where])
        first, second = F.normalize(pooled, dim=1).chunk(2)
        scores = scale.exp().clamp(max=50) * first @ second.T
        target = torch.arange(batch)
        contrast = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        optimizer.zero_grad()
        (masked + 0.5 * contrast).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.update(step, masked_words=masked, contrastive=contrast)
    found = _accuracy(model, held_ids, held_mask)
    model.eval().save_pretrained(folder)
    halve(folder / "model.safetensors")
    return {
        "recipe": "BERT: masked words (20 %) + 0.5 x InfoNCE between two captions of a scene, mean pooling",
        "parameters": sum(p.numel() for p in model.parameters()),
        "scenes": scenes,
        "steps": steps,
        "batch": batch,
        "learning_rate": 1e-3,
        "loss": {key: round(value, 4) for key, value in progress.smooth.items()},
        "held_out_caption_to_caption_top1_of_512": round(found, 4),
        "seed": seed,
    }
