"""The frozen text encoder: what a caption's condition is, whatever stands beside it in the batch."""

import pytest
import torch
import transformers

from wlsup.errors import WlsupError
from wlsup.models.text import MINI_TEXT, TextEncoder, TextSpec
from wlsup.models.weights import tensors_sha256

CAPTIONS = ["a red star", "two small blue circles left of a large green square on sand", "rain"]


@pytest.fixture(scope="module")
def text():
    return TextEncoder(TextSpec()).eval()


@pytest.fixture
def clip_folder(tmp_path):
    """A small CLIP text model with the mini tokenizer, as transformers saves it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINI_TEXT)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id or tokenizer.sep_token_id,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def siglip_folder(place, kind, whole=False, **text):
    """A small SigLIP of random weights with the mini tokenizer, and what transformers says of it when it is saved."""
    if not hasattr(transformers, f"{kind}TextModel"):
        pytest.skip(f"this transformers has no {kind}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINI_TEXT)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32, **text,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    if whole:
        vision = {**sizes, "image_size": 32, "patch_size": 16}
        config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
        model = getattr(transformers, f"{kind}Model")(config)
    else:
        model = getattr(transformers, f"{kind}TextModel")(getattr(transformers, f"{kind}TextConfig")(**text))
    model.eval().save_pretrained(place)
    tokenizer.save_pretrained(place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)  # it may pad on another side now
    read = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        return getattr(model, "text_model", model)(input_ids=read["input_ids"])


def test_shapes_and_all_present(text):
    condition = text(CAPTIONS)
    count, length, width = condition.tokens.shape
    assert (count, width) == (3, text.width)
    assert condition.mask.shape == (3, length)
    assert condition.pooled.shape == (3, text.width)
    assert condition.mask[1].all()
    assert not condition.mask[0].all()
    assert condition.present.tolist() == [True] * 3


def test_a_caption_means_the_same_beside_longer_ones(text):
    alone, together = text(CAPTIONS[:1]), text(CAPTIONS)
    assert torch.allclose(alone.pooled[0], together.pooled[0], atol=1e-5)
    real = int(alone.mask.sum())
    assert torch.allclose(alone.tokens[0], together.tokens[0, :real], atol=1e-5)


def test_mean_pooling_leaves_padding_out(text):
    condition = text(CAPTIONS)
    for tokens, mask, pooled in zip(condition.tokens, condition.mask, condition.pooled, strict=True):
        assert torch.allclose(tokens[mask].mean(0), pooled, atol=1e-5)


def test_cls_pooling_takes_the_first_token():
    condition = TextEncoder(TextSpec(pooling="cls"))(CAPTIONS)
    assert torch.equal(condition.pooled, condition.tokens[:, 0])


def test_a_model_trained_to_give_a_pooled_output_gives_its_own(clip_folder):
    text = TextEncoder(TextSpec(weights=str(clip_folder)))
    batch = text.tokenizer(CAPTIONS[:1], return_tensors="pt")
    with torch.no_grad():
        expected = text.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    assert torch.equal(text(CAPTIONS[:1]).pooled, expected)
    assert not torch.equal(
        TextEncoder(TextSpec(weights=str(clip_folder), pooling="mean"))(CAPTIONS[:1]).pooled, expected
    )


@pytest.mark.parametrize("whole", [False, True], ids=["text alone", "whole model"])
@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
def test_siglip_reads_captions_padded_to_all_its_positions_as_it_was_trained(kind, whole, tmp_path):
    wanted = siglip_folder(tmp_path, kind, whole)
    text = TextEncoder(TextSpec(weights=str(tmp_path)))
    read = text(CAPTIONS)
    assert torch.allclose(read.pooled, wanted.pooler_output, atol=1e-6)
    assert torch.allclose(read.tokens, wanted.last_hidden_state, atol=1e-6)
    words = [len(text.tokenizer(caption).input_ids) for caption in CAPTIONS]
    assert read.mask.sum(1).tolist() == [min(count, 16) for count in words]  # padding is for nobody else to look at
    assert torch.allclose(text(CAPTIONS[:1]).pooled[0], read.pooled[0], atol=1e-6)
    cut = TextEncoder(TextSpec(weights=str(tmp_path), max_length=9))(CAPTIONS)
    assert torch.allclose(cut.pooled[0], read.pooled[0], atol=1e-6)
    assert cut.mask.sum(1).tolist() == [min(count, 9) for count in words]


def test_siglip_padded_on_the_left_is_read_so(tmp_path):
    siglip_folder(tmp_path, "Siglip")
    text = TextEncoder(TextSpec(weights=str(tmp_path)))
    text.tokenizer.padding_side = "left"
    read = text.tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        wanted = text.model(input_ids=read["input_ids"]).pooler_output
    assert torch.allclose(text(CAPTIONS).pooled, wanted, atol=1e-6)
    assert torch.equal(text(CAPTIONS).mask, read["attention_mask"].bool())


def test_pooled_outputs_that_are_wider_than_tokens_are_refused_with_their_cure(tmp_path):
    siglip_folder(tmp_path, "Siglip", projection_size=48)
    with pytest.raises(WlsupError, match="48 channels.*text.pooling mean"):
        TextEncoder(TextSpec(weights=str(tmp_path)))
    assert TextEncoder(TextSpec(weights=str(tmp_path), pooling="mean"))(CAPTIONS).pooled.shape == (3, 32)


def test_a_tokenizer_that_needs_a_package_says_which(tmp_path, monkeypatch):
    def lacking(place):
        raise ImportError("\nSiglipTokenizer requires the SentencePiece library")

    siglip_folder(tmp_path, "Siglip")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lacking)
    with pytest.raises(WlsupError, match="pip install sentencepiece.*SiglipTokenizer requires"):
        TextEncoder(TextSpec(weights=str(tmp_path)))


def test_captions_are_cut_to_the_shorter_of_the_two_limits(text, clip_folder):
    long = [" ".join(["red star"] * 200)]
    assert TextEncoder(TextSpec(max_length=7))(long).mask.shape[1] == 7
    assert TextEncoder(TextSpec(weights=str(clip_folder)))(long).mask.shape[1] == 16


def test_it_is_only_read(text):
    condition = text(CAPTIONS)
    assert not condition.tokens.requires_grad
    assert not condition.pooled.requires_grad


def test_the_base_names_the_weights(text):
    assert TextEncoder(TextSpec()).base == text.base
    assert text.base["id"] == "mini"
    assert text.base["sha256"] == tensors_sha256(text.model.state_dict())


def test_other_weights_are_another_base(text, clip_folder):
    assert TextEncoder(TextSpec(weights=str(clip_folder))).base["sha256"] != text.base["sha256"]


@pytest.mark.parametrize("weights", ["/nowhere/at/all", "nobody/has-this-model"])
def test_a_lacking_model_ends_in_one_message(weights, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WlsupError, match="No text encoder"):
        TextEncoder(TextSpec(weights=weights))


def test_captions_that_were_kept_are_not_read_again_and_come_in_the_order_asked_for(monkeypatch):
    text = TextEncoder(TextSpec())
    wanted = text(CAPTIONS).pooled
    text.remember([*CAPTIONS, CAPTIONS[0]])
    monkeypatch.setattr(text, "forward", lambda captions: pytest.fail("read again"))
    assert torch.allclose(text.pooled(CAPTIONS), wanted, atol=1e-5)
    assert torch.allclose(text.pooled(CAPTIONS[::-1]), wanted.flip(0), atol=1e-5)


def test_a_caption_that_was_not_kept_is_read():
    text = TextEncoder(TextSpec())
    wanted = text(CAPTIONS).pooled
    assert torch.equal(text.pooled(CAPTIONS), wanted)
    text.remember(CAPTIONS[:-1])
    assert torch.equal(text.pooled(CAPTIONS), wanted)


def test_what_is_kept_is_the_same_whatever_the_order_and_no_weight():
    once, again = TextEncoder(TextSpec()), TextEncoder(TextSpec())
    names = set(once.state_dict())
    once.remember(CAPTIONS, batch_size=2)  # who stands beside whom, and how much padding, is of no order given
    again.remember([*reversed(CAPTIONS), *CAPTIONS], batch_size=2)
    assert torch.equal(once.pooled(CAPTIONS), again.pooled(CAPTIONS))
    assert set(once.state_dict()) == names
