"""Every approach that trains its encoder has a curve: exact at both ends, from the run's own start."""

import copy

import pytest
import torch

from wlsup.approaches import APPROACHES, approach_class
from wlsup.callbacks.wise_ft import refuse_no_line
from wlsup.errors import WlsupError
from wlsup.evaluation.wise_ft import interpolate
from wlsup.evaluation.wise_ft_curve import load_tensors


def built(name, seed=0, **options):
    torch.manual_seed(seed)
    return approach_class(name)(**options).eval()


def begun(name, **options):
    """Return an approach before step 1, its start remembered as a run remembers it."""
    approach = built(name, **options)
    if approach.untouched:
        with pytest.raises(WlsupError, match="there is no curve"):
            refuse_no_line(approach)
        pytest.skip(f"{name} leaves the encoder as it is")
    approach.start.keep = True
    approach.setup("fit")
    return approach.eval()


@torch.no_grad()
def moved(approach):
    """Move what trains, as training would, and what counts along with it; return the end."""
    generator = torch.Generator().manual_seed(1)
    state = approach.state_dict(keep_vars=True)
    for name in approach.start.tensors:
        tensor = state[name].data
        if tensor.is_floating_point():
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    return {name: state[name].detach().clone() for name in approach.start.tensors}


def load(approach, end, alpha):
    load_tensors(approach, interpolate(approach.start.tensors, end, alpha, approach.start.held))


@pytest.mark.parametrize("name", sorted(APPROACHES))
def test_the_curve_is_exact_at_its_ends_and_a_line_between_them(name):
    approach, images = begun(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        first, start = approach.features(images), copy.deepcopy(approach.state_dict())
        end = moved(approach)
        last, final = approach.features(images), copy.deepcopy(approach.state_dict())
        assert not torch.equal(first, last)
        load(approach, end, 0.5)
        between = approach.features(images)
        assert not torch.equal(between, first)
        assert not torch.equal(between, last)
        held = {name for name in end if name.startswith("lora.") and ".A." in name}
        for key in end.keys() - held:
            if end[key].is_floating_point():
                middle = (start[key].double() + final[key].double()) / 2
                assert torch.allclose(approach.state_dict()[key].double(), middle, atol=1e-6), key
        load(approach, end, 0)
        assert torch.equal(approach.features(images), first)
        assert all(torch.equal(t, start[key]) for key, t in approach.state_dict().items() if t.is_floating_point())
        load(approach, end, 1)
        assert torch.equal(approach.features(images), last)
        assert all(torch.equal(tensor, final[key]) for key, tensor in approach.state_dict().items())


@pytest.mark.parametrize("name", ["film", "lora", "full"])
def test_the_start_is_known_again_and_another_one_is_refused(name):
    approach = begun(name)
    moved(approach)
    checkpoint = {"state_dict": dict(approach.state_dict())}
    approach.on_save_checkpoint(checkpoint)
    again = built(name)
    again.on_load_checkpoint(checkpoint)
    again.start.remember(again)
    assert again.start.check(again)
    assert all(torch.equal(again.start.tensors[key], tensor) for key, tensor in approach.start.tensors.items())
    other = built(name, seed=1)
    other.on_load_checkpoint(checkpoint)
    other.start.remember(other)
    with pytest.raises(WlsupError, match="is not the one that this run was trained from"):
        other.start.check(other)
    del checkpoint["wlsup"]["start_sha256"]  # of an older version: nobody knows
    again.on_load_checkpoint(checkpoint)
    assert not again.start.check(again)


def test_setting_up_again_after_training_does_not_move_the_start():
    approach = begun("film")
    start = approach.start.sha256
    moved(approach)
    approach.setup("fit")
    assert approach.start.sha256 == start
    assert approach.start.check(approach)


def test_a_low_rank_update_is_blended_and_not_its_factors():
    approach = begun("lora")
    base = approach.pretrained().backbone.state_dict()
    end = moved(approach)
    with torch.no_grad():
        for name in end:  # as trained: B leaves zero
            if ".B." in name:
                end[name].normal_()
    load(approach, end, 1)
    whole = approach.merged().backbone.state_dict()
    load(approach, end, 0.25)
    part = approach.merged().backbone.state_dict()
    changed = [name for name in base if not torch.equal(base[name], whole[name])]
    assert changed
    for name in changed:
        assert torch.allclose(part[name], 0.75 * base[name] + 0.25 * whole[name], atol=1e-6)
