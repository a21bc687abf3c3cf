"""The reconstruction grid shows what it says."""

import torch

from wlsup.evaluation.pictures import reconstruction_grid


def test_columns_are_input_masked_prediction_pasted():
    images, predicted = torch.full((1, 3, 4, 4), 0.5), torch.full((1, 3, 4, 4), -0.5)
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    grid = reconstruction_grid(images, predicted, mask, 2, mean=(0.5,) * 3, std=(1.0,) * 3, least_side=4)
    assert grid.shape == (3, 8, 32)
    tiles = [grid[0, 2:6, 8 * i + 2 : 8 * i + 6] for i in range(4)]
    assert torch.equal(tiles[0], torch.ones(4, 4))
    assert torch.equal(tiles[1][:2, :2], torch.full((2, 2), 0.5))
    assert torch.equal(tiles[1][2:], torch.ones(2, 4))
    assert torch.equal(tiles[2], torch.zeros(4, 4))
    assert torch.equal(tiles[3][:2, :2], torch.zeros(2, 2))
    assert torch.equal(tiles[3][:, 2:], torch.ones(4, 2))
    assert grid[:, :2].eq(1).all()
