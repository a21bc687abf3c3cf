"""FiLM's own facts."""

from pathlib import Path

import torch

from wlsup.adapters.film import FiLM
from wlsup.batch import Condition
from wlsup.models.vision import VisionSpec, build_vision


def test_parameters_per_site_follow_the_formula():
    width, depth, embedding = 48, 3, 16
    adapter = FiLM(width, depth, condition_width=24, embedding_width=embedding)
    assert sum(p.numel() for p in adapter.generators.parameters()) == 2 * depth * (embedding + 1) * 2 * width


def test_it_scales_and_shifts_every_channel_of_every_token_after_the_norms():
    encoder = build_vision(
        VisionSpec(pretrained=False, architecture="vit(img_size=32,patch_size=8,embed_dim=48,depth=2,num_heads=3)")
    ).eval()
    adapter = FiLM(48, 2, condition_width=24)
    torch.nn.init.normal_(adapter.generators[1].weight)
    torch.nn.init.normal_(adapter.generators[1].bias)
    condition = Condition(
        torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 24), torch.ones(2, dtype=torch.bool)
    )
    seen = {}
    encoder.blocks[0].norm2.register_forward_hook(lambda m, i, o: seen.update(plain=o))
    adapter.attach(encoder)
    encoder.blocks[0].norm2.register_forward_hook(lambda m, i, o: seen.update(modulated=o))
    encoder(torch.randn(2, 3, 32, 32), condition)
    delta_gamma, beta = adapter.generators[1](adapter.embedding(condition)).chunk(2, dim=-1)
    wanted = (1 + delta_gamma)[:, None] * seen["plain"] + beta[:, None]
    assert torch.allclose(seen["modulated"], wanted, atol=1e-5)


def test_the_page_has_the_counts_of_vit_b_with_clips_text_encoder():
    page = Path("docs/approaches/film.md").read_text()
    for top in (None, 4):
        count = sum(p.numel() for p in FiLM(768, 12, condition_width=512, top=top).parameters())
        assert f"| {count:,} |" in page
