"""What every approach has from its base: what no loss reaches, and losses of held-out pairs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from wlsup.approaches import approach_class
from wlsup.batch import CaptionBatch
from wlsup.callbacks.guards import Guards
from wlsup.errors import WlsupError
from wlsup.objectives.two_branch import ObjectiveSpec


@pytest.mark.parametrize(("name", "weight", "frozen"), [
    ("film", "reconstruction_weight", "mae.decoder."), ("film", "contrastive_weight", "head."),
    ("mae_cl", "reconstruction_weight", "mae.decoder."), ("mae_cl", "contrastive_weight", "head."),
])  # fmt: skip
def test_what_no_loss_reaches_does_not_train(name, weight, frozen):
    approach = approach_class(name)(objective=ObjectiveSpec(**{weight: 0.0}))
    approach.setup("fit")
    names = approach.plan.trained_names(approach)
    assert names and not any(one.startswith(frozen) for one in names)


def test_a_null_condition_that_nothing_trains_is_refused():
    with pytest.raises(WlsupError, match="the null condition"):
        ObjectiveSpec(contrastive_weight=0.0, caption_dropout=0.0)


@pytest.mark.parametrize("strategy", ["one", "ddp", "ddp_find_unused_parameters_true"])
def test_a_tensor_that_no_loss_reached_is_told_before_processes_wait_for_it(strategy, monkeypatch, caplog):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    approach = approach_class("full")()
    approach.setup("fit")
    found = {"one": None, "ddp": DDPStrategy(), "ddp_find_unused_parameters_true":
             DDPStrategy(find_unused_parameters=True)}[strategy]  # fmt: skip
    guards, trainer = Guards(), SimpleNamespace(strategy=found)
    if strategy == "ddp":
        with pytest.raises(WlsupError, match=r"No loss reached .* ddp_find_unused_parameters_true"):
            guards.on_after_backward(trainer, approach)
    else:
        guards.on_after_backward(trainer, approach)
        assert "No loss reached" in caplog.text
        guards.on_after_backward(trainer, approach)  # once


def validate(rank, world, folder):
    """The held-out pairs are the same on each of two processes: so are their losses, as on one."""
    torch.manual_seed(0)
    approach = approach_class("mae_cl")(objective=ObjectiveSpec(reconstruction_weight=0.0)).eval()
    batch = CaptionBatch(torch.randn(4, 3, 64, 64), ["red", "blue", "a star", "a ring"], ["a", "b", "c", "d"])
    logged = []
    approach.log_dict = lambda values, **options: logged.append({name: float(v) for name, v in values.items()})
    with torch.no_grad():
        approach.validation_step(batch, 0)
        torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
        approach.validation_step(batch, 0)
    assert logged[0] == pytest.approx(logged[1], abs=1e-6)
    (Path(folder) / f"{rank}.done").touch()


@pytest.mark.multiprocess
def test_held_out_losses_do_not_depend_on_the_number_of_processes(tmp_path, in_processes):
    in_processes(validate, 2, tmp_path, 120)
    assert len(list(tmp_path.glob("*.done"))) == 2
