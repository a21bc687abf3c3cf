"""What the guards promise: a bad batch ruins nothing and is told, and a healthy run does not change by a bit."""

import json
import logging
from collections import deque
from datetime import timedelta
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from wlsup.callbacks.guards import Guards, spike_limit
from wlsup.cli import main
from wlsup.errors import WlsupError


class Data(torch.utils.data.Dataset):
    """Numbers to be learned, some of them spoilt."""

    def __init__(self, spoilt=None, count=40):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 4, generator=generator)
        self.y = self.x.sum(1, keepdim=True)
        for index, value in (spoilt or {}).items():
            self.x[index] = value

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class Model(lightning.LightningModule):
    """A small network; AdamW with weight decay and momentum, so that any step moves every weight."""

    def __init__(self, trick=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.trick, self.history = trick, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        return self.trick(self, loss, batch_idx) if self.trick else loss

    def on_train_batch_end(self, *_):
        self.history.append(torch.cat([p.detach().flatten() for p in self.parameters()]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


class Unhook(Callback):
    """Nothing: what a run without guards has instead."""


def fit(model, guards, spoilt=None, count=40, others=(), **options):
    loader = torch.utils.data.DataLoader(Data(spoilt, count), batch_size=4, shuffle=False)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[guards, *others],
        **({"gradient_clip_val": 1.0} | options),
    )
    trainer.fit(model, loader)
    return trainer


def moved(model):
    """Which steps changed the weights."""
    pairs = zip(model.history, model.history[1:], strict=False)
    return [True, *(not torch.equal(before, after) for before, after in pairs)]


class TestNotFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_bad_batch_changes_nothing_and_the_run_goes_on(self, value, caplog):
        guards, model = Guards(), Model()
        with caplog.at_level(logging.WARNING, logger="wlsup"):
            trainer = fit(model, guards, spoilt={13: value})
        assert trainer.global_step == 10
        assert moved(model) == [index != 3 for index in range(10)]
        assert torch.isfinite(model.history[-1]).all()
        assert guards.results == {"skipped_steps": 1, "spikes": 0}
        assert "step 4: the loss is not finite; the step is skipped" in caplog.text

    def test_without_guards_it_is_ruined(self):
        model = Model()
        fit(model, Unhook(), spoilt={13: float("nan")})
        assert model.history[-1].isnan().all()

    def test_no_moment_of_the_optimizer_is_touched(self):
        states = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, *_):
                [optimizer] = trainer.optimizers
                states.append([s["exp_avg"].clone() for s in optimizer.state.values()])

        model, guards = Model(), Guards()
        fit(model, guards, {13: float("nan")}, others=[Watch()])
        assert all(torch.equal(a, b) for a, b in zip(states[2], states[3], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))

    def test_a_gradient_that_is_not_finite_where_the_loss_is(self, caplog):
        def trick(model, loss, index):
            return loss + (model.net[0].weight.sum() * 0).sqrt() if index == 5 else loss  # d sqrt at 0: inf * 0 = nan

        guards, model = Guards(), Model(trick)
        with caplog.at_level(logging.WARNING, logger="wlsup"):
            fit(model, guards)
        assert guards.skipped == 1
        assert moved(model) == [index != 5 for index in range(10)]
        assert "the gradient is not finite" in caplog.text

    def test_one_bad_batch_of_an_accumulated_step_skips_the_step(self):
        guards, model = Guards(), Model()
        trainer = fit(model, guards, spoilt={0: float("nan")}, accumulate_grad_batches=2)
        assert trainer.global_step == 5
        assert guards.skipped == 1
        assert not moved(model)[1]
        assert torch.isfinite(model.history[-1]).all()

    def test_too_many_in_a_row_end_the_run_with_one_message(self):
        guards = Guards(patience=3)
        with pytest.raises(WlsupError, match=r"3 steps in a row .* ends at step 7.*Lower the learning rate"):
            fit(Model(), guards, spoilt=dict.fromkeys(range(16, 40), float("nan")))
        guards = Guards(patience=3)
        fit(Model(), guards, spoilt=dict.fromkeys([*range(8), *range(12, 20), *range(24, 32)], float("nan")))
        assert guards.skipped == 6  # never three in a row


class FakeScaler:
    """A gradient scaler's scale."""

    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


class TestScaler:
    @pytest.mark.parametrize(
        ("loss", "scale", "expected"),
        [(1.0, 65536.0, (0, 1)), (float("nan"), 65536.0, (1, 0)), (1.0, 0.5, (1, 0))],
    )
    def test_its_own_skips_are_counted_apart(self, loss, scale, expected):
        from types import SimpleNamespace

        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.full((2,), float("inf"))
        optimizer = torch.optim.AdamW([parameter])
        trainer = SimpleNamespace(
            world_size=1, is_global_zero=True, loggers=[], global_step=0,
            precision_plugin=SimpleNamespace(scaler=FakeScaler(scale)),
        )  # fmt: skip
        guards = Guards()
        guards.on_before_backward(trainer, None, torch.tensor(loss))
        guards.on_before_optimizer_step(trainer, None, optimizer)
        assert (guards.skipped, guards.scaled) == expected
        assert parameter.grad is None

    def test_with_a_real_one_a_nan_is_counted_once(self):
        model, guards = Model(), Guards()
        plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**40))
        fit(model, guards, spoilt={93: float("nan")}, count=120, plugins=[plugin])
        assert guards.skipped == 1
        assert guards.scaled > 0  # a scale of 2^40 overflows half precision
        assert guards.results == {"skipped_steps": 1, "spikes": 0, "scaler_skips": guards.scaled}
        assert sum(not step for step in moved(model)[1:]) + 1 == guards.skipped + guards.scaled
        assert torch.isfinite(model.history[-1]).all()


class TestSpikes:
    def test_the_limit_is_median_plus_deviations(self):
        losses = [1.0, 2.0, 3.0, 4.0, 100.0]  # median 3, absolute deviations 2 1 0 1 97: median 1
        assert spike_limit(losses, 5.0) == pytest.approx(3.0 + 5.0 * 1.4826)
        assert spike_limit([2.0] * 10, 5.0) == pytest.approx(2.0 + 5.0 * 0.04)
        assert spike_limit(deque([1.0]), 0.0) == 1.0

    def test_a_spike_is_told_and_trained_on(self, caplog):
        def trick(model, loss, index):
            return loss * 1000 if index in (20, 25) else loss

        guards, model = Guards(window=8), Model(trick)
        with caplog.at_level(logging.WARNING, logger="wlsup"):
            fit(model, guards, count=120)
        assert guards.spikes == 2
        assert caplog.text.count("the loss spiked") == 2
        assert all(moved(model))

    def test_0_deviations_look_for_none(self):
        guards = Guards(deviations=0, window=8)
        fit(Model(lambda model, loss, index: loss * 1000 if index == 20 else loss), guards, count=120)
        assert guards.spikes == 0


def test_a_healthy_run_does_not_change_by_a_bit():
    for options in ({}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": None}):
        guarded, plain = Model(), Model()
        guards = Guards(window=4)
        fit(guarded, guards, **options)
        fit(plain, Unhook(), **options)
        assert torch.equal(torch.stack(guarded.history), torch.stack(plain.history))
        assert guards.skipped == 0


def test_a_resumed_run_counts_on():
    first = Guards(window=8)
    fit(Model(), first, spoilt={13: float("nan")}, count=80)
    again = Guards(window=8)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert again.state_dict() == first.state_dict()
    assert again.results["skipped_steps"] == 1
    fit(Model(), again, spoilt={13: float("nan")})
    assert again.results["skipped_steps"] == 2


def test_values_out_of_range_are_refused():
    for options in ({"patience": 0}, {"deviations": -1.0}, {"window": 1}):
        with pytest.raises(WlsupError, match="guards need patience >= 1"):
            Guards(**options)


def _rank(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=240)
    )
    from types import SimpleNamespace

    def reduce(decision, all):
        vote = torch.tensor(int(decision))
        torch.distributed.all_reduce(vote)
        return bool(vote == 2) if all else bool(vote)

    net = torch.nn.parallel.DistributedDataParallel(Model().net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    trainer = SimpleNamespace(
        world_size=2, is_global_zero=rank == 0, loggers=[], global_step=0, precision_plugin=SimpleNamespace(),
        strategy=SimpleNamespace(reduce_boolean_decision=reduce),
    )  # fmt: skip
    guards, changed = Guards(), []
    for step in range(4):
        before = torch.cat([p.detach().flatten() for p in net.parameters()])
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        if step == 1 and rank == 0:
            x[0] = float("nan")  # the averaged gradient is not finite, on both
        loss = net(x).square().mean()
        if step == 2 and rank == 1:
            loss = loss + torch.tensor(float("nan"))  # the gradients are finite, the loss of one rank is not
        optimizer.zero_grad()
        guards.on_before_backward(trainer, None, loss)
        loss.backward()
        guards.on_before_optimizer_step(trainer, None, optimizer)
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in net.parameters()])
        changed.append(not torch.equal(before, after))
    torch.save((changed, guards.skipped, after.tolist()), Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.multiprocess
def test_ranks_skip_together(in_processes, tmp_path):
    in_processes(_rank, 2, tmp_path, 240)
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert [one[:2] for one in found] == [([True, False, False, True], 2)] * 2
    assert found[0][2] == found[1][2]


def test_a_run_of_the_suite_says_it_in_results_json(tmp_path, monkeypatch):
    from wlsup.approaches.full import Full

    plain = Full.losses

    def spoilt(self, batch):
        parts = plain(self, batch)
        spoilt.calls += 1
        return {**parts, "loss": parts["loss"] * float("nan")} if spoilt.calls == 2 else parts

    spoilt.calls = 0
    monkeypatch.setattr(Full, "losses", spoilt)
    folder = tmp_path / "run"
    assert main([
        "fit", "-c", "experiments/base.yaml", "-c", "experiments/full.yaml", "--data.pairs", "64", "--data.batch_size",
        "16", "--data.validation_pairs", "0", "--data.eval_sets", "[]", "--trainer.max_epochs", "1",
        "--run_dir", str(folder),
    ]) == 0  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    assert results["guards"] == {"skipped_steps": 1, "spikes": 0}
    assert results["steps"] == 4
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert "the step is skipped" in (folder / "run.log").read_text()
