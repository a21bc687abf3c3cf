import pytest
import torch
from torch import nn

from wlsup.errors import WlsupError
from wlsup.models.language import GenerationSpec, LanguageModel, LanguageSpec
from wlsup.moe import MLPExpert, MoE, MoESpec, TokenIds

PREFIX, EXPERTS = 3, 4


def test_prefix_positions_have_ids_of_their_own():
    ids = TokenIds(vocabulary=10, positions=2)
    assert ids.rows == 12
    assert ids.with_prefix(torch.tensor([[4, 5], [6, 7]])).tolist() == [[10, 11, 4, 5], [10, 11, 6, 7]]


def test_held_ids_are_found_and_gone_afterwards():
    ids = TokenIds(vocabulary=10)
    with ids.holding(torch.tensor([[1, 2, 3]]), mask=torch.tensor([[1, 1, 0]])):
        assert ids.find(1, 3).tolist() == [[1, 2, 3]]
        assert ids.find_mask(1, 3).tolist() == [[True, True, False]]
        with ids.holding(torch.tensor([[9]])):
            assert ids.find(1, 1).tolist() == [[9]]
            assert ids.find_mask(1, 1) is None
        assert ids.find(1, 3).tolist() == [[1, 2, 3]]
    with pytest.raises(WlsupError, match="are asked for, and none are known.*holding"):
        ids.find(1, 3)
    assert ids.mask is None


def test_beams_of_a_sample_share_its_ids():
    ids = TokenIds(vocabulary=10)
    with ids.holding(torch.tensor([[1, 2], [3, 4]])):
        assert ids.find(4, 2).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


def test_what_the_embedding_is_fed_is_found_and_a_bare_prefix_needs_nothing():
    ids, embedding = TokenIds(vocabulary=10, positions=3), nn.Embedding(10, 4)
    ids.watch(embedding)
    assert ids.find(2, 3).tolist() == [[10, 11, 12]] * 2
    embedding(torch.tensor([[7], [8]]))
    assert ids.find(2, 1).tolist() == [[7], [8]]
    ids.unwatch()
    embedding(torch.tensor([[1], [2]]))
    assert ids.find(2, 1).tolist() == [[7], [8]]


def test_words_embedded_inside_a_pass_do_not_hide_the_ids_held():
    ids, embedding = TokenIds(vocabulary=10, positions=2), nn.Embedding(10, 4)
    ids.watch(embedding)
    words = torch.tensor([[4, 5, 6]])
    with ids.holding(ids.with_prefix(words)):
        embedding(words)
        assert ids.find(1, 5).tolist() == [[10, 11, 4, 5, 6]]


class Mixed:
    """The mini language model, in whose blocks a hash-routed mixture is added to the MLP's output."""

    def __init__(self):
        self.language = LanguageModel(LanguageSpec(weights="mini"))
        self.ids = TokenIds(self.language.vocabulary, PREFIX)
        self.ids.watch(self.language.model.get_input_embeddings())
        torch.manual_seed(0)
        width, self.layers = self.language.hidden_size, []
        for block in self.language.blocks:
            experts = [MLPExpert(width, 16) for _ in range(EXPERTS)]
            for expert in experts:
                nn.init.normal_(expert.down.weight, std=0.3)
            spec = MoESpec(experts=EXPERTS, router="hash")
            moe = MoE(experts, width, spec, causal=True, vocabulary=self.ids.rows, token_ids=self.ids).eval()
            block.mlp.register_forward_hook(lambda module, inputs, output, moe=moe: output + moe(output))
            self.layers.append(moe)
        self.prefix = torch.randn(2, PREFIX, self.language.width)

    def greedy_from_scratch(self, tokens):
        """Every step over the whole sequence, without a cache."""
        words = torch.zeros(2, 0, dtype=torch.int64)
        for _ in range(tokens):
            embeddings = torch.cat([self.prefix, self.language.embed(words)], dim=1)
            with self.ids.holding(self.ids.with_prefix(words)), torch.no_grad():
                logits = self.language(embeddings)
            words = torch.cat([words, logits[:, -1:].argmax(-1)], dim=1)
        return words


def test_generation_with_a_cache_routes_every_fed_token_by_its_id():
    mixed, fed = Mixed(), []
    original = mixed.ids.find
    mixed.ids.find = lambda batch, length: fed.append(original(batch, length)) or fed[-1]
    with mixed.ids.holding(None):
        captions = mixed.language.generate(mixed.prefix, GenerationSpec(max_tokens=8))
    steps = fed[:: len(mixed.layers)]
    assert [tuple(step.shape) for step in steps[:3]] == [(2, PREFIX), (2, 1), (2, 1)]
    words = mixed.greedy_from_scratch(8)
    tokenizer = mixed.language.tokenizer
    assert captions == tokenizer.decode(words)
    assert torch.equal(steps[0], mixed.ids.with_prefix(words[:, :0]))
    for number, step in enumerate(steps[1:]):
        running = (words[:, : number + 1] != tokenizer.end_id).all(1)
        assert torch.equal(step[running, 0], words[running, number])


def test_generation_from_a_prompt_and_with_beams_finds_its_ids():
    mixed = Mixed()
    words = torch.tensor([[5, 6], [7, 8]])
    embeddings = torch.cat([mixed.prefix, mixed.language.embed(words)], dim=1)
    with mixed.ids.holding(mixed.ids.with_prefix(words)):
        captions = mixed.language.generate(embeddings, GenerationSpec(method="beam", beams=3, max_tokens=5))
    assert len(captions) == 2
