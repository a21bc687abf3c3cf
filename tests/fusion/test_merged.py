"""Merged attention, and the other strategies as merged attention under a mask."""

import pytest
import torch

from wlsup.fusion.asymmetric import ImageAsksLayer, TextAsksLayer
from wlsup.fusion.attention import attention_pattern
from wlsup.fusion.base import FusionSpec
from wlsup.fusion.co import CoLayer
from wlsup.fusion.merged import MergedLayer

D, L, M = 24, 9, 6
SPEC = FusionSpec(width=16, heads=4, hidden=20)


def merged():
    layer = MergedLayer(D, SPEC)
    for parameter in layer.parameters():  # norms and gates away from where they start
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def streams(count=3):
    mask = torch.arange(M)[None] < torch.randint(1, M + 1, (count, 1))
    return torch.randn(count, L, D), torch.randn(count, M, D), mask


def sharing(layer, source):
    """Give each part of a layer the weights of the merged layer's part of that kind."""
    for name, part in layer.named_children():
        kind = name if "gate" in name else name.split("_")[-1]
        part.load_state_dict(getattr(source, kind).state_dict())
    return layer


@pytest.mark.parametrize(
    ("kind", "other"),
    [("co", CoLayer), ("asymmetric_image", ImageAsksLayer), ("asymmetric_text", TextAsksLayer)],
)
@pytest.mark.parametrize("updates_text", [True, False])
def test_with_shared_weights_and_the_right_mask_it_is_each_of_the_others(kind, other, updates_text):
    source = merged()
    source.updates_text = updates_text
    layer = sharing(other(D, SPEC, updates_text or kind == "asymmetric_text"), source)
    image, text, mask = streams()
    wanted_image, wanted_text = source(image, text, mask, attention_pattern(kind, L, M))
    given_image, given_text = layer(image, text, mask)
    assert (given_image - wanted_image).abs().max() <= 1e-6
    if updates_text or kind != "asymmetric_text":
        assert (given_text - wanted_text)[mask].abs().max() <= 1e-6
    everything, _ = source(image, text, mask)
    assert (everything - wanted_image).abs().max() > 1e-3


def test_each_stream_sees_both():
    layer = merged()
    image, text, mask = (x.requires_grad_() if x.is_floating_point() else x for x in streams())
    for output in layer(image, text, mask):
        gradients = torch.autograd.grad(output.square().sum(), (image, text), retain_graph=True)
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_leaving_the_text_as_it_came_does_not_change_the_image():
    layer, (image, text, mask) = merged(), streams()
    wanted, _ = layer(image, text, mask)
    layer.updates_text = False
    given, same = layer(image, text, mask)
    assert torch.allclose(given, wanted, atol=1e-6)
    assert same is text
