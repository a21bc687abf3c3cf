"""The ladder's own facts: the equation, and that no gradient goes through the encoder."""

import pytest
import torch

from wlsup.adapters.ladder import TEMPERATURE, Ladder
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionSpec, build_vision

TINY = VisionSpec(pretrained=False, architecture="vit(img_size=32,patch_size=8,embed_dim=64,depth=3,num_heads=2)")


@pytest.fixture
def encoder():
    return build_vision(TINY).eval().requires_grad_(False)


def outputs_of(encoder):
    """Record the output of every module of the encoder before anything is attached to it."""
    seen = {}
    for name, part in encoder.backbone.named_modules():
        part.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output}))
    return seen


def test_no_activation_of_the_encoder_has_a_graph_and_the_side_network_learns(encoder):
    seen = outputs_of(encoder)
    ladder = Ladder(64, 3, 24).attach(encoder)
    torch.nn.init.normal_(ladder.up.weight)
    output = encoder(torch.randn(2, 3, 32, 32))
    assert {"blocks.0.attn.qkv", "blocks.2.mlp.fc2", "norm"} <= set(seen)
    after = {"fc_norm", "head_drop"}  # what comes after the ladder's own output
    assert not [name for name, value in seen.items() if value.requires_grad and name not in after]
    output.pooled.square().sum().backward()
    assert all(parameter.grad is not None for parameter in ladder.parameters())
    assert not any(parameter.grad is not None for parameter in encoder.parameters())


def test_what_is_kept_for_the_backward_pass_is_the_side_networks_own(encoder):
    """Of the size of the encoder's tokens only what each rung reads is kept, one a block and one at the entry."""
    ladder = Ladder(64, 3, 24, reduction=4).attach(encoder)
    torch.nn.init.normal_(ladder.up.weight)
    own = {parameter.untyped_storage().data_ptr() for part in (encoder, ladder) for parameter in part.parameters()}
    large = set()

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() >= 4 * 2 * 17 * 64 and storage.data_ptr() not in own:
            large.add(storage.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = encoder(torch.randn(2, 3, 32, 32)).pooled.sum()
    # Each of 3 rungs and the entry read one; the learned scale keeps what it multiplies.
    assert len(large) <= 5
    loss.backward()


def test_it_computes_the_published_recurrence(encoder):
    seen = outputs_of(encoder)
    ladder = Ladder(64, 3, 24, form="replace").attach(encoder).eval()
    torch.nn.init.normal_(ladder.mix)
    tokens = encoder(torch.randn(2, 3, 32, 32)).tokens
    state = ladder.enter(seen["norm_pre"]) + ladder.tell(ladder.embedding(None))[:, None]
    for i in range(3):
        mu = 1 / (1 + torch.exp(-ladder.mix[i] / TEMPERATURE))
        state = ladder.side[i](mu * state + (1 - mu) * ladder.down[i](seen[f"blocks.{i}"]))
    assert torch.allclose(tokens, ladder.up(ladder.norm(state)), atol=1e-5)


def test_the_gates_begin_at_one_half():
    assert torch.equal(torch.sigmoid(Ladder(64, 3, 24).mix / TEMPERATURE), torch.full((3,), 0.5))


def test_the_papers_form_begins_without_the_pretrained_features(encoder):
    images = torch.randn(2, 3, 32, 32)
    before = encoder(images).tokens
    Ladder(64, 3, 24, form="replace").attach(encoder)
    assert (encoder(images).tokens - before).abs().max() > 0.1


def test_gradient_checkpointing_gives_the_same_gradients(encoder):
    ladder = Ladder(64, 3, 24).attach(encoder)
    torch.nn.init.normal_(ladder.up.weight)
    images, gradients = torch.randn(2, 3, 32, 32), []
    for on in (False, True):
        encoder.backbone.set_grad_checkpointing(on)
        ladder.zero_grad()
        encoder(images).pooled.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in ladder.parameters()])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients, strict=True))


def test_rungs_can_be_left_out(encoder):
    ladder = Ladder(64, 3, 24, layers=[2, 0])
    assert ladder.layers == [0, 2]
    assert len(ladder.side) == len(ladder.down) == 2
    ladder.attach(encoder)
    encoder(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("wrong", [{"reduction": 0}, {"reduction": 65}, {"layers": [3]}, {"layers": []}, {"form": "x"}])
def test_settings_that_make_no_ladder_are_refused(wrong):
    with pytest.raises(WlsupError):
        Ladder(64, 3, 24, **wrong)
