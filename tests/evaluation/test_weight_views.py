"""Which linear maps a model is said to have, against the modules that compute with them."""

import copy

import pytest
import timm
import torch
from torch import nn

from wlsup.adapters.bottleneck import Bottleneck
from wlsup.adapters.language import LanguageBottleneck
from wlsup.evaluation.weight_views import linear_shim, weight_views
from wlsup.fusion.attention import Attention
from wlsup.models.lora import LowRank
from wlsup.moe import MLPExpert, MoE, MoESpec


def views_of(model, **options):
    return {view.name: view for view in weight_views(model, **options)[0]}


def tiny_vit():
    return timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0
    )


def test_a_fused_qkv_comes_apart_and_whole_when_asked():
    vit = tiny_vit()
    weight = vit.blocks[0].attn.qkv.weight
    views = views_of(vit)
    for part, rows in zip("qkv", weight.chunk(3), strict=True):
        view = views[f"blocks.0.attn.qkv.{part}"]
        assert torch.equal(view.matrix(), rows)
        assert view.shape == (24, 24)
        assert view.sources == ("blocks.0.attn.qkv.weight",)
    assert torch.equal(views_of(vit, fused=True)["blocks.0.attn.qkv"].matrix(), weight)


def test_every_weight_of_a_vit_is_a_view_or_left_out_with_a_reason():
    vit = tiny_vit()
    views, left_out = weight_views(vit)
    named = {source for view in views for source in view.sources} | {left.name for left in left_out}
    assert named == {name for name, parameter in vit.named_parameters() if parameter.ndim > 1}
    assert {left.name for left in left_out} == {"cls_token", "pos_embed"}
    assert views[0].name == "patch_embed.proj"
    assert torch.equal(views[0].matrix(), vit.patch_embed.proj.weight.flatten(1))


def test_in_proj_weight_of_torchs_attention_comes_apart():
    attention = nn.Sequential(nn.MultiheadAttention(12, 3))
    views = views_of(attention)
    assert set(views) == {f"0.in_proj_weight.{part}" for part in "qkv"} | {"0.out_proj"}
    assert torch.equal(views["0.in_proj_weight.k"].matrix(), attention[0].in_proj_weight[12:24])


def test_keys_and_values_of_this_packages_attention_come_apart():
    views = views_of(Attention(16, 8, 2))
    assert [view.shape for view in views.values()] == [(8, 16), (8, 16), (8, 16), (16, 8)]
    assert list(views) == ["query", "key_value.k", "key_value.v", "out"]


def test_stacked_experts_count_experts_times_layers():
    class StackedExperts(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.up = nn.Parameter(torch.randn(experts, 6, 10))
            self.down = nn.Parameter(torch.randn(experts, 10, 6))

    model = nn.Sequential(*(nn.ModuleDict({"experts": StackedExperts(5)}) for _ in range(3)))
    views = views_of(model)
    assert len(views) == 5 * 3 * 2
    assert torch.equal(views["1.experts.up.4"].matrix(), model[1]["experts"].up[4])
    # a stack of something else is not guessed at
    other = nn.Module()
    other.pictures = nn.Parameter(torch.randn(3, 8, 8))
    views, left_out = weight_views(other)
    assert not views
    assert [left.name for left in left_out] == ["pictures"]


def test_each_expert_of_a_mixture_is_a_layer_and_its_router_too():
    views = views_of(MoE([MLPExpert(8, 16) for _ in range(4)], width=8, spec=MoESpec(experts=4, k=1)))
    assert len([name for name in views if name.startswith("experts.")]) == 8
    assert views["router"].shape == (4, 8)


@pytest.mark.parametrize("kind", [Bottleneck, LanguageBottleneck])
def test_a_bottleneck_is_its_effective_update(kind):
    bottleneck = kind(20, 4)
    nn.init.normal_(bottleneck.up.weight)
    views = views_of(nn.ModuleDict({"adapter": bottleneck}))
    assert list(views) == ["adapter.update"]
    view = views["adapter.update"]
    assert (view.shape, view.rank, view.update) == ((20, 20), 4, True)
    basis = torch.eye(20)
    linear_part = bottleneck.up.weight @ (bottleneck.down.weight @ basis)
    torch.testing.assert_close(view.matrix().float(), linear_part)
    assert set(view.sources) == {"adapter.up.weight", "adapter.down.weight"}


def test_lora_is_seen_merged_as_peft_merges_it_with_the_update_apart():
    vit = tiny_vit()
    before = {name: view.matrix().clone() for name, view in views_of(vit).items()}
    LowRank(vit, rank=3, alpha=6.0, targets=("qkv", "fc1"))
    for name, parameter in vit.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)
    views = views_of(vit)
    assert set(views) - set(before) == {
        *(f"blocks.{i}.attn.qkv.update.{part}" for i in range(2) for part in "qkv"),
        *(f"blocks.{i}.mlp.fc1.update" for i in range(2)),
    }
    layer = vit.blocks[1].mlp.fc1
    merged = copy.deepcopy(layer)
    merged.merge()
    torch.testing.assert_close(views["blocks.1.mlp.fc1"].matrix(), merged.get_base_layer().weight)
    update = views["blocks.1.mlp.fc1.update"]
    torch.testing.assert_close(update.matrix(), 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    assert update.rank == 3
    torch.testing.assert_close(
        views["blocks.0.attn.qkv.v"].matrix(),
        before["blocks.0.attn.qkv.v"] + views["blocks.0.attn.qkv.update.v"].matrix(),
    )


def test_language_models_weights_are_turned_and_taken_apart():
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=12, n_layer=1, n_head=2))
    views = views_of(gpt2)
    c_attn = gpt2.transformer.h[0].attn.c_attn.weight  # (in, out)
    assert torch.equal(views["transformer.h.0.attn.c_attn.k"].matrix(), c_attn[:, 12:24].T)
    assert views["transformer.h.0.mlp.c_fc"].shape == (48, 12)
    assert "lm_head" not in views  # tied to the embedding, which counts once
    sizes = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2))
    attention = neox.gpt_neox.layers[0].attention
    states = torch.randn(1, 5, 12)
    heads = attention.query_key_value(states).view(1, 5, -1, 3 * attention.head_size)  # as its forward does
    _, keys, _ = heads.chunk(3, dim=-1)
    key = views_of(neox)["gpt_neox.layers.0.attention.query_key_value.k"].matrix()
    bias = attention.query_key_value.bias.view(2, 3, 6)[:, 1].flatten()
    torch.testing.assert_close(states @ key.T + bias, keys.flatten(2))


def test_looking_changes_nothing_and_a_shim_shares_the_weights():
    vit = tiny_vit()
    state, modules = copy.deepcopy(vit.state_dict()), {name: set(vars(part)) for name, part in vit.named_modules()}
    views, _ = weight_views(vit)
    shim = linear_shim(views)
    assert [name for name, part in shim.named_modules() if isinstance(part, nn.Linear)] == [
        view.name.replace(".", "/") for view in views
    ]
    shim.get_submodule("blocks/0/mlp/fc1").longname = "written by a tool"
    assert shim.get_submodule("blocks/0/mlp/fc1").weight.data_ptr() == vit.blocks[0].mlp.fc1.weight.data_ptr()
    assert {name: set(vars(part)) for name, part in vit.named_modules()} == modules
    assert all(torch.equal(state[name], tensor) for name, tensor in vit.state_dict().items())
    assert all(parameter.requires_grad for name, parameter in vit.named_parameters() if name != "pos_embed")
