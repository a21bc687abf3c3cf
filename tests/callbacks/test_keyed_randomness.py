"""Draws depend on seed, step and rank, and on nothing that was drawn before."""

from types import SimpleNamespace

import torch

from wlsup.callbacks.keyed_randomness import KeyedRandomness


def draw(seed=0, epoch=0, batch=0, rank=0):
    torch.rand(3)
    trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
    KeyedRandomness(seed).on_train_batch_start(trainer, None, None, batch)
    return torch.rand(4)


def test_the_same_place_draws_the_same_and_every_other_place_differs():
    assert torch.equal(draw(), draw())
    others = [draw(seed=1), draw(epoch=1), draw(batch=1), draw(rank=1)]
    assert not any(torch.equal(draw(), other) for other in others)
