"""What can be a plain encoder is one, to 1e-5 and without touching the original; what cannot says so."""

import copy

import pytest
import torch

from wlsup.approaches import approach_class
from wlsup.approaches.plain import encoder_adapters, plain_encoder
from wlsup.models.export import TOLERANCE, difference_of

PLAIN = ["film", "full", "lora", "magma", "magma_moe", "mae_cl", "selective_k"]


@torch.no_grad()
def trained(name, **options):
    torch.manual_seed(0)
    approach = approach_class(name)(**options)
    approach.setup("fit")
    for parameter in approach.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape)
    return approach.eval()


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_encoder_computes_the_same_and_shares_nothing_that_was_changed(name):
    approach = trained(name)
    before = copy.deepcopy(approach.state_dict())
    plain = plain_encoder(approach)
    assert difference_of(approach.encoder, plain.features) <= TOLERANCE
    assert not any(module._forward_hooks for module in plain.modules())
    assert set(plain.state_dict()) == set(approach.encoder.state_dict())
    assert all(torch.equal(tensor, before[key]) for key, tensor in approach.state_dict().items())
    if name != "film":
        return
    pretrained = approach_class("film")().eval().encoder
    assert difference_of(pretrained, plain.features) > 1e-2


@pytest.mark.parametrize("top", [1, 3])
def test_film_in_the_last_blocks_folds_there(top):
    approach = trained("film", top=top)
    plain = plain_encoder(approach)
    assert difference_of(approach.encoder, plain.features) <= TOLERANCE
    for folded, own in zip(plain.blocks[0].parameters(), approach.encoder.blocks[0].parameters(), strict=True):
        assert torch.equal(folded, own)


def test_a_norm_without_weights_has_nowhere_to_fold_to():
    approach = trained("film")
    approach.encoder.blocks[0].norm1.weight = None
    assert plain_encoder(approach) is None


@pytest.mark.parametrize("name", ["bottleneck", "lst", "merged_attention", "token_replay"])
def test_what_a_plain_vit_cannot_hold_is_not_folded(name):
    approach = trained(name)
    assert plain_encoder(approach) is None
    assert len(encoder_adapters(approach)) == 1


def test_adapters_of_a_language_model_are_not_the_encoders():
    assert encoder_adapters(trained("magma")) == []
