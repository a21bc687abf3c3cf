"""What the reconstruction loss promises: FAIR's patches and FAIR's numbers."""

from __future__ import annotations

import pytest
import torch

from wlsup.errors import WlsupError
from wlsup.objectives.reconstruction import (
    paste_prediction,
    patchify,
    reconstruction_loss,
    unnormalize_patches,
    unpatchify,
)


def pictures(batch: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 40)])
def test_unpatchify_undoes_patchify(height: int, width: int) -> None:
    images = pictures(height=height, width=width)
    assert torch.equal(unpatchify(patchify(images, 8), 8, (height, width)), images)


def test_patches_run_row_by_row_and_are_channel_last_inside() -> None:
    images = pictures()
    patches = patchify(images, 8)
    assert patches.shape == (2, 16, 192)
    # Patch 6 is row 1, column 2; its value (p=3, q=5, c=1) lies at (3 * 8 + 5) * 3 + 1.
    assert patches[1, 6, (3 * 8 + 5) * 3 + 1] == images[1, 1, 8 + 3, 16 + 5]


def test_zero_prediction_of_normalized_pixels_costs_767_of_768() -> None:
    images = 100 * pictures(height=224, width=224)  # so large that the 1e-6 beside the variance does not show
    loss = reconstruction_loss(torch.zeros(2, 196, 768), images, torch.ones(2, 196), 16)
    assert loss.item() == pytest.approx(767 / 768, abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_loss_is_fairs_formula_over_removed_patches_only(normalize: bool) -> None:
    images, prediction = pictures(), torch.randn(2, 16, 192, requires_grad=True)
    mask = (torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.7).float()
    target = torch.einsum("nchpwq->nhwpqc", images.reshape(2, 3, 4, 8, 4, 8)).reshape(2, 16, 192)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1.0e-6) ** 0.5
    expected = (((prediction - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    loss = reconstruction_loss(prediction, images, mask, 8, normalize_pixels=normalize)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (mine,) = torch.autograd.grad(loss, prediction)
    (theirs,) = torch.autograd.grad(expected, prediction)
    assert torch.allclose(mine, theirs, atol=1e-8)
    assert mine[mask == 0].abs().max() == 0


def test_constant_patches_and_an_empty_mask_stay_finite() -> None:
    images, prediction = torch.full((1, 3, 16, 16), 0.3), torch.ones(1, 4, 192, requires_grad=True)
    loss = reconstruction_loss(prediction, images, torch.ones(1, 4), 8)
    assert loss.item() == pytest.approx(1.0, abs=1e-4)
    assert reconstruction_loss(prediction, images, torch.zeros(1, 4), 8).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_predictions_do_not_overflow(dtype: torch.dtype) -> None:
    prediction = torch.full((1, 4, 192), 300.0, dtype=dtype)  # 300^2 is beyond fp16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = reconstruction_loss(prediction, pictures(1, 16, 16).to(dtype), torch.ones(1, 4), 8)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(9e4, rel=1e-2)


def test_the_target_is_a_constant() -> None:
    images = pictures().requires_grad_()
    prediction = torch.zeros(2, 16, 192, requires_grad=True)
    reconstruction_loss(prediction, images, torch.ones(2, 16), 8).backward()
    assert images.grad is None and prediction.grad is not None


def test_pasting_a_perfect_prediction_gives_the_picture_back() -> None:
    images = pictures()
    target = patchify(images, 8)
    normalized = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    mask = torch.zeros(2, 16)
    mask[:, ::3] = 1
    assert torch.allclose(unnormalize_patches(normalized, images, 8), target, atol=1e-6)
    assert torch.allclose(paste_prediction(normalized, images, mask, 8), images, atol=1e-6)
    black = paste_prediction(torch.zeros(2, 16, 192), images, mask, 8, normalize_pixels=False)
    assert torch.equal(patchify(black, 8), target * (1 - mask[..., None]))


def test_shapes_that_do_not_belong_together_are_named() -> None:
    with pytest.raises(WlsupError, match="multiples of the patch size"):
        patchify(torch.zeros(1, 3, 30, 32), 8)
    with pytest.raises(WlsupError, match="wanted"):
        reconstruction_loss(torch.zeros(2, 15, 192), pictures(), torch.ones(2, 16), 8)
    with pytest.raises(WlsupError, match="do not make a picture"):
        unpatchify(torch.zeros(1, 15, 192), 8)
