"""A frozen part below the first trained parameter runs without a graph: it keeps no activation."""

import pytest
import torch

from wlsup.approaches import approach_class
from wlsup.objectives.two_branch import ObjectiveSpec


def graph_of(approach, images):
    """Which block outputs of the encoder carry a graph."""
    approach.setup("fit")
    approach.train()
    found, handles = {}, []
    for index, block in enumerate(approach.encoder.blocks):
        hook = lambda m, i, output, index=index: found.update({index: output.requires_grad})  # noqa: E731
        handles.append(block.register_forward_hook(hook, prepend=True))
    approach.encoder(images)
    for handle in handles:
        handle.remove()
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize(
    ("name", "settings", "without"),
    [
        ("selective_k", {"k": 3}, 4),  # blocks 4, 5 and the norm train: blocks 0 to 3 keep nothing
        ("selective_k", {"criterion": "explicit", "k": None, "groups": ["norm"]}, 6),
        ("selective_k", {"criterion": "explicit", "k": None, "groups": ["embed"]}, 0),
        ("lit", {}, 6),
        ("lst", {}, 6),
        ("linear_map", {}, 6),
        ("magma", {"encoder_lr": 0.0}, 6),
        ("full", {}, 0),
        ("film", {}, 0),
        ("film", {"top": 2}, 4),
        ("bottleneck", {"top": 2}, 4),
    ],
)
def test_blocks_below_the_first_trained_one_have_no_graph(name, settings, without):
    graph = graph_of(approach_class(name)(**settings), torch.randn(2, 3, 64, 64))
    assert graph == [False] * without + [True] * (len(graph) - without)


@pytest.mark.parametrize("name", ["bottleneck", "film"])
def test_adapters_in_the_top_blocks_keep_less_for_the_backward_pass(name):
    def kept(top):
        torch.manual_seed(0)
        approach = approach_class(name)(objective=ObjectiveSpec(reconstruction_weight=0.0), top=top)
        approach.setup("fit")
        approach.train()
        own = {parameter.data_ptr() for parameter in approach.parameters()}
        sizes = {}

        def note(tensor):
            if tensor.data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            approach.encoder(torch.randn(4, 3, 64, 64)).pooled.sum()
        return sum(sizes.values())

    assert kept(2) < 0.5 * kept(None)
