"""The shipped mini models: the files the recipe records, small, loadable with no network, and worth having."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import wlsup
from wlsup.data.mini import mini_captions, mini_eval_set
from wlsup.evaluation.knn import knn_predict
from wlsup.models.mae import DecoderSpec, build_mae
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.objectives.reconstruction import reconstruction_loss

ASSETS = Path(wlsup.__file__).parent / "assets" / "mini"
LIMIT = 8_000_000


@pytest.fixture(scope="module")
def record():
    return json.loads((ASSETS / "RECIPE.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    import socket

    def refuse(*_: object, **__: object):
        raise OSError("this test may not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def held_out():
    groups = mini_captions("validation", 120, seed=5).captions
    return [caption for group in groups for caption in group]


def test_every_file_is_the_one_the_recipe_records(record):
    files = {
        path.relative_to(ASSETS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in ASSETS.rglob("*")
        if path.is_file() and path.name != "RECIPE.json"
    }
    assert files == record["sha256"]


def test_all_files_together_are_at_most_eight_megabytes():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= LIMIT


def test_the_recipe_says_how_each_part_was_made(record):
    assert set(record["parts"]) == {"tokenizer", "text", "lm", "vision"}
    for part in record["parts"].values():
        assert {"recipe", "seconds", "versions"} <= set(part)
    for name in ("text", "lm", "vision"):
        assert {"seed", "steps", "loss"} <= set(record["parts"][name])


def test_text_encoder_loads_and_brings_captions_of_one_scene_together():
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "text")
    model = AutoModel.from_pretrained(ASSETS / "text").float().eval()
    groups = mini_captions("validation", 100, seed=6).captions

    def pooled(captions: list[str]) -> torch.Tensor:
        batch = tokenizer(captions, padding=True, return_tensors="pt")
        with torch.no_grad():
            tokens = model(**batch).last_hidden_state
        weight = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((tokens * weight).sum(1) / weight.sum(1), dim=1)

    scores = pooled([group[0] for group in groups]) @ pooled([group[1] for group in groups]).T
    found = scores.argmax(1).eq(torch.arange(100)).float().mean().item()
    assert found > 0.3, "chance is 0.01"


def test_no_weight_of_the_text_encoder_is_drawn_anew_at_loading():
    from transformers import AutoModel

    first, second = (AutoModel.from_pretrained(ASSETS / "text").float() for _ in range(2))
    again = second.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("folder", ["tokenizer", "text", "lm"])
def test_any_transformers_reads_the_tokenizer_as_it_was_trained(folder, held_out):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    ours, trained = (
        AutoTokenizer.from_pretrained(ASSETS / folder),
        Tokenizer.from_file(f"{ASSETS / folder}/tokenizer.json"),
    )
    for caption in held_out:
        assert ours(caption).input_ids == trained.encode(caption).ids


@pytest.mark.parametrize("folder", ["tokenizer", "text", "lm"])
def test_tokenizer_gives_a_caption_back(folder, held_out):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / folder)
    assert len(tokenizer) <= 1000
    for caption in held_out[:50]:
        ids = tokenizer(caption)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(tokenizer("Über 3 Bäume!")["input_ids"], skip_special_tokens=True) == "über 3 bäume!"


def test_language_model_expects_unseen_captions_far_better_than_word_counts_do(held_out):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "lm")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "lm").float().eval()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert len({bos, eos, tokenizer.pad_token_id}) == 3
    assert model.config.eos_token_id == eos
    assert model.config.pad_token_id == tokenizer.pad_token_id
    rows = [[bos, *tokenizer(caption)["input_ids"], eos] for caption in held_out]
    counts = Counter(token for row in rows for token in row[1:])
    total = sum(counts.values())
    unigram = math.exp(-sum(count / total * math.log(count / total) for count in counts.values()))
    for shift in (0, 64):
        loss = 0.0
        for row in rows:
            ids = torch.tensor([row])
            positions = torch.arange(len(row))[None] + shift
            with torch.no_grad():
                logits = model(input_ids=ids, position_ids=positions).logits[0, :-1]
            loss += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        # The counts are those of these very captions: a lower bar than any model without context can reach.
        assert math.exp(loss / total) < unigram / 5


def test_language_model_ends_its_captions():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "lm")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "lm").float().eval()
    torch.manual_seed(0)
    start = torch.full((16, 1), tokenizer.bos_token_id)
    with torch.no_grad():
        written = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=48
        )
    assert (written[:, 1:] == tokenizer.eos_token_id).any(1).float().mean() > 0.9


def test_autoencoder_reconstructs_better_than_an_untrained_one():
    spec = VisionSpec(weights="mini")
    trained = build_mae(spec).eval()
    assert trained.decoder_pretrained
    fresh = build_mae(VisionSpec(weights="mini", pretrained=False), DecoderSpec(width=64, depth=2, heads=4)).eval()
    from wlsup.data.mini import normalised, pretraining_pictures

    images = normalised(pretraining_pictures(64, seed=4), trained.encoder.image_spec)
    noise = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    losses = []
    for model in (trained, fresh):
        with torch.no_grad():
            output = model(images, noise=noise)
        losses.append(reconstruction_loss(output.prediction, images, output.mask, 8, trained.normalize_pixels).item())
    assert losses[0] < 0.5 * losses[1]


def test_neighbours_in_the_encoders_features_beat_raw_pixels_and_a_random_encoder(record):
    encoder = build_vision(VisionSpec(weights="mini")).eval()
    torch.manual_seed(0)
    untrained = build_vision(VisionSpec(weights="mini", pretrained=False)).eval()
    sets = mini_eval_set("mini_shapes", encoder.image_spec)
    (bank, labels), (queries, targets) = sets.train.tensors(), sets.test.tensors()

    def accuracy(extract) -> float:
        with torch.no_grad():
            features = [
                F.normalize(torch.cat([extract(some) for some in x.split(250)]), dim=1) for x in (bank, queries)
            ]
        return knn_predict(features[0], labels, features[1], k=20, temperature=0.07).eq(targets).float().mean().item()

    pretrained = accuracy(encoder.features)
    assert pretrained == pytest.approx(record["parts"]["vision"]["knn"]["pretrained"]["mini_shapes"], abs=0.02)
    assert pretrained > accuracy(untrained.features) + 0.1
    assert pretrained > accuracy(lambda images: images.flatten(1)) + 0.1
    assert pretrained < 0.95
