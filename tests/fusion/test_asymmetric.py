"""Asymmetric attention: the stream that is asked never learns by whom."""

import math

import pytest
import torch

from wlsup.batch import Condition
from wlsup.errors import WlsupError
from wlsup.fusion.asymmetric import AsymmetricFusion, ImageAsksLayer, TextAsksLayer
from wlsup.fusion.base import FusionSpec
from wlsup.models.vision import VisionSpec, build_vision

D, L, M, C = 24, 9, 6, 10
SPEC = FusionSpec(width=16, heads=4, hidden=20)


def text_fusion(width=D, depth=4):
    return AsymmetricFusion(width, depth, C, FusionSpec(kind="asymmetric_text", width=16, heads=4, hidden=20))


def captions(count):
    mask = torch.arange(M)[None] < torch.randint(1, M + 1, (count, 1))
    return Condition(torch.randn(count, M, C), mask, torch.randn(count, C), torch.ones(count, dtype=torch.bool))


@pytest.mark.parametrize(("kind", "asked"), [(ImageAsksLayer, "text"), (TextAsksLayer, "image")])
def test_the_stream_that_is_asked_has_zero_gradient_from_the_other(kind, asked):
    layers = [kind(D, SPEC) for _ in range(3)]
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    image, text = torch.randn(2, L, D, requires_grad=True), torch.randn(2, M, D, requires_grad=True)
    mask = torch.ones(2, M, dtype=torch.bool)
    x, y = image, text
    for layer in layers:
        x, y = layer(x, y, mask)
    output, other = (y, image) if asked == "text" else (x, text)
    (gradient,) = torch.autograd.grad(output.square().sum(), other, allow_unused=True, retain_graph=True)
    assert gradient is None or not gradient.any()
    output, other = (x, text) if asked == "text" else (y, image)
    (gradient,) = torch.autograd.grad(output.square().sum(), other)
    assert gradient.abs().max() > 0


def test_the_text_asks_the_image_as_it_entered_the_layer():
    layer = TextAsksLayer(D, SPEC)
    image, text, mask = torch.randn(2, L, D), torch.randn(2, M, D), torch.ones(2, M, dtype=torch.bool)
    _, before = layer(image, text, mask)
    torch.nn.init.constant_(layer.feed_gate.g, 3.0)
    after_image, after = layer(image, text, mask)
    assert torch.equal(before, after)
    assert not torch.allclose(after_image, image)


def test_many_captions_at_once_score_as_each_alone():
    fusion, seen = text_fusion(), [torch.randn(3, L, D) for _ in range(2)]
    given = captions(6)
    scores = fusion.score(seen, given)
    assert scores.shape == (3, 2)
    for row in range(2):
        some = slice(3 * row, 3 * row + 3)
        alone = Condition(given.tokens[some], given.mask[some], given.pooled[some], given.present[some])
        assert torch.allclose(fusion.score(seen, alone)[:, 0], scores[:, row], atol=1e-6)
    for picture in range(3):
        one = [tokens[picture : picture + 1] for tokens in seen]
        alone = Condition(*(x[picture : picture + 1] for x in (given.tokens, given.mask, given.pooled, given.present)))
        assert torch.allclose(fusion.score(one, alone)[0, 0], scores[picture, 0], atol=1e-6)
    with pytest.raises(WlsupError, match="shared out"):
        fusion.score(seen, captions(4))


def test_recording_collects_each_pass_and_its_scores_teach_the_encoder():
    encoder = build_vision(
        VisionSpec(pretrained=False, architecture="vit(img_size=32,patch_size=8,embed_dim=24,depth=4,num_heads=3)")
    ).eval()
    fusion = text_fusion().attach(encoder)
    images = torch.randn(3, 3, 32, 32)
    with fusion.recording() as passes:
        encoder(images, ids_keep=torch.arange(5).expand(3, -1))
        encoder(images)
    encoder(images)
    assert [[tuple(x.shape) for x in seen] for seen in passes] == [[(3, 6, D)] * 2, [(3, 17, D)] * 2]
    fusion.score(passes[-1], captions(3)).square().sum().backward()
    assert encoder.blocks[3].attn.qkv.weight.grad.abs().max() > 0
    assert fusion.layers[0].feed_gate.g.grad.abs().item() > 0  # of the encoder's side, by way of the second layer
    assert math.isfinite(float(fusion.score_head.weight.grad.norm()))
