import pytest
import torch

from wlsup.moe import MLPExpert, MoE, MoESpec
from wlsup.moe.soft import SoftRouter

B, L, D, E, S = 2, 9, 12, 4, 3
SPEC = MoESpec(experts=E, router="soft", slots=S, jitter=0)


def real(lengths=(L, 5)):
    return torch.arange(L) < torch.tensor(lengths)[:, None]


def test_slots_are_means_of_tokens_and_tokens_are_means_of_slots():
    filling, reading, _ = SoftRouter(D, SPEC)(torch.randn(B, L, D), real())
    assert filling.shape == reading.shape == (B, L, E * S)
    torch.testing.assert_close(filling.sum(1), torch.ones(B, E * S))
    torch.testing.assert_close(reading.sum(2), real().float())
    assert not filling[~real()].any()


def test_only_directions_count():
    router, x = SoftRouter(D, SPEC), torch.randn(B, L, D)
    before = router(x, real())[2]
    router.weight.data *= 100
    torch.testing.assert_close(router(10 * x, real())[2], before)
    assert before.abs().max() <= 1


def test_the_layer_is_the_papers_formula():
    torch.manual_seed(0)
    moe = MoE([MLPExpert(D, 8) for _ in range(E)], D, SPEC)
    x = torch.randn(B, L, D)
    logits = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(moe.router.weight, dim=-1).T
    slots = logits.softmax(1).transpose(1, 2) @ x
    done = torch.cat([moe.experts[e](slots[:, e * S : (e + 1) * S]) for e in range(E)], dim=1)
    torch.testing.assert_close(moe(x), logits.softmax(2) @ done)
    assert moe.auxiliary_losses() == {}
    assert moe.routing.load.sum() == pytest.approx(1)


@pytest.mark.parametrize("path", ["sort", "grouped", "batched", "loop"])
def test_paths_agree(path):
    x, outputs = torch.randn(B, L, D), []
    for each in (path, "loop"):
        torch.manual_seed(0)
        spec = MoESpec(experts=E, router="soft", slots=S, jitter=0, dispatch=each)
        moe = MoE([MLPExpert(D, 8) for _ in range(E)], D, spec)
        moe(x, mask=real()).sum().backward()
        outputs.append([moe(x, mask=real()), *(p.grad for p in moe.parameters())])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_sample_of_padding_only_gives_zeros():
    moe = MoE([MLPExpert(D, 8) for _ in range(E)], D, SPEC)
    output = moe(torch.randn(B, L, D), mask=real((L, 0)))
    output.sum().backward()
    assert not output[1].any()
    assert all(p.grad.isfinite().all() for p in moe.parameters())


def test_the_router_computes_in_float32_under_autocast():
    router = SoftRouter(D, SPEC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(part.dtype == torch.float32 for part in router(torch.randn(B, L, D).bfloat16(), real()))
    coarse = SoftRouter(D, MoESpec(experts=E, router="soft", slots=S, router_dtype="model"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert coarse(torch.randn(B, L, D).bfloat16(), real())[2].dtype == torch.bfloat16
