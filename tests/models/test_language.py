"""What the language model promises: transformers' own numbers for every family, its generation, one message on lack."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from wlsup.errors import WlsupError
from wlsup.models.caption_tokens import MINI_LANGUAGE
from wlsup.models.language import FAMILIES, GenerationSpec, LanguageModel, LanguageSpec

sys.path.insert(0, str(Path(__file__).parent))

from tiny_language import CONFIGS, write_family  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family, random weights, with the mini tokenizer."""
    return {family: write_family(tmp_path_factory.mktemp(family), family) for family in CONFIGS}


@pytest.fixture
def mini():
    return LanguageModel(LanguageSpec())


def open_family(folders, family, **options):
    return LanguageModel(LanguageSpec(weights=str(folders[family]), max_length=16, **options))


def test_every_family_that_is_admitted_is_tested():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_logits_are_transformers_own_also_for_the_last_positions_only(self, folders, family):
        language, theirs = open_family(folders, family), AutoModelForCausalLM.from_pretrained(folders[family])
        ids = torch.randint(7, 960, (2, 9))
        with torch.no_grad():
            own = theirs(input_ids=ids).logits
            ours = language(language.embed(ids))
            last = language(language.embed(ids), keep=3)
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, own, atol=1e-5)
        assert torch.allclose(last, own[:, -3:], atol=1e-5)
        assert last.shape == (2, 3, language.vocabulary)
        # whose tanh GELU takes eight elementwise steps
        assert not any(
            type(part).__name__ in ("NewGELUActivation", "FastGELUActivation") for part in language.modules()
        )

    def test_what_is_padding_changes_nothing(self, folders, family):
        language = open_family(folders, family)
        ids = torch.randint(7, 960, (2, 9))
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[1, 6:] = False
        other = ids.clone()
        other[1, 6:] = 8
        with torch.no_grad():
            one, two = (language(language.embed(given), mask) for given in (ids, other))
            alone = language(language.embed(ids[1:, :6]))
        assert torch.allclose(one[1, :6], two[1, :6], atol=1e-6)
        assert torch.allclose(one[1, :6], alone[0], atol=1e-5)

    def test_greedy_through_the_cache_says_what_whole_passes_say(self, folders, family):
        language = open_family(folders, family)
        prefix = torch.randn(3, 5, language.width)
        said, embeddings = [], prefix
        with torch.no_grad():
            for _ in range(6):
                ids = language(embeddings)[:, -1].argmax(-1, keepdim=True)
                said.append(ids)
                embeddings = torch.cat([embeddings, language.embed(ids)], dim=1)
        wanted = language.tokenizer.decode(torch.cat(said, dim=1))
        assert language.generate(prefix, GenerationSpec(max_tokens=6)) == wanted

    def test_the_gradient_passes_through_to_the_prefix(self, folders, family):
        language = open_family(folders, family).requires_grad_(False)
        prefix = torch.randn(2, 3, language.width, requires_grad=True)
        ids = torch.randint(7, 960, (2, 4))
        language(torch.cat([prefix, language.embed(ids)], dim=1)).logsumexp(-1).sum().backward()
        assert (prefix.grad.abs().sum(-1) > 0).all()

    def test_blocks_are_the_transformer_blocks(self, folders, family):
        language = open_family(folders, family)
        calls, shapes = [], []
        for index, block in enumerate(language.blocks):
            block.register_forward_hook(lambda *_, index=index: calls.append(index))
        language.blocks[1].register_forward_pre_hook(
            lambda block, args, kwargs: shapes.append((args[0] if args else kwargs["hidden_states"]).shape),
            with_kwargs=True,
        )
        language(torch.randn(1, 3, language.width))
        assert calls == [0, 1]
        assert shapes == [(1, 3, language.hidden_size)]


def test_nothing_is_frozen_behind_the_plans_back(mini):
    assert all(parameter.requires_grad for parameter in mini.parameters())
    assert not any(module.training for module in mini.model.modules())


def test_mini_says_what_it_is(mini):
    assert (mini.width, mini.vocabulary, mini.positions, len(mini.blocks)) == (128, 960, 128, 4)
    assert mini.base["id"] == "mini"
    assert len(mini.base["sha256"]) == 64


def test_half_precision_weights_give_fp32_logits_near_the_full_ones(mini):
    half = LanguageModel(LanguageSpec(dtype="bfloat16"))
    assert next(half.parameters()).dtype == torch.bfloat16
    ids = mini.tokenizer(["a red square left of a circle"]).ids
    with torch.no_grad():
        one, two = mini(mini.embed(ids)), half(half.embed(ids))
    assert two.dtype == torch.float32
    assert (one.log_softmax(-1) - two.log_softmax(-1))[one.log_softmax(-1) > -5].abs().max() < 0.3


class TestGeneration:
    def score(self, language, prefix, caption):
        """The log-probability of a caption with its end token."""
        ids = language.tokenizer([caption]).ids
        with torch.no_grad():
            logits = language(torch.cat([prefix, language.embed(ids)], dim=1), keep=ids.shape[1] + 1)[:, :-1]
        return float(logits.log_softmax(-1).gather(2, ids[..., None]).sum())

    def test_what_a_folder_says_of_generation_changes_nothing(self, folders, tmp_path):
        folder = shutil.copytree(folders["gpt2"], tmp_path / "chatty")
        told = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "do_sample": True, "temperature": 9.0}
        (folder / "generation_config.json").write_text(json.dumps(told))
        plain, chatty = (LanguageModel(LanguageSpec(weights=str(one))) for one in (folders["gpt2"], folder))
        prefix = plain.embed(torch.tensor([[5, 20, 30, 40]]))
        for method in ("greedy", "beam", "nucleus"):
            spec = GenerationSpec(method=method, max_tokens=12)
            assert chatty.generate(prefix, spec) == plain.generate(prefix, spec)

    def test_beam_search_finds_captions_at_least_as_likely_a_token_as_greedy(self, mini):
        prefix = mini.embed(torch.tensor([[5, 20, 30, 40]]))
        greedy, beam = (mini.generate(prefix, GenerationSpec(method=m))[0] for m in ("greedy", "beam"))

        def per_token(caption):
            return self.score(mini, prefix, caption) / mini.tokenizer([caption]).mask.sum()

        assert per_token(beam) >= per_token(greedy)

    def test_nucleus_draws_from_the_nucleus_and_from_all_of_it(self, mini):
        prefix = mini.embed(torch.tensor([[5]]))
        probabilities, order = mini(prefix)[0, -1].div(4.0).softmax(-1).sort(descending=True)
        size = int((probabilities.cumsum(0) < 0.9).sum()) + 1
        nucleus = {mini.tokenizer.decode(order[i, None, None])[0] for i in range(size)}
        spec = GenerationSpec(method="nucleus", max_tokens=1, top_p=0.9, temperature=4.0)
        drawn = set(mini.generate(prefix.expand(2000, -1, -1), spec))
        assert drawn <= nucleus
        assert len(drawn) > 60  # transformers would draw from 50 at most, were it not told otherwise

    def test_the_same_seed_draws_the_same_and_disturbs_nobody(self, mini):
        prefix = mini.embed(torch.tensor([[5]])).expand(8, -1, -1)
        torch.manual_seed(7)
        wanted = torch.rand(3)
        torch.manual_seed(7)
        first = mini.generate(prefix, GenerationSpec(method="nucleus", seed=1))
        assert torch.equal(torch.rand(3), wanted)
        assert mini.generate(prefix, GenerationSpec(method="nucleus", seed=1)) == first
        assert mini.generate(prefix, GenerationSpec(method="nucleus", seed=2)) != first

    def test_a_caption_ends_at_its_end_token(self, mini):
        said = mini.generate(mini.embed(torch.tensor([[5]])), GenerationSpec())
        assert said[0]
        assert "[" not in said[0]

    def test_more_tokens_than_positions_are_refused(self, mini):
        with pytest.raises(WlsupError, match="128 positions"):
            mini.generate(torch.zeros(1, 100, 128), GenerationSpec(max_tokens=32))

    @pytest.mark.parametrize(
        "options", [{"method": "best"}, {"max_tokens": 0}, {"beams": 1}, {"top_p": 0.0}, {"temperature": 0.0}]
    )
    def test_values_out_of_range_are_refused(self, options):
        options = {"method": "beam" if "beams" in options else "nucleus", **options}
        with pytest.raises(WlsupError):
            GenerationSpec(**options)

    @pytest.mark.parametrize("option", ["beams", "top_p", "temperature", "seed"])
    def test_what_the_method_does_not_read_is_refused(self, option):
        value = {"beams": 3, "top_p": 0.5, "temperature": 2.0, "seed": 1}[option]
        reader = "beam" if option == "beams" else "nucleus"
        for method in ("greedy", "beam", "nucleus"):
            if method == reader:
                assert getattr(GenerationSpec(method, **{option: value}), option) == value
            else:
                with pytest.raises(WlsupError, match=f"generation.{option} is of method: {reader}; {method} does not"):
                    GenerationSpec(method, **{option: value})


class TestErrors:
    def test_no_room_for_the_captions_says_what_to_lower(self, mini):
        mini.check_length(96)
        with pytest.raises(WlsupError, match=r"129 positions.*has 128.*language.max_length"):
            mini.check_length(97)
        mini.check_length(60, GenerationSpec(max_tokens=68))
        with pytest.raises(WlsupError, match=r"129 positions.*has 128.*Lower generation.max_tokens"):
            mini.check_length(60, GenerationSpec(max_tokens=69))

    def test_a_hub_id_without_network_says_where_it_looked_and_what_to_do(self):
        with pytest.raises(WlsupError, match=r"hf download nobody/nothing.*"):
            LanguageModel(LanguageSpec(weights="nobody/nothing"))

    def test_a_path_that_is_no_folder(self, tmp_path):
        with pytest.raises(WlsupError, match="not a folder"):
            LanguageModel(LanguageSpec(weights=str(tmp_path / "gpt2")))

    def test_a_text_encoder_is_refused(self):
        with pytest.raises(WlsupError, match=r"Unknown language model family 'bert'.*gpt2"):
            LanguageModel(LanguageSpec(weights=str(MINI_LANGUAGE.parent / "text"), max_length=8))

    def test_weights_that_lack_a_tensor_are_refused_not_drawn_at_random(self, folders, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = shutil.copytree(folders["gpt2"], tmp_path / "cut")
        tensors = load_file(folder / "model.safetensors")
        tensors.pop("transformer.h.1.mlp.c_fc.weight")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WlsupError, match=r"lack 1 tensors.*h.1.mlp.c_fc.weight"):
            LanguageModel(LanguageSpec(weights=str(folder)))

    def test_a_truncated_file_is_one_message(self, folders, tmp_path):
        folder = shutil.copytree(folders["gpt2"], tmp_path / "short")
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(WlsupError, match="No causal language model"):
            LanguageModel(LanguageSpec(weights=str(folder)))

    def test_an_unknown_dtype(self):
        with pytest.raises(WlsupError, match="float32, bfloat16, float16"):
            LanguageSpec(dtype="int8")
