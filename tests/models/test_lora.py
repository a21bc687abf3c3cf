"""Low-rank updates: the published form, the pretrained keys, and the way back."""

import pytest
import torch

from wlsup.approaches import approach_class
from wlsup.errors import WlsupError
from wlsup.models.lora import LowRank, without_low_rank
from wlsup.models.saving import save_vision
from wlsup.models.vision import VisionSpec, build_vision

TINY = VisionSpec(pretrained=False, architecture="vit(img_size=32,patch_size=8,embed_dim=48,depth=2,num_heads=3)")


@pytest.fixture
def encoder():
    return build_vision(TINY).eval()


def moved(encoder, **settings):
    lora = LowRank(encoder.backbone, rank=4, alpha=8.0, **settings)
    for name, parameter in lora.named_parameters():
        if ".B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return lora


def test_it_adds_the_scaled_product_and_starts_at_nothing(encoder):
    weight = encoder.blocks[0].mlp.fc1.weight.detach().clone()
    bias = encoder.blocks[0].mlp.fc1.bias.detach().clone()
    x = torch.randn(5, 48)
    before = encoder.blocks[0].mlp.fc1(x)
    lora = LowRank(encoder.backbone, rank=4, alpha=8.0)
    assert torch.equal(encoder.blocks[0].mlp.fc1(x), before)
    part = lora.get_submodule("blocks_0_mlp_fc1")
    torch.nn.init.normal_(part["B"].weight)
    wanted = x @ (weight + 2.0 * part["B"].weight @ part["A"].weight).T + bias
    assert torch.allclose(encoder.blocks[0].mlp.fc1(x), wanted, atol=1e-4)


def test_parameters_follow_the_formula(encoder):
    lora = LowRank(encoder.backbone, rank=4, targets=["qkv", "fc2"])
    assert sum(p.numel() for p in lora.parameters()) == 2 * 4 * ((48 + 3 * 48) + (4 * 48 + 48))


def test_the_pretrained_keys_and_tensors_are_unchanged_and_load(encoder):
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    moved(encoder)
    state = encoder.state_dict()
    assert set(state) == set(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    other = {name: tensor + 1 for name, tensor in before.items()}
    encoder.load_state_dict(other)
    assert torch.equal(encoder.blocks[0].attn.qkv.base_layer.weight, other["backbone.blocks.0.attn.qkv.weight"])


def test_taken_out_it_is_the_original_and_merged_it_computes_the_same(encoder, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    original = encoder.features(images)
    moved(encoder)
    adapted = encoder.features(images)
    assert (adapted - original).abs().max() > 1e-2
    plain, merged = without_low_rank(encoder), without_low_rank(encoder, merge=True)
    assert torch.equal(plain.features(images), original)
    assert torch.allclose(merged.features(images), adapted, atol=1e-4)
    assert set(merged.state_dict()) == set(plain.state_dict()) == set(build_vision(TINY).state_dict())
    assert torch.equal(encoder.features(images), adapted)
    again = build_vision(VisionSpec(weights=str(save_vision(merged, tmp_path / "merged")))).eval()
    assert torch.allclose(again.features(images), adapted, atol=1e-4)


def test_the_approach_gives_both():
    torch.manual_seed(0)
    approach = approach_class("lora")()
    approach.setup("fit")
    for name, parameter in approach.lora.named_parameters():
        if ".B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    images = torch.randn(2, 3, 64, 64)
    approach.eval()
    assert torch.equal(approach.pretrained().features(images), build_vision(VisionSpec()).eval().features(images))
    assert torch.allclose(approach.merged().features(images), approach.features(images), atol=1e-4)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"targets": ["query"]}, {"targets": []}])
def test_what_cannot_be_made_is_refused(encoder, wrong):
    with pytest.raises(WlsupError):
        LowRank(encoder.backbone, **wrong)
