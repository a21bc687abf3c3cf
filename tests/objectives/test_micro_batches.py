"""Encoding a batch part by part: the loss and the gradients of the whole, in the memory of a part."""

from dataclasses import replace
from inspect import signature

import pytest
import torch
from torch.nn import functional as F

from wlsup.approaches import approach_class
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.objectives.micro_batches import in_micro_batches
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec

NAMES = ("full", "film", "bottleneck", "token_replay", "lst", "lora", "mae_cl", "co_attention", "merged_attention",
         "asymmetric_attention", "selective_k")  # fmt: skip
CAPTIONS = ["a red star", "two small blue circles on sand", "rain", "a green ring above a box", "snow"]


def made(name, micro_batch, regularizer=RegularizerSpec(), **objective):
    torch.manual_seed(0)
    default = signature(approach_class(name).__init__).parameters["objective"].default
    objective = replace(default, micro_batch=micro_batch, **objective)
    approach = approach_class(name)(objective=objective, regularizer=regularizer)
    approach.setup("fit")
    approach.train()
    torch.manual_seed(1)
    with torch.no_grad():  # off the identity, where many gradients are zero
        for parameter in approach.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return approach


def batch():
    generator = torch.Generator().manual_seed(2)
    images, replay = torch.randn(2, len(CAPTIONS), 3, 64, 64, generator=generator)
    return CaptionBatch(images, CAPTIONS, [str(i) for i in range(len(CAPTIONS))], replay=replay)


def step(name, micro_batch, **options):
    approach = made(name, micro_batch, **options)
    torch.manual_seed(3)
    losses = approach.training_losses(batch())
    losses["loss"].backward()
    return losses, {n: p.grad for n, p in approach.named_parameters() if p.requires_grad}


def assert_alike(one, other):
    (losses, gradients), (again, others) = one, other
    assert losses.keys() == again.keys()
    for key in losses:
        torch.testing.assert_close(losses[key], again[key], rtol=1e-5, atol=1e-6)
    largest = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    for key, gradient in gradients.items():
        if gradient is None:
            assert others[key] is None, key
        else:
            torch.testing.assert_close(gradient, others[key], rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_the_batch_at_once(name):
    assert_alike(step(name, None), step(name, 2))


@pytest.mark.parametrize(
    "objective", [{"contrastive": "siglip", "contrastive_view": "masked"}, {"contrastive_weight": 0.0}]
)
def test_so_they_are_with_other_views_and_losses(objective):
    assert_alike(step("film", None, **objective), step("film", 2, **objective))


@pytest.mark.parametrize("name", ["full", "film"])
def test_so_they_are_where_a_regularizer_holds_the_features(name):
    held = RegularizerSpec(distill=2.0, replay=3.0)
    assert_alike(step(name, None, regularizer=held), step(name, 2, regularizer=held))


def test_what_layers_draw_is_drawn_again_for_the_gradient():
    x = torch.ones(8, 50, requires_grad=True)
    y = in_micro_batches(lambda rows: F.dropout(x[rows], 0.5), 8, 3)
    torch.rand(7)  # the stream has gone on by the backward pass
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert 0 < (y == 0).sum() < y.numel()


def kept_bytes(micro_batch, **terms):
    """What the graph of a step holds on to."""
    approach, held = made("full", micro_batch, regularizer=RegularizerSpec(**terms)), {}

    def note(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in approach.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = approach.training_losses(batch())["loss"]
    del loss
    return sum(size for place, size in held.items() if place not in weights)


@pytest.mark.parametrize("terms", [{}, {"distill": 1.0}, {"replay": 1.0}], ids=["alone", "distill", "replay"])
def test_the_graph_keeps_next_to_nothing(terms):
    assert kept_bytes(1, **terms) < 0.05 * kept_bytes(None, **terms)


def test_without_gradients_parts_are_encoded_too_and_nothing_is_wrapped():
    sizes = []
    with torch.no_grad():
        out = in_micro_batches(lambda rows: sizes.append(rows) or torch.arange(10.0)[rows], 10, 4)
    assert torch.equal(out, torch.arange(10.0))
    assert [rows.stop - rows.start for rows in sizes] == [4, 4, 2]


def test_where_it_does_nothing_or_cannot_be_it_is_refused():
    with pytest.raises(WlsupError, match="at least 1"):
        ObjectiveSpec(micro_batch=0)
    default = signature(approach_class("lit").__init__).parameters["objective"].default
    with pytest.raises(WlsupError, match="keeps no activations"):
        approach_class("lit")(objective=replace(default, micro_batch=4))
    asymmetric = approach_class("asymmetric_attention")
    fusion = replace(signature(asymmetric.__init__).parameters["fusion"].default, kind="asymmetric_text")
    with pytest.raises(WlsupError, match="matching looks at the whole batch"):
        asymmetric(fusion=fusion, objective=ObjectiveSpec(micro_batch=4))
