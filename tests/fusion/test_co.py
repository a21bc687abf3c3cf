"""Co-attention: two readings, both simultaneous."""

import pytest
import torch

from wlsup.fusion.base import FusionSpec
from wlsup.fusion.co import CoFusion, CoLayer, MeterLayer

D, L, M = 24, 9, 6
SPEC = FusionSpec(width=16, heads=4, hidden=20)


def layer_of(kind):
    layer = kind(D, SPEC)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def streams(count=3):
    mask = torch.arange(M)[None] < torch.randint(1, M + 1, (count, 1))
    return torch.randn(count, L, D), torch.randn(count, M, D), mask


def test_both_readings_are_there_and_named():
    assert CoFusion.kinds == {"co": CoLayer, "co_meter": MeterLayer}


def test_meter_is_self_then_cross_then_feed_forward_from_the_others_old_state():
    layer, (image, text, mask) = layer_of(MeterLayer), streams()
    old_image, old_text, allowed = layer.image_norm(image), layer.text_norm(text), mask[:, None]
    x = image + layer.self_gate.g.tanh() * layer.image_self(old_image, old_image)
    x = x + layer.cross_gate.g.tanh() * layer.image_cross(layer.image_cross_norm(x), old_text, allowed)
    x = x + layer.feed_gate.g.tanh() * layer.image_feed(x)
    y = text + layer.text_self(old_text, old_text, allowed)
    y = y + layer.text_cross(layer.text_cross_norm(y), old_image)
    y = y + layer.text_feed(y)
    given = layer(image, text, mask)
    assert torch.allclose(given[0], x, atol=1e-6)
    assert torch.allclose(given[1], y, atol=1e-6)


@pytest.mark.parametrize("kind", [CoLayer, MeterLayer])
def test_the_update_is_simultaneous(kind):
    # What the image stream becomes must not reach the text in the same layer: with the image's own weights changed, the
    # text stays. Reusing the new image state for the text, one after the other, fails this; and the other way round.
    layer, (image, text, mask) = layer_of(kind), streams()
    before_image, before_text = layer(image, text, mask)
    for changed, still in (("image", 1), ("text", 0)):
        other = layer_of(kind)
        other.load_state_dict(layer.state_dict())
        for name, part in other.named_children():
            gates = changed == "image" and "gate" in name
            if gates or name.startswith(changed) and not name.endswith("_norm"):
                for parameter in part.parameters():
                    torch.nn.init.normal_(parameter)
        after = other(image, text, mask)
        before = before_image, before_text
        assert torch.equal(after[still], before[still])
        assert not torch.allclose(after[1 - still], before[1 - still], atol=1e-3)


def test_in_the_first_reading_a_stream_does_not_look_at_itself():
    layer, (image, text, mask) = layer_of(CoLayer), streams()
    moved = image.clone()
    moved[:, 1] += torch.randn(D)
    before, after = layer(image, text, mask)[0], layer(moved, text, mask)[0]
    others = [0, *range(2, L)]
    assert torch.allclose(before[:, others], after[:, others], atol=1e-6)
    meter = layer_of(MeterLayer)
    before, after = meter(image, text, mask)[0], meter(moved, text, mask)[0]
    assert not torch.allclose(before[:, others], after[:, others], atol=1e-4)
