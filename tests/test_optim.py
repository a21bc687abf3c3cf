import copy
import math
import sys

import pytest
import torch

from wlsup.errors import WlsupError
from wlsup.optim import OptimizerSpec, build_optimizer, build_schedule

LIBRARIES = ("timm", "torch")


def groups(lrs=(1e-3, 5e-2)):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "params": [torch.nn.Parameter(torch.randn(4, 3, generator=generator))],
            "lr": lr,
            "weight_decay": 0.1 * i,
            "name": f"group {i}",
        }
        for i, lr in enumerate(lrs)
    ]


def rates(spec, total, beyond=0, lrs=(1e-3, 5e-2)):
    """(total + beyond) rows of the groups' learning rates, one an optimizer step."""
    optimizer = build_optimizer(spec, groups(lrs))
    schedule = build_schedule(spec, optimizer, total)
    rows = []
    for _ in range(total + beyond):
        rows.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rows


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (101, 0), (7, 1), (50, 48), (2, 0), (3, 1)])
@pytest.mark.parametrize("least", [0.0, 0.013])
def test_rises_to_exactly_the_base_rate_then_falls_to_exactly_the_least(library, shape, total, warmup, least):
    spec = OptimizerSpec(schedule=shape, scheduler_library=library, warmup_steps=warmup, min_lr_ratio=least)
    lrs = (1e-3, 5e-2)
    rows = rates(spec, total, lrs=lrs)
    assert rows[warmup] == list(lrs)
    assert rows[-1] == (list(lrs) if shape == "constant" else [lr * least for lr in lrs])
    for column, base in zip(zip(*rows, strict=True), lrs, strict=True):
        assert all(a <= b for a, b in zip(column[:warmup], column[1 : warmup + 1], strict=True))
        assert all(a >= b for a, b in zip(column[warmup:], column[warmup + 1 :], strict=False))
        assert max(column) == base
        assert warmup == 0 or column[0] == 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_known_values(library):
    # 4 warm-up steps of 13: 0, 1/3, 2/3, 1, then 1, then 8 steps down; half way at 8.
    row = [r[0] for r in rates(OptimizerSpec(scheduler_library=library, warmup_steps=4), 13, lrs=(1.0,))]
    assert row[:5] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert row[6] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert row[8] == pytest.approx(0.5)
    assert row[12] == 0
    spec = OptimizerSpec(
        scheduler_library=library, schedule="linear", warmup_steps=4, warmup_start_ratio=0.25, min_lr_ratio=0.2
    )
    row = [r[0] for r in rates(spec, 13, lrs=(2.0,))]
    assert row == pytest.approx([0.5, 1.0, 1.5, 2.0, *(2 - 0.2 * i for i in range(9))])


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(200, 20), (30, 1), (30, 0), (30, 28)])
def test_the_libraries_give_the_same_numbers(shape, total, warmup):
    specs = [
        OptimizerSpec(
            schedule=shape, scheduler_library=x, warmup_steps=warmup, warmup_start_ratio=0.1, min_lr_ratio=0.05
        )
        for x in LIBRARIES
    ]
    first, second = (torch.tensor(rates(spec, total), dtype=torch.float64) for spec in specs)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_nothing_climbs_again_past_the_end(library, shape):
    rows = rates(OptimizerSpec(schedule=shape, scheduler_library=library, min_lr_ratio=0.1), 20, beyond=60)
    assert all(row == rows[19] for row in rows[20:])


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_run_of_one_step_takes_it_at_the_base_rate(library):
    assert rates(OptimizerSpec(scheduler_library=library), 1) == [[1e-3, 5e-2]]


def test_warmup_is_a_share_of_the_run_or_a_number_of_steps():
    assert OptimizerSpec(warmup_fraction=0.1).warmup(400) == 40
    assert OptimizerSpec(warmup_fraction=0.9).warmup(3) == 1
    assert OptimizerSpec(warmup_fraction=0.5).warmup(1) == 0
    assert OptimizerSpec(warmup_steps=7, warmup_fraction=0.1).warmup(400) == 7
    with pytest.raises(WlsupError, match="the run has 10 steps, which leave room for at most 8"):
        OptimizerSpec(warmup_steps=9).warmup(10)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(tmp_path, library, name):
    spec = OptimizerSpec(name=name, scheduler_library=library, warmup_steps=5, min_lr_ratio=0.1)

    def begin():
        mine = groups()
        optimizer = build_optimizer(spec, mine)
        return [g["params"][0] for g in mine], optimizer, build_schedule(spec, optimizer, 30)

    def go_on(parameters, optimizer, schedule, steps):
        for step in steps:
            for i, p in enumerate(parameters):
                p.grad = torch.sin(p.detach() * (step + i + 1))
            optimizer.step()
            schedule.step()

    whole = begin()
    go_on(*whole, range(30))
    first = begin()
    go_on(*first, range(13))
    saved = {"p": [p.detach() for p in first[0]], "o": first[1].state_dict(), "s": first[2].state_dict()}
    torch.save(saved, tmp_path / "run.pt")
    loaded = torch.load(tmp_path / "run.pt", weights_only=True)
    second = begin()
    for p, value in zip(second[0], loaded["p"], strict=True):
        p.data.copy_(value)
    second[1].load_state_dict(loaded["o"])
    second[2].load_state_dict(loaded["s"])
    go_on(*second, range(13, 30))
    for a, b in zip(whole[0], second[0], strict=True):
        assert torch.equal(a, b)
    assert [g["lr"] for g in whole[1].param_groups] == [g["lr"] for g in second[1].param_groups]


def test_adamw_is_built_over_the_plans_groups():
    optimizer = build_optimizer(OptimizerSpec(betas=(0.8, 0.9), eps=1e-6), groups())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("group 0", 1e-3, 0.0),
        ("group 1", 5e-2, 0.1),
    ]
    assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-6 for g in optimizer.param_groups)


def test_lars_takes_the_papers_step():
    mine = groups()
    before = [copy.deepcopy(g["params"][0].detach()) for g in mine]
    optimizer = build_optimizer(OptimizerSpec(name="lars", momentum=0.9, trust_coefficient=0.002), mine)
    gradients = [torch.full((4, 3), 0.5), torch.linspace(-1, 1, 12).view(4, 3)]
    for group, gradient in zip(mine, gradients, strict=True):
        group["params"][0].grad = gradient.clone()
    optimizer.step()
    # Without weight decay a plain step of SGD, with it scaled by trust |w| / (|g| + decay |w|).
    torch.testing.assert_close(mine[0]["params"][0].detach(), before[0] - 1e-3 * gradients[0])
    w, g = before[1], gradients[1]
    ratio = 0.002 * w.norm() / (g.norm() + 0.1 * w.norm())
    torch.testing.assert_close(mine[1]["params"][0].detach(), w - 5e-2 * ratio * (g + 0.1 * w))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "adam"}, "Unknown optimizer 'adam'. Did you mean 'adamw'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"scheduler_library": "jax"}, "Valid: timm, torch, bolts"),
        ({"scheduler_library": "bolts", "schedule": "linear"}, "cosine schedule only, not 'linear'"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), not 1.0"),
        ({"momentum": -0.1}, "momentum"),
        ({"trust_coefficient": 0.0}, "trust_coefficient"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_fraction": 1.0}, "warmup_fraction"),
        ({"warmup_start_ratio": 1.5}, "warmup_start_ratio"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_wrong_values_are_told(options, says):
    with pytest.raises(WlsupError, match=says):
        OptimizerSpec(**options)


def test_nothing_to_train_and_no_steps_are_told():
    with pytest.raises(WlsupError, match="trains no parameter"):
        build_optimizer(OptimizerSpec(), [])
    optimizer = build_optimizer(OptimizerSpec(), groups())
    with pytest.raises(WlsupError, match="at least one step; the run has 0"):
        build_schedule(OptimizerSpec(), optimizer, 0)


@pytest.mark.parametrize(
    "options", [{"name": "bolts_lars"}, {"schedule": "bolts_cosine"}, {"scheduler_library": "bolts"}]
)
def test_without_lightning_bolts_the_error_says_how_to_get_it(monkeypatch, options):
    monkeypatch.setitem(sys.modules, "pl_bolts", None)  # makes the import fail, whether it is installed or not
    spec = OptimizerSpec(**options)
    with pytest.raises(WlsupError, match=r"\.\[bolts\].*constraints-bolts\.txt"):
        build_schedule(spec, build_optimizer(spec, groups()), 10)
