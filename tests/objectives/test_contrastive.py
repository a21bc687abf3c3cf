import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from wlsup.errors import WlsupError
from wlsup.objectives import contrastive, contrastive_tiles
from wlsup.objectives.contrastive import (
    CLIP_LOGIT_SCALE,
    LOGIT_SCALE_MAX,
    SIGLIP_LOGIT_BIAS,
    SIGLIP_LOGIT_SCALE,
    clamp_logit_scale_,
    info_nce,
    siglip,
)

LOSSES = ("info_nce", "siglip")


def dense_info_nce(image, text, logit_scale, negatives=None):
    """CLIP's figure 3, with autograd; ``negatives`` (B, B) bool says which logits take part."""
    logits = logit_scale.exp() * image @ text.t()
    if negatives is not None:
        logits = logits.masked_fill(~negatives, -math.inf)
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def dense_siglip(image, text, logit_scale, logit_bias, negatives=None):
    """SigLIP's algorithm 1, with autograd."""
    logits = logit_scale.exp() * image @ text.t() + logit_bias
    terms = F.logsigmoid((2 * torch.eye(len(image), dtype=image.dtype) - 1) * logits)
    return -(terms if negatives is None else terms[negatives]).sum() / len(image)


def make(B, D=16, loss="info_nce", seed=0, dtype=torch.float32, scale=None):
    """Leaves (image, text, logit_scale[, logit_bias]) at the loss's initial scale."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(B, D, generator=generator, dtype=torch.float64)
    text = 0.5 * image + torch.randn(B, D, generator=generator, dtype=torch.float64)
    start = (CLIP_LOGIT_SCALE,) if loss == "info_nce" else (SIGLIP_LOGIT_SCALE, SIGLIP_LOGIT_BIAS)
    start = start if scale is None else (scale, *start[1:])
    values = [
        F.normalize(image, dim=1),
        F.normalize(text, dim=1),
        *(torch.tensor(v, dtype=torch.float64) for v in start),
    ]
    return [v.to(dtype).requires_grad_() for v in values]


def run(loss, leaves, **options):
    """(loss, gradients) of the tiled loss."""
    value = (info_nce if loss == "info_nce" else siglip)(*leaves, **options)
    return value, torch.autograd.grad(value, leaves)


def reference(loss, leaves, negatives=None):
    """(loss, gradients) in fp64 by autograd over the dense logits, at exactly the values of ``leaves``."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    value = (dense_info_nce if loss == "info_nce" else dense_siglip)(*exact, negatives=negatives)
    return value, torch.autograd.grad(value, exact)


def error(got, expected):
    """Largest difference, relative to the largest entry."""
    got, expected = got.detach().double(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tile_that_is_not_given_goes_by_the_device(loss, monkeypatch):
    asked = []
    monkeypatch.setattr(
        contrastive, "Strip", lambda **facts: asked.append(facts["tile"]) or contrastive_tiles.Strip(**facts)
    )
    assert contrastive._TILES == {"cpu": 512, "cuda": 4096}
    leaves = make(20, loss=loss)
    run(loss, leaves)
    monkeypatch.setitem(contrastive._TILES, "cpu", 7)
    value, _ = run(loss, leaves)
    assert asked == [512, 7]
    assert torch.allclose(value, run(loss, leaves, tile=20)[0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("B", "tile"), [(64, 16), (64, 64), (64, 512), (61, 16), (61, 7), (61, 60), (9, 1), (2, 3)])
def test_loss_and_gradients_are_fp64s_for_any_tile(loss, B, tile):
    leaves = make(B, loss=loss)
    value, gradients = run(loss, leaves, tile=tile)
    expected, expected_gradients = reference(loss, leaves)
    assert error(value, expected) <= 1e-6
    for got, exact in zip(gradients, expected_gradients, strict=True):
        assert got.dtype == torch.float32
        assert error(got, exact) <= 2e-6


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [0.0, LOGIT_SCALE_MAX])
def test_gradients_hold_over_the_whole_range_of_the_scale(loss, scale):
    leaves = make(96, D=64, loss=loss, scale=scale)
    value, gradients = run(loss, leaves, tile=32)
    expected, expected_gradients = reference(loss, leaves)
    assert error(value, expected) <= 1e-5
    assert max(error(g, e) for g, e in zip(gradients, expected_gradients, strict=True)) <= 1e-5


@pytest.mark.parametrize("sign", [-1, 1])
def test_equal_and_opposed_embeddings_at_the_largest_scale_neither_overflow_nor_underflow(sign):
    leaves = make(32, scale=LOGIT_SCALE_MAX)
    leaves[1] = (sign * leaves[0]).detach().requires_grad_()  # positives at +-100, where exp() leaves fp32's range
    value, gradients = run("info_nce", leaves, tile=8)
    expected, expected_gradients = reference("info_nce", leaves)
    assert float((value - expected).detach().abs()) <= 1e-5 * max(1.0, float(expected.detach()))
    for got, exact in zip(gradients, expected_gradients, strict=True):
        assert got.isfinite().all()
        # With equal embeddings 1 - p_ii is below what fp64 autograd can tell from 0.
        assert float((got - exact).abs().max()) <= 1e-5 * max(1e-9, float(exact.abs().max()))


def test_gradients_of_a_nearly_solved_batch_are_not_rounding_error():
    leaves = make(32, D=64, scale=math.log(30.0))
    leaves[1] = leaves[0].detach().clone().requires_grad_()
    value, gradients = run("info_nce", leaves, tile=8)
    expected, expected_gradients = reference("info_nce", leaves)
    assert float(expected.detach()) < 1e-6  # every pair's probability rounds to 1 in fp32
    assert error(value, expected) <= 1e-5
    assert max(error(g, e) for g, e in zip(gradients, expected_gradients, strict=True)) <= 1e-5


def test_both_ways_to_exponentiate_agree(monkeypatch):
    leaves = make(50)
    plain = run("info_nce", leaves, tile=16)
    monkeypatch.setattr(contrastive_tiles, "_PLAIN_EXP_LIMIT", 0.0)
    guarded = run("info_nce", leaves, tile=16)
    assert error(plain[0], guarded[0].double()) <= 1e-6
    assert max(error(p, g.double()) for p, g in zip(plain[1], guarded[1], strict=True)) <= 2e-6


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("keys", [None, ["a", "b", "a", "c", "a", "b", "d"]])
def test_gradcheck_in_double(loss, keys):
    leaves = make(7, D=5, loss=loss, dtype=torch.float64)
    function = info_nce if loss == "info_nce" else siglip
    assert torch.autograd.gradcheck(lambda *x: function(*x, tile=3, keys=keys), leaves)


def test_one_pair_is_its_own_only_answer():
    value, gradients = run("info_nce", make(1))
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    assert all(float(g.abs().max()) <= 1e-5 for g in gradients)
    leaves = make(1, loss="siglip")
    value, gradients = run("siglip", leaves)
    expected, expected_gradients = reference("siglip", leaves)
    assert error(value, expected) <= 1e-6
    assert max(error(g, e) for g, e in zip(gradients, expected_gradients, strict=True)) <= 2e-6


@pytest.mark.parametrize("B", [1, 8, 100])
def test_info_nce_is_ln_b_where_nothing_tells_the_pairs_apart(B):
    same = F.normalize(torch.ones(B, 8), dim=1)
    assert float(info_nce(same, same, torch.tensor(CLIP_LOGIT_SCALE), tile=32)) == pytest.approx(math.log(B), abs=1e-5)


def test_initial_losses_are_the_papers():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(1024, 512, generator=generator), dim=1) for _ in range(2))
    clip = info_nce(image, text, torch.tensor(CLIP_LOGIT_SCALE))
    assert float(clip) == pytest.approx(math.log(1024), abs=0.35)
    assert float(clip) > math.log(1024)
    scale = torch.tensor(SIGLIP_LOGIT_SCALE)
    assert float(siglip(image, text, scale, torch.tensor(SIGLIP_LOGIT_BIAS))) == pytest.approx(10.05, abs=0.05)
    assert float(siglip(image, text, scale, torch.tensor(0.0))) > 700


def test_siglip_of_orthogonal_embeddings_is_known():
    B = 12
    image, text = torch.eye(2 * B)[:B], torch.eye(2 * B)[B:]
    value = siglip(image, text, torch.tensor(SIGLIP_LOGIT_SCALE), torch.tensor(-10.0), tile=5)
    assert float(value.detach()) == pytest.approx(
        math.log1p(math.exp(10)) + (B - 1) * math.log1p(math.exp(-10)), rel=1e-6
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_captions_of_one_image_are_not_each_others_negatives(loss, as_tensor):
    B = 23
    ids = torch.arange(B) % 9
    negatives = (ids[:, None] != ids[None]) | torch.eye(B, dtype=torch.bool)
    leaves = make(B, loss=loss)
    keys = ids if as_tensor else [f"image-{i}.jpg" for i in ids.tolist()]
    value, gradients = run(loss, leaves, tile=7, keys=keys)
    expected, expected_gradients = reference(loss, leaves, negatives)
    assert error(value, expected) <= 1e-6
    assert max(error(g, e) for g, e in zip(gradients, expected_gradients, strict=True)) <= 2e-6
    assert float(value.detach()) != float(run(loss, leaves, tile=7)[0].detach())


def test_a_batch_of_one_image_has_no_negatives_at_all():
    value, gradients = run("info_nce", make(6), tile=4, keys=["same"] * 6)
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    assert all(float(g.abs().max()) <= 1e-5 for g in gradients)


@pytest.mark.parametrize("loss", LOSSES)
def test_distinct_keys_change_nothing(loss):
    leaves = make(20, loss=loss)
    plain, keyed = run(loss, leaves, tile=8), run(loss, leaves, tile=8, keys=[str(i) for i in range(20)])
    assert torch.equal(plain[0], keyed[0])
    assert all(torch.equal(p, k) for p, k in zip(plain[1], keyed[1], strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_does_not_lower_the_precision(loss):
    leaves = make(40, loss=loss)
    plain = run(loss, leaves, tile=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(loss, leaves, tile=16)
    assert torch.equal(plain[0], cast[0])
    assert all(torch.equal(p, c) for p, c in zip(plain[1], cast[1], strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_embeddings_are_accumulated_in_fp32(loss, dtype, step):
    leaves = make(80, loss=loss)
    leaves[:2] = [x.detach().to(dtype).requires_grad_() for x in leaves[:2]]
    value, gradients = run(loss, leaves, tile=16)
    expected, expected_gradients = reference(loss, leaves)
    assert value.dtype == torch.float32
    assert error(value, expected) <= 1e-6
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
    for got, exact in zip(gradients[:2], expected_gradients[:2], strict=True):
        assert error(got, exact) <= 1.01 * step  # one rounding of the result, none on the way
    for got, exact in zip(gradients[2:], expected_gradients[2:], strict=True):
        assert error(got, exact) <= 2e-6


def test_a_loss_scaler_keeps_small_fp16_gradients():
    same = torch.eye(8, 16).half()
    # Every pair is told with 20 nats to spare.
    leaves = [same.clone(), same.clone(), torch.tensor(math.log(40.0)), torch.tensor(-20.0)]
    leaves = [x.requires_grad_() for x in leaves]
    (gradient,) = torch.autograd.grad(siglip(*leaves) * 2.0**20, leaves[:1])
    exact = reference("siglip", leaves)[1][0]
    assert 0 < float(exact.abs().max()) < 2**-25  # rounds to zero in fp16
    assert error(gradient.double() / 2**20, exact) <= 2**-10


class LargestTensor(TorchDispatchMode):
    """The largest storage, in elements, that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("keys", [None, [str(i // 2) for i in range(256)]])
def test_no_tensor_of_b_times_b_elements_is_made_or_saved(loss, keys):
    B, D, tile = 256, 8, 32
    leaves = make(B, D, loss)
    saved = []
    with LargestTensor() as dense:
        (dense_info_nce if loss == "info_nce" else dense_siglip)(*leaves)
    assert dense.elements >= B * B  # the probe sees what it is to see
    with (
        LargestTensor() as tiled,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        run(loss, leaves, tile=tile, keys=keys)
    assert tiled.elements <= max(B * D, tile * tile)
    assert sum(x.numel() for x in saved) <= 2 * B * D + 2


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(loss, trained):
    leaves = make(19, loss=loss)
    expected = reference(loss, leaves)[1]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in trained)
    (info_nce if loss == "info_nce" else siglip)(*leaves, tile=8).backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in trained)
        if i in trained:
            assert error(leaf.grad, expected[i]) <= 2e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gradients_only_the_loss_is_computed(loss):
    leaves = make(19, loss=loss)
    value = run(loss, leaves, tile=8)[0]
    with torch.no_grad():
        quiet = (info_nce if loss == "info_nce" else siglip)(*leaves, tile=8)
    assert not quiet.requires_grad
    assert torch.equal(quiet, value.detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_backward_scales_by_the_incoming_gradient_and_can_be_repeated(loss):
    leaves = make(12, loss=loss)
    expected = run(loss, leaves)[1]
    value = 3.0 * (info_nce if loss == "info_nce" else siglip)(*leaves)
    value.backward(retain_graph=True)
    value.backward()
    for leaf, once in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 6.0 * once)


def test_the_clamp_keeps_the_scale_in_its_range_and_leaves_its_gradient_alone():
    scale = torch.nn.Parameter(torch.tensor(5.0))
    scale.grad = torch.tensor(1.0)
    assert float(clamp_logit_scale_(scale).detach()) == pytest.approx(math.log(100))
    assert float(scale.grad) == 1.0
    scale.data.fill_(-1.0)
    assert float(clamp_logit_scale_(scale).detach()) == 0.0
    scale.data.fill_(CLIP_LOGIT_SCALE)
    assert float(clamp_logit_scale_(scale).detach()) == pytest.approx(math.log(1 / 0.07))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i, t, s: info_nce(i, t[:3], s), r"\(4, 16\) and \(3, 16\)"),
        (lambda i, t, s: info_nce(i[0], t[0], s), r"shape \(B, D\)"),
        (lambda i, t, s: info_nce(i.long(), t.long(), s), "floating-point"),
        (lambda i, t, s: info_nce(i, t, s, tile=0), "tile must be"),
        (lambda i, t, s: info_nce(i, t, s.exp()), "logarithm"),
        (lambda i, t, s: info_nce(i, t, torch.ones(2)), "must be a scalar"),
        (lambda i, t, s: siglip(i, t, s, None), "logit_bias"),
        (lambda i, t, s: info_nce(i, t, s, keys=["a"]), "each of the 4 pairs; got 1"),
        (lambda i, t, s: info_nce(i, t, s, keys=torch.rand(4)), "whole numbers"),
        (lambda i, t, s: info_nce(i[:0], t[:0], s), "empty batch"),
    ],
)
def test_wrong_input_is_told(change, says):
    with pytest.raises(WlsupError, match=says):
        change(*(x.detach() for x in make(4)))
