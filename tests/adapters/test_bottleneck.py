"""The bottleneck's own facts."""

from pathlib import Path

import pytest
import torch

from wlsup.adapters.bottleneck import Bottleneck, BottleneckAdapter


@pytest.mark.parametrize(("width", "hidden", "count"), [(768, 64, 99_136), (48, 8, 824)])
def test_unconditioned_parameter_count_is_houlsbys(width, hidden, count):
    assert sum(p.numel() for p in Bottleneck(width, hidden).parameters()) == count


def test_one_on_each_branch_of_each_block():
    adapter = BottleneckAdapter(width=48, depth=3, condition_width=24, hidden=8)
    assert len(adapter.bottlenecks) == 6


def test_it_computes_the_published_form_plus_the_condition():
    bottleneck = Bottleneck(12, 4, embedding_width=5)
    torch.nn.init.normal_(bottleneck.up.weight)
    x, embedding = torch.randn(2, 3, 12), torch.randn(2, 5)
    hidden = x @ bottleneck.down.weight.T + bottleneck.down.bias + (embedding @ bottleneck.condition.weight.T)[:, None]
    wanted = x + torch.nn.functional.gelu(hidden) @ bottleneck.up.weight.T + bottleneck.up.bias
    assert torch.allclose(bottleneck(x, embedding), wanted, atol=1e-5)


def test_the_page_has_the_counts_of_vit_b_with_clips_text_encoder():
    page = Path("docs/approaches/bottleneck.md").read_text()
    for top in (None, 4):
        count = sum(p.numel() for p in BottleneckAdapter(768, 12, condition_width=512, top=top).parameters())
        assert f"| {count:,} |" in page
