"""The tokenizer: byte-level BPE over the mini world's captions, shared by the text encoder and the language model."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mini_pretraining.common import caption_groups

__all__ = ["SPECIAL", "make_tokenizer", "save_language_tokenizer", "save_text_tokenizer"]

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]"]
_COMMON = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "clean_up_tokenization_spaces": False,
    "add_prefix_space": True,  # transformers 4 sets the pre-tokenizer by this, not by tokenizer.json
}


def make_tokenizer(folder: Path, vocabulary: int = 960, scenes: int = 3000) -> dict[str, object]:
    """Train the tokenizer and write ``tokenizer.json`` and its configuration to ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    # The prefix space of the first word goes again when text is put together.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    captions = [caption for group in caption_groups(scenes) for caption in group]
    tokenizer.train_from_iterator(captions, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    _save(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_COMMON), folder)
    lengths = [len(ids.ids) for ids in tokenizer.encode_batch(captions)]
    return {
        "recipe": "byte-level BPE on captions of the train split, lower case",
        "scenes": scenes,
        "vocabulary": tokenizer.get_vocab_size(),
        "longest_caption_tokens": max(lengths),
        "mean_caption_tokens": round(sum(lengths) / len(lengths), 2),
    }


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save it under the class's name that transformers 4 knows too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def _load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def save_text_tokenizer(folder: Path, target: Path) -> PreTrainedTokenizerFast:
    """The same vocabulary for the text encoder: [CLS] caption [SEP]."""
    tokenizer = _load(folder)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ids
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        **_COMMON,
    )
    _save(fast, target)
    return fast


def save_language_tokenizer(folder: Path, target: Path) -> PreTrainedTokenizerFast:
    """The same vocabulary for the language model: nothing is added to a caption; [EOS] is another token than [PAD]."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_load(folder),
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=128,
        padding_side="right",
        **_COMMON,
    )
    _save(fast, target)
    return fast
