"""Draws depend on seed, step and rank, and on nothing that was drawn before."""

from types import SimpleNamespace

import torch

from wlsup.callbacks.keyed_randomness import KeyedRandomness
from wlsup.draws import per_token


def draw(seed=0, epoch=0, batch=0, rank=0):
    torch.rand(3)
    trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
    KeyedRandomness(seed).on_train_batch_start(trainer, None, None, batch)
    return torch.rand(4)


def test_nothing_is_shared_after_a_run():
    callback = KeyedRandomness(0)
    for end in (lambda: callback.teardown(None, None, "fit"), lambda: callback.on_exception(None, None, Exception())):
        callback.on_train_batch_start(SimpleNamespace(current_epoch=0, global_rank=0), None, None, 0)
        first = per_token(torch.empty(1, 2, 3), 0, "jitter")
        assert torch.equal(first, per_token(torch.empty(1, 2, 3), 0, "jitter"))
        end()
        assert not torch.equal(first, per_token(torch.empty(1, 2, 3), 0, "jitter"))


def test_the_same_place_draws_the_same_and_every_other_place_differs():
    assert torch.equal(draw(), draw())
    others = [draw(seed=1), draw(epoch=1), draw(batch=1), draw(rank=1)]
    assert not any(torch.equal(draw(), other) for other in others)
