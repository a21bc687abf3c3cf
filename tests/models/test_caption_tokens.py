"""What captions look like as ids: words, one end token, padding, whatever tokenizer the model came with."""

import pytest
import torch
from transformers import AutoTokenizer

from wlsup.errors import WlsupError
from wlsup.models.caption_tokens import MINI_LANGUAGE, CaptionTokenizer, load_tokenizer

CAPTIONS = ["a red square", "a large blue circle left of a small kite"]


@pytest.fixture
def plain():
    return AutoTokenizer.from_pretrained(MINI_LANGUAGE)


def like_gpt2(plain):
    """Pads by its end token, as GPT-2's, which has no padding token."""
    plain.pad_token = None
    plain.eos_token = plain.bos_token = "[EOS]"
    return CaptionTokenizer(plain, "gpt2-like", 32)


def test_words_then_one_end_token_then_padding(plain):
    tokenizer = load_tokenizer("mini", 32)
    tokens = tokenizer(CAPTIONS)
    for row, mask, caption in zip(tokens.ids, tokens.mask, CAPTIONS, strict=True):
        words = plain(caption, add_special_tokens=False)["input_ids"]
        assert row[mask].tolist() == [*words, plain.eos_token_id]
        assert (row[~mask] == plain.pad_token_id).all()


def test_a_tokenizer_without_padding_is_padded_by_its_end_token(plain):
    tokens = like_gpt2(plain)(CAPTIONS)
    assert (tokens.ids[0, int(tokens.mask[0].sum()) - 1 :] == 6).all()
    assert tokens.mask[0].sum() < tokens.mask[1].sum() == tokens.ids.shape[1]


def test_a_start_token_that_the_model_would_add_is_left_out(plain):
    plain.add_bos_token = True
    assert 5 not in CaptionTokenizer(plain, "llama-like", 32)(CAPTIONS).ids


def test_a_caption_that_is_cut_does_not_end(plain):
    tokens = CaptionTokenizer(plain, "mini", 5)(CAPTIONS)
    assert tokens.ids.shape == (2, 5)
    assert tokens.mask[1].all()
    assert 6 not in tokens.ids[1]
    assert 6 in tokens.ids[0]


def test_a_length_pads_to_it_whatever_the_batch(plain):
    tokenizer = load_tokenizer("mini", 32)
    alone, together = tokenizer(CAPTIONS[:1], length=32), tokenizer(CAPTIONS, length=32)
    assert torch.equal(alone.ids[0], together.ids[0])
    assert together.ids.shape == (2, 32)


def test_decoding_gives_the_captions_back_and_stops_at_the_end(plain):
    for tokenizer in (load_tokenizer("mini", 32), like_gpt2(plain)):
        assert tokenizer.decode(tokenizer(CAPTIONS).ids) == CAPTIONS
        ids = torch.cat([tokenizer(CAPTIONS[:1]).ids, tokenizer(["blue"]).ids], dim=1)
        assert tokenizer.decode(ids) == CAPTIONS[:1]


def test_an_empty_caption_is_an_end_token():
    assert load_tokenizer("mini", 32)([""]).ids.tolist() == [[6]]


def test_the_hash_is_the_vocabularys(plain):
    one, two = load_tokenizer("mini", 32).base, load_tokenizer("mini", 16).base
    assert one == two
    plain.add_tokens(["[NEW]"])
    assert CaptionTokenizer(plain, "mini", 32).base["sha256"] != one["sha256"]


def test_no_end_token_and_no_room_are_refused(plain):
    with pytest.raises(WlsupError, match="max_length must be at least 2"):
        CaptionTokenizer(plain, "mini", 1)
    plain.eos_token = None
    with pytest.raises(WlsupError, match="no end token"):
        CaptionTokenizer(plain, "endless", 32)
