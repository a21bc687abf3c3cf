"""What token_replay promises beside the contract, which covers its defaults: the same with other options."""

import copy

import pytest
import torch

from wlsup.approaches.token_replay import TokenReplayApproach
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.models.vision import VisionSpec, build_vision
from wlsup.objectives.two_branch import ObjectiveSpec
from wlsup.optim import build_optimizer
from wlsup.reprogramming.conditioner import ReprogrammerSpec

CAPTIONS = ["a red square", "a blue circle above a star", "green", "a small star left of a night"]


def batch_of_noise():
    return CaptionBatch(torch.randn(4, 3, 64, 64), CAPTIONS, ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "concat"},
        {"source": "image"},
        {"source": "caption", "tokens": None},
        {"gate": "zero_up", "layers": [5]},
    ],
    ids=str,
)
def test_the_contract_holds_with_other_options(options):
    approach = TokenReplayApproach(**options)
    images, batch = torch.randn(2, 3, 64, 64), batch_of_noise()
    approach.setup("fit")
    assert (approach.eval().features(images) - build_vision(VisionSpec()).eval().features(images)).abs().max() <= 1e-6
    trained, before = set(approach.plan.trained_names(approach)), copy.deepcopy(approach.state_dict())
    optimizer = build_optimizer(approach.optimizer_spec, approach.plan.parameter_groups(approach))
    for _ in range(3):
        approach.train()
        optimizer.zero_grad()
        approach.losses(batch)["loss"].backward()
        optimizer.step()
    moved = {name for name, tensor in approach.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trained
    shuffled = CaptionBatch(batch.images, CAPTIONS[::-1], batch.keys)
    approach.eval()
    assert torch.equal(approach.embed(batch)[0], approach.embed(shuffled)[0])


def test_gates_have_a_learning_rate_of_their_own_where_there_are_any():
    def rates(approach):
        return {group["name"]: group["lr"] for group in approach.plan.parameter_groups(approach)}

    assert rates(TokenReplayApproach(lr=0.1, gate_lr=0.7)) == {"adapter.*.g": 0.7, "adapter.*": 0.1, "head.*": 0.1}
    assert rates(TokenReplayApproach(lr=0.1, gate="zero_up")) == {"adapter.*": 0.1, "head.*": 0.1}


def test_a_reprogrammer_whose_tokens_nothing_replays_is_refused():
    for options in ({"source": "image"}, {"objective": ObjectiveSpec(reconstruction_weight=0.0)}):
        with pytest.raises(WlsupError, match="leave reprogrammer out"):
            TokenReplayApproach(reprogrammer=ReprogrammerSpec(), **options)


@pytest.mark.parametrize("source", ["both", "image"])
def test_without_reconstruction_what_reads_captions_does_not_train(source):
    approach = TokenReplayApproach(source=source, objective=ObjectiveSpec(reconstruction_weight=0.0))
    approach.setup("fit")
    approach.losses(batch_of_noise())["loss"].backward()
    names = approach.plan.trained_names(approach)
    reached = [name for name, parameter in approach.named_parameters() if parameter.grad is not None]
    assert sorted(reached) == sorted(names)


def test_it_is_called_ours():
    assert "ours" in TokenReplayApproach.summary
