"""The parts of fusion layers."""

import pytest
import torch

from wlsup.errors import WlsupError
from wlsup.fusion.attention import Attention, FeedForward, Gate, attention_pattern


def test_it_is_multi_head_attention():
    attention, reference = Attention(12, 12, 3), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([attention.query.weight, attention.key_value.weight]))
        reference.in_proj_bias.copy_(torch.cat([attention.query.bias, attention.key_value.bias]))
        reference.out_proj.weight.copy_(attention.out.weight)
    queries, keys = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    mask = torch.arange(7)[None] < torch.tensor([[3], [7]])
    wanted, _ = reference(queries, keys, keys, key_padding_mask=~mask)
    assert torch.allclose(attention(queries, keys, mask[:, None]), wanted, atol=1e-6)
    assert torch.allclose(attention(queries, keys), reference(queries, keys, keys)[0], atol=1e-6)


def test_a_query_that_may_look_nowhere_gets_0_and_no_gradient_turns_nan():
    attention = Attention(8, 8, 2)
    x = torch.randn(2, 4, 8, requires_grad=True)
    allowed = torch.ones(1, 4, 4, dtype=torch.bool)
    allowed[:, 1] = False
    out = attention(x, x, allowed)
    assert torch.equal(out[:, 1], torch.zeros(2, 8))
    assert not torch.equal(out[:, 0], torch.zeros(2, 8))
    out.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_patterns_are_the_four_blocks_switched_on_and_off():
    image, text = slice(0, 3), slice(3, 5)
    for kind, on in {
        "merged": {"vv", "vt", "tv", "tt"},
        "co": {"vt", "tv"},
        "asymmetric_image": {"vt"},
        "asymmetric_text": {"tv"},
    }.items():
        pattern = attention_pattern(kind, 3, 2)
        blocks = {"vv": (image, image), "vt": (image, text), "tv": (text, image), "tt": (text, text)}
        assert {name for name, block in blocks.items() if pattern[block].all()} == on
        assert {name for name, block in blocks.items() if pattern[block].any()} == on
    with pytest.raises(WlsupError, match="Valid: merged, co"):
        attention_pattern("cross", 3, 2)


def test_a_gate_is_shut_at_first_and_has_a_gradient():
    gate, x = Gate(), torch.randn(2, 3, 4)
    assert torch.equal(gate(x), torch.zeros_like(x))
    gate(x).square().sum().backward()
    assert gate.g.grad.item() == 0.0  # at the minimum of this loss; not at that of any other:
    gate.g.grad = None
    gate(x).sum().backward()
    assert gate.g.grad.abs().item() > 0
    torch.nn.init.constant_(gate.g, 0.5)
    assert torch.allclose(gate(x), torch.tensor(0.5).tanh() * x)


def test_feed_forward_is_the_pre_norm_mlp():
    feed, x = FeedForward(6, 10), torch.randn(2, 3, 6)
    normed = torch.nn.functional.layer_norm(x, (6,))
    hidden = torch.nn.functional.gelu(normed @ feed.up.weight.T + feed.up.bias)
    assert torch.allclose(feed(x), hidden @ feed.down.weight.T + feed.down.bias, atol=1e-5)


@pytest.mark.parametrize(("inner", "heads"), [(10, 4), (8, 0), (0, 1)])
def test_heads_that_do_not_divide_the_width_are_refused(inner, heads):
    with pytest.raises(WlsupError, match="multiple of the number of heads"):
        Attention(8, inner, heads)
