"""lightning-bolts' schedule and LARS against ours. Needs the extra `bolts`, in an environment of its own."""

import warnings

import pytest
import torch

from wlsup.optim import OptimizerSpec, build_optimizer, build_schedule

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pl_bolts.optimizers import LARS, LinearWarmupCosineAnnealingLR
except (ImportError, AttributeError) as error:
    pytest.skip(
        f"lightning-bolts cannot be imported here ({error}); `make test-bolts` makes it an environment of its own",
        allow_module_level=True,
    )

pytestmark = [
    pytest.mark.bolts,
    pytest.mark.filterwarnings("ignore::Warning"),  # "under review", of each of bolts' own classes
]

SHAPES = [(100, 10), (101, 0), (7, 1), (50, 48), (3, 1), (1000, 100)]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5, 4, generator=generator)) for _ in range(2)]


def our_rates(total, warmup, base, **options):
    spec = OptimizerSpec(name="sgd", warmup_steps=warmup, **options)
    optimizer = build_optimizer(spec, [{"params": parameters(), "lr": base, "weight_decay": 0.0, "name": "all"}])
    schedule = build_schedule(spec, optimizer, total)
    return collect(optimizer, schedule, total)


def collect(optimizer, schedule, total):
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return torch.tensor(rates, dtype=torch.float64)


@pytest.mark.parametrize("library", ["timm", "torch", "bolts"])
@pytest.mark.parametrize(("total", "warmup"), SHAPES)
@pytest.mark.parametrize(("start", "least"), [(0.0, 0.0), (0.1, 0.02)])
def test_our_schedule_is_bolts_to_its_last_step(library, total, warmup, start, least):
    # warmup_epochs = warmup_steps, max_epochs = total_steps - 1 (the last step taken is at eta_min), and bolts'
    # absolute warmup_start_lr and eta_min are our ratios times the base rate. Without warm-up bolts' first step is at
    # warmup_start_lr all the same; ours is at the base rate.
    base = 0.3
    optimizer = torch.optim.SGD(parameters(), lr=base)
    theirs = LinearWarmupCosineAnnealingLR(
        optimizer,
        warmup_epochs=warmup,
        max_epochs=total - 1,
        warmup_start_lr=base * start if warmup else base,
        eta_min=base * least,
    )
    expected = collect(optimizer, theirs, total)
    options = {"scheduler_library": library, "warmup_start_ratio": start, "min_lr_ratio": least}
    torch.testing.assert_close(our_rates(total, warmup, base, **options), expected, rtol=1e-9, atol=1e-12)


def test_bolts_cosine_is_the_schedule_computed_by_bolts():
    a = our_rates(60, 6, 0.1, schedule="bolts_cosine")
    b = our_rates(60, 6, 0.1, scheduler_library="bolts")
    assert torch.equal(a, b)


def test_bolts_climbs_again_past_its_end_and_ours_by_bolts_does_not():
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    theirs = collect(optimizer, LinearWarmupCosineAnnealingLR(optimizer, warmup_epochs=2, max_epochs=19), 40)
    assert theirs[19] == 0
    assert theirs[36] > 0.9
    spec = OptimizerSpec(name="sgd", scheduler_library="bolts", warmup_steps=2)
    optimizer = build_optimizer(spec, [{"params": parameters(), "lr": 1.0, "weight_decay": 0.0, "name": "all"}])
    ours = collect(optimizer, build_schedule(spec, optimizer, 20), 40)
    torch.testing.assert_close(ours[:20], theirs[:20], rtol=1e-9, atol=1e-12)
    assert (ours[20:] == 0).all()


def test_groups_keep_their_ratio_under_bolts():
    spec = OptimizerSpec(
        name="sgd", scheduler_library="bolts", warmup_steps=3, warmup_start_ratio=0.5, min_lr_ratio=0.1
    )
    a, b = parameters()
    groups = [{"params": [a], "lr": 1.0, "weight_decay": 0.0}, {"params": [b], "lr": 0.01, "weight_decay": 0.0}]
    optimizer = build_optimizer(spec, groups)
    schedule = build_schedule(spec, optimizer, 12)
    for _ in range(12):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(0.01 * first, rel=1e-12)
        optimizer.step()
        schedule.step()
    assert first == pytest.approx(0.1)


def test_a_resumed_schedule_by_bolts_goes_on_where_it_was():
    spec = OptimizerSpec(name="sgd", scheduler_library="bolts", warmup_steps=3)

    def begin():
        optimizer = build_optimizer(spec, [{"params": parameters(), "lr": 1.0, "weight_decay": 0.0, "name": "all"}])
        return optimizer, build_schedule(spec, optimizer, 30)

    whole = collect(*begin(), 30)
    first = begin()
    head = collect(*first, 11)
    second = begin()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    assert torch.equal(torch.cat([head, collect(*second, 19)]), whole)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_two_lars_take_the_same_steps(weight_decay, momentum):
    def walk(optimizer, mine):
        for step in range(5):
            for i, p in enumerate(mine):
                p.grad = torch.sin(3 * p.detach() + i + step)
            optimizer.step()
        return torch.stack([p.detach() for p in mine])

    def ours(name):
        mine = parameters()
        spec = OptimizerSpec(name=name, momentum=momentum, trust_coefficient=0.02)
        return walk(
            build_optimizer(spec, [{"params": mine, "lr": 0.3, "weight_decay": weight_decay, "name": "a"}]), mine
        )

    mine = parameters()
    direct = walk(
        LARS(mine, lr=0.3, momentum=momentum, weight_decay=weight_decay, trust_coefficient=0.02, eps=1e-8), mine
    )
    assert torch.equal(ours("bolts_lars"), direct)
    torch.testing.assert_close(ours("lars"), direct, rtol=1e-6, atol=1e-7)


def test_the_two_lars_differ_where_a_gradient_is_zero_as_documented():
    moved = {}
    for name in ("lars", "bolts_lars"):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = build_optimizer(
            OptimizerSpec(name=name, momentum=0.0), [{"params": [p], "lr": 0.5, "weight_decay": 0.1, "name": "a"}]
        )
        p.grad = torch.zeros(3)
        optimizer.step()
        moved[name] = p.detach()
    assert torch.equal(moved["bolts_lars"], torch.ones(3))
    torch.testing.assert_close(moved["lars"], torch.full((3,), 1 - 0.5 * 0.1))
