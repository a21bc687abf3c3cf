"""The grid of reconstructions: the same pictures under the same masks, without disturbing training."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from wlsup.approaches.mae_cl import MaeCL
from wlsup.callbacks.reconstructions import Reconstructions
from wlsup.errors import WlsupError


@pytest.fixture
def module():
    torch.manual_seed(0)
    return MaeCL()


@pytest.fixture
def board(tmp_path, monkeypatch):
    sink = TensorBoardLogger(tmp_path, name="", version="")
    sink.grids = []
    monkeypatch.setattr(sink.experiment, "add_image", lambda tag, grid, step: sink.grids.append((tag, grid, step)))
    return sink


def trainer(board, pictures=8):
    batches = [SimpleNamespace(images=torch.randn(3, 3, 64, 64)) for _ in range(pictures // 3 + 1)]
    data = SimpleNamespace(val_dataloader=lambda: batches)
    return SimpleNamespace(loggers=[board], datamodule=data, is_global_zero=True, global_step=7)


def test_the_same_pictures_and_masks_every_time(module, board):
    callback, fit = Reconstructions(pictures=4), trainer(board)
    callback.on_fit_start(fit, module)
    torch.manual_seed(99)
    callback.on_train_epoch_end(fit, module)
    (tag, first, step), (_, second, _) = board.grids
    assert (tag, step) == ("reconstructions", 7)
    assert torch.equal(first, second)
    with torch.no_grad():
        module.mae.decoder.mask_token.add_(0.5)
    callback.on_train_epoch_end(fit, module)
    assert not torch.equal(first, board.grids[2][1])


def test_a_row_a_picture_and_four_columns(module, board):
    for rows in (2, 4):
        Reconstructions(pictures=rows).on_fit_start(trainer(board), module)
    short, tall = (grid for _, grid, _ in board.grids)
    assert short.shape[2] == tall.shape[2] >= 4 * 64
    assert tall.shape[1] - short.shape[1] >= 2 * 64


def test_training_goes_on_as_if_nothing_had_been_shown(module, board):
    module.setup("fit")
    module.train()
    modes = {name: child.training for name, child in module.named_modules()}
    fit = trainer(board)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Reconstructions(pictures=2).on_fit_start(fit, module)
    assert torch.equal(torch.rand(3), expected)
    assert {name: child.training for name, child in module.named_modules()} == modes


def test_none_wanted_none_shown(module, board):
    Reconstructions(pictures=0).on_fit_start(trainer(board), module)
    assert not board.grids


@pytest.mark.parametrize("wrong", [{"pictures": -1}, {"mask_ratio": 1.0}, {"mask_ratio": 0.0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(WlsupError, match="reconstructions"):
        Reconstructions(**wrong)
