"""selective_k: k = 0 is frozen, k = all is full, the choice is remembered, and the same on every rank."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from wlsup.approaches import approach_class
from wlsup.batch import CaptionBatch
from wlsup.errors import WlsupError
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.objectives.two_branch import ObjectiveSpec

SelectiveK, Full = approach_class("selective_k"), approach_class("full")
PREFIX = "mae.encoder.backbone."


def batches(count=2):
    generator = torch.Generator().manual_seed(0)
    captions = ["a red square", "a blue star", "two rings", "a green circle"]
    return [
        CaptionBatch(torch.randn(4, 3, 64, 64, generator=generator), captions, [f"{n}/{i}" for i in range(4)])
        for n in range(count)
    ]


def trained(approach):
    return set(approach.plan.trained_names(approach))


def rates(approach):
    """Learning rate and weight decay of what trains, by name."""
    resolved = [one for one in approach.plan.resolve(approach) if one.rule.trains]
    return {one.name: (one.rule.lr, one.rule.weight_decay) for one in resolved}


def test_k_0_trains_the_heads_alone_and_k_all_what_full_trains():
    assert {name.split(".")[0] for name in trained(SelectiveK(k=0))} == {"head"}
    every = len(SelectiveK().groups)
    assert rates(SelectiveK(k=every)) == rates(Full())
    both = ObjectiveSpec()
    assert rates(SelectiveK(k=every, objective=both)) == rates(Full(objective=both))


def test_trained_is_the_sum_over_the_chosen_groups_at_every_granularity():
    for granularity, k in (("block", 2), ("sublayer", 3), ("tensor", 5)):
        approach = SelectiveK(k=k, granularity=granularity, criterion="random")
        inside = {name.removeprefix(PREFIX) for name in trained(approach) if name.startswith(PREFIX)}
        chosen = [group for group in approach.groups if group.name in approach.chosen]
        assert len(chosen) == k
        assert inside == {name for group in chosen for name in group.names}


@pytest.mark.parametrize("criterion", ["rgn", "fisher"])
def test_gradient_criteria_choose_from_batches_and_leave_the_model_as_it_was(criterion):
    approach = SelectiveK(k=2, criterion=criterion)
    with pytest.raises(WlsupError, match="first batches"):
        _ = approach.plan
    with pytest.raises(WlsupError, match="select"):
        approach.setup("fit")
    before = {name: tensor.clone() for name, tensor in approach.state_dict().items()}
    state = torch.get_rng_state()
    approach.select(batches())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in approach.state_dict().items())
    assert all(parameter.grad is None for parameter in approach.parameters())
    again = SelectiveK(k=2, criterion=criterion)
    again.head.load_state_dict(approach.head.state_dict())
    assert again.select(batches()) == approach.chosen
    assert len(approach.chosen) == 2


def test_gradients_are_scored_on_the_view_that_training_sees():
    masked = ObjectiveSpec(reconstruction_weight=0.0, contrastive_view="masked")
    approach, lengths = SelectiveK(k=2, criterion="rgn", objective=masked), []
    approach.encoder.blocks[0].register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    approach.select(batches(1))
    assert not approach.head.training
    approach.setup("fit")
    approach.losses(batches(1)[0])
    assert lengths == [1 + 16, 1 + 16]


def test_k_0_leaves_the_encoder_untouched_and_takes_cached_features():
    approach = SelectiveK(k=0)
    assert (approach.untouched, approach.cacheable) == (True, "pooled")
    assert not SelectiveK(k=1).untouched
    approach.setup("fit")
    [batch] = batches(1)
    cached = replace(batch, images=torch.empty(4, 0), encoded=approach.encoder(batch.images))
    parts, same = approach.losses(batch), approach.losses(cached)
    assert parts.keys() == same.keys()
    assert all(torch.allclose(parts[name], same[name]) for name in parts)
    for ours, theirs in zip(approach.embed(batch), approach.embed(cached), strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "rgn"},
        {"objective": ObjectiveSpec()},
        {"objective": ObjectiveSpec(reconstruction_weight=0.0, contrastive_view="masked")},
    ],
    ids=str,
)
def test_k_0_caches_nothing_where_the_pictures_are_asked_for(options):
    approach = SelectiveK(k=0, **options)
    assert (approach.untouched, approach.cacheable) == (True, "")


def test_explicit_names_are_taken_and_wrong_ones_refused():
    approach = SelectiveK(k=None, criterion="explicit", groups=["norm", "embed"])
    assert approach.chosen == ("embed", "norm")
    for wrong in (
        {"criterion": "explicit", "groups": ["block.0"]},
        {"criterion": "last", "groups": ["norm"]},
        {"k": 99},
        {"criterion": "newest"},
        {"batches": 0},
    ):
        with pytest.raises(WlsupError):
            SelectiveK(**wrong)


def test_the_choice_is_in_the_checkpoint_and_comes_back_without_batches():
    approach = SelectiveK(k=2, criterion="fisher")
    approach.select(batches())
    checkpoint = {"state_dict": dict(approach.state_dict())}
    approach.on_save_checkpoint(checkpoint)
    fresh = SelectiveK(k=2, criterion="fisher")
    fresh.on_load_checkpoint(checkpoint)
    assert (fresh.chosen, fresh.scores) == (approach.chosen, approach.scores)
    assert trained(fresh) == trained(approach)
    with pytest.raises(WlsupError, match="k = 3"):
        SelectiveK(k=3, criterion="fisher").on_load_checkpoint(checkpoint)


def test_another_choice_of_the_checkpoint_is_what_l2sp_holds():
    approach = SelectiveK(k=2, criterion="explicit", groups=["norm", "blocks.5"], regularizer=RegularizerSpec(l2sp=0.1))
    approach.setup("fit")
    assert set(approach.regularizer._held) == {n for n in trained(approach) if n.startswith("mae.encoder")}
    approach.criterion = "fisher"  # as if chosen by batches, and otherwise than in the run that is resumed
    checkpoint = {"state_dict": dict(approach.state_dict())}
    approach.on_save_checkpoint(checkpoint)
    checkpoint["wlsup"]["selection"]["chosen"] = ["norm", "blocks.0"]
    checkpoint["state_dict"] = {}
    with pytest.raises(WlsupError, match="tensors differ"):  # of this made-up checkpoint, after the choice
        approach.on_load_checkpoint(checkpoint)
    held = set(approach.regularizer._held)
    assert any("blocks.0." in name for name in held) and not any("blocks.5." in name for name in held)


def test_the_scores_are_reported():
    task = SelectiveK(k=2, criterion="last").measure(None)
    assert [row["what"] for row in task["rows"]][-1] == "norm (trained)"


def _rank(rank, world, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=240)
    )
    torch.manual_seed(0)
    approach = SelectiveK(k=2, criterion="rgn")
    approach.select(batches(2)[rank : rank + 1])  # each rank its own share
    torch.save((approach.chosen, approach.scores), Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.multiprocess
def test_every_rank_chooses_the_same(in_processes, tmp_path):
    in_processes(_rank, 2, tmp_path, 240, alike=False)  # the order of a set is each process's own
    (one, scores), (other, same) = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert one == other
    assert scores == same
