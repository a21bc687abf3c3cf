"""Groups and the scores by which they are chosen."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from wlsup.errors import WlsupError
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.selection.criteria import alpha_scores, choose_groups, gradient_scores, place_scores
from wlsup.selection.groups import Group, parameter_groups

TINY = VisionSpec(pretrained=False, architecture="vit(img_size=32,patch_size=8,embed_dim=48,depth=3,num_heads=3)")


@pytest.fixture
def backbone():
    return build_vision(TINY).backbone


@pytest.mark.parametrize(
    ("granularity", "names"),
    [
        ("block", ["embed", "blocks.0", "blocks.1", "blocks.2", "norm"]),
        ("sublayer", ["embed", *(f"blocks.{i}.{part}" for i in range(3) for part in ("attn", "mlp")), "norm"]),
    ],
)
def test_groups_are_in_order_and_hold_each_parameter_once_but_positions(backbone, granularity, names):
    groups = parameter_groups(backbone, granularity)
    assert [group.name for group in groups] == names
    held = [name for group in groups for name in group.names]
    assert sorted(held) == sorted(name for name, _ in backbone.named_parameters() if name != "pos_embed")


@pytest.mark.parametrize("granularity", ["block", "sublayer", "tensor"])
def test_patterns_match_the_groups_own_parameters_and_no_others(backbone, granularity):
    from fnmatch import fnmatchcase

    every = [name for name, _ in backbone.named_parameters()]
    for group in parameter_groups(backbone, granularity):
        matched = [name for name in every if any(fnmatchcase(name, pattern) for pattern in group.patterns)]
        assert matched == list(group.names)


def test_attention_pooling_comes_last_with_the_norm():
    pooled = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, global_pool="map"
    )
    groups = parameter_groups(pooled)
    assert [group.name for group in groups] == ["embed", "blocks.0", "blocks.1", "norm"]
    assert not any(name.startswith("attn_pool") for name in groups[0].names)
    assert {name.split(".")[0] for name in groups[-1].names} >= {"norm", "attn_pool"}
    assert parameter_groups(pooled, "tensor")[-1].name.startswith("attn_pool.")


def test_place_decides_first_last_and_a_seeded_chance(backbone):
    groups = parameter_groups(backbone)

    def chosen(criterion, seed=0):
        return [group.name for group in choose_groups(groups, place_scores(groups, criterion, seed), 2)]

    assert chosen("last") == ["blocks.2", "norm"]
    assert chosen("first") == ["embed", "blocks.0"]
    assert chosen("random") == chosen("random")
    assert len({tuple(chosen("random", seed)) for seed in range(20)}) > 3


def test_gradient_scores_are_the_formulas():
    a, b = torch.nn.Parameter(torch.tensor([3.0, 4.0])), torch.nn.Parameter(torch.tensor([2.0]))
    groups = [Group("a", ("a",), ("a",)), Group("b", ("b",), ("b",))]
    parameters = {"a": a, "b": b}

    def losses():
        yield (a * torch.tensor([1.0, 0.0])).sum() + 5 * b.sum()  # gradients (1, 0) and 5
        yield (a * torch.tensor([0.0, 3.0])).sum() + 1 * b.sum()  # (0, 3) and 1

    rgn = gradient_scores(groups, parameters, losses(), "rgn")
    assert rgn == {"a": pytest.approx((1 / 5 + 3 / 5) / 2), "b": pytest.approx((5 / 2 + 1 / 2) / 2)}
    fisher = gradient_scores(groups, parameters, losses(), "fisher")
    assert fisher == {"a": pytest.approx((1 / 2 + 9 / 2) / 2), "b": pytest.approx((25 + 1) / 2)}


def test_weights_that_are_all_zero_break_no_score_and_no_batch_is_an_error():
    zero = torch.nn.Parameter(torch.zeros(3))
    groups = [Group("zero", ("zero",), ("zero",))]
    scores = gradient_scores(groups, {"zero": zero}, [zero.sum()], "rgn")
    assert scores["zero"] < float("inf")
    with pytest.raises(WlsupError, match="no batch"):
        gradient_scores(groups, {"zero": zero}, [], "rgn")


def test_alpha_prefers_the_group_that_learned_least():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(120, 120))[0] for _ in range(2))
    steep = left @ torch.diag(torch.arange(1, 121).float() ** -1.0) @ right  # eigenvalues k^-2: alpha = 1.5
    parameters = {"heavy.weight": torch.nn.Parameter(steep), "noise.weight": torch.nn.Parameter(torch.randn(120, 120)),
                  "norm.weight": torch.nn.Parameter(torch.ones(120))}  # fmt: skip
    groups = [Group(name.split(".")[0], (name,), (name,)) for name in parameters]
    scores = alpha_scores(groups, parameters)
    assert scores["heavy"] < 2.5 < scores["noise"]
    assert scores["norm"] == 0.0
    assert [group.name for group in choose_groups(groups, scores, 1)] == ["noise"]


@pytest.mark.parametrize("k", [-1, 6])
def test_k_out_of_range_is_refused(backbone, k):
    groups = parameter_groups(backbone)
    with pytest.raises(WlsupError, match="between 0"):
        choose_groups(groups, place_scores(groups, "last"), k)
