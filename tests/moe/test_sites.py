"""Finding dense MLPs: every admitted family's, in the blocks that were chosen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from dense_families import CONFIGS, FAMILIES, data, make, outputs  # noqa: E402

from wlsup.errors import WlsupError  # noqa: E402
from wlsup.models.language import FAMILIES as LANGUAGE_FAMILIES  # noqa: E402
from wlsup.moe.sites import blocks_of, choose_blocks, inputs_of, language_model_of, sites_of  # noqa: E402


def test_every_language_family_that_is_admitted_is_tested():
    assert set(CONFIGS) == set(LANGUAGE_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_that_is_found_is_the_one_the_block_computes(family):
    model = make(family)
    sites = sites_of(model)
    assert [site.index for site in sites] == [0, 1]
    assert all(site.width == 32 for site in sites)
    replaced = [model.get_submodule(site.name) for site in sites]
    assert [part is next(iter(site.parts.values())) for part, site in zip(replaced, sites, strict=True)] == [True, True]
    wanted = outputs(model, family, data(family))
    for site in sites:
        site.replace(site.expert())  # a copy, as one module, in its place
    assert torch.equal(outputs(model, family, data(family)), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_shares_no_memory(family):
    site = sites_of(make(family))[0]
    own = {parameter.data_ptr() for parameter in site.mlp().parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in site.expert().parameters())


@pytest.mark.parametrize("family", ["vit", "gpt2", "opt"])
def test_diverted_the_layer_computes_and_the_keys_stay(family):
    model = make(family)
    wanted, keys = outputs(model, family, data(family)), list(model.state_dict())
    site = sites_of(model)[1]
    other = site.expert()
    nn.init.zeros_(next(p for p in other.parameters() if p.ndim > 1))
    undo = site.divert(other)
    seen = []
    hook = next(iter(site.parts.values())).register_forward_hook(lambda *_: seen.append(1))
    assert not torch.allclose(outputs(model, family, data(family)), wanted)
    assert seen == [1]  # what hangs on the MLP goes on working
    assert list(model.state_dict()) == keys
    undo()
    hook.remove()
    assert torch.equal(outputs(model, family, data(family)), wanted)


@pytest.mark.parametrize("family", ["vit", "gpt2", "opt"])
def test_inputs_are_kept_for_each_site(family):
    model = make(family)
    with inputs_of(sites_of(model)) as kept:
        outputs(model, family, data(family))
    rows = [torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]) for inputs in kept]
    tokens = 3 * (17 if family == "vit" else 12)
    assert [tuple(x.shape) for x in rows] == [(tokens, 32), (tokens, 32)]
    assert not torch.equal(*rows)
    with inputs_of(sites_of(model)) as again:
        pass
    outputs(model, family, data(family))
    assert again == [[], []]


class TestChoosingBlocks:
    def test_the_ways(self):
        assert choose_blocks(12) == [1, 3, 5, 7, 9, 11]
        assert choose_blocks(12, every=3) == [2, 5, 8, 11]
        assert choose_blocks(4, every=1) == [0, 1, 2, 3]
        assert choose_blocks(12, last=2) == [10, 11]
        assert choose_blocks(12, blocks=[7, 2]) == [2, 7]

    @pytest.mark.parametrize(
        "options", [{"every": 0}, {"every": 13}, {"last": 13}, {"blocks": []}, {"blocks": [12]}, {"blocks": [1, 1]}]
    )
    def test_numbers_out_of_range(self, options):
        with pytest.raises(WlsupError, match="12 blocks|0 to 11"):
            choose_blocks(12, **options)

    def test_one_way_at_a_time(self):
        with pytest.raises(WlsupError, match="every and last together"):
            choose_blocks(12, every=2, last=2)


class TestErrors:
    def test_no_transformer(self):
        with pytest.raises(WlsupError, match="No transformer blocks in a Linear"):
            blocks_of(nn.Linear(2, 2))
        assert language_model_of(nn.Linear(2, 2)) is None

    def test_a_block_without_a_known_mlp(self):
        model = make("vit")
        model.blocks[1].mlp = nn.Identity()
        with pytest.raises(WlsupError, match=r"Block 1 \(Block\) has no dense MLP.*a Identity"):
            sites_of(model)

    def test_a_block_that_is_not_there(self):
        with pytest.raises(WlsupError, match="no block 2: the model has blocks 0 to 1"):
            sites_of(make("vit"), [0, 2])
