"""Random draws of a batch's samples that do not depend on over how many processes the batch is spread.

Process r of W holds rows r, r + W, r + 2 W, ... of the global batch, as `wlsup.data.sampler` deals them out. Where the
processes share a stream each draws for the global batch and takes its own rows, so that 2 processes with 16 samples
draw what one with 32 does. What is drawn token by token (a router's jitter and noise), whose number depends on the
captions beside, is each process's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from wlsup.ranks import processes

__all__ = ["Draw", "per_sample", "share", "shared", "unshare"]

Draw = Callable[[int, torch.Generator | None], Tensor]
"""How many samples, and from what (None: torch's global stream) -> a tensor whose first dimension they are."""

_seed: int | None = None
_streams: dict[torch.device, torch.Generator] = {}


def share(seed: int) -> None:
    """Begin the processes' shared stream; ``seed`` must be the same on all of them. One process alone has no need."""
    global _seed
    _seed = seed
    _streams.clear()


def unshare() -> None:
    """End it: from now on each process draws for itself."""
    global _seed
    _seed = None
    _streams.clear()


@contextmanager
def shared(seed: int) -> Iterator[None]:
    """Share a stream for a while, and put back what there was."""
    global _seed, _streams
    before = _seed, _streams
    _streams = {}
    share(seed)
    try:
        yield
    finally:
        _seed, _streams = before


def per_sample(
    draw: Draw, samples: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Return a draw for each of this process's samples.

    Args:
        draw: makes the numbers for so many samples.
        samples: B, of this process; with a shared stream the same on all.
        device: where ``draw`` draws.
        generator: a stream of one's own, which is then used as it is.

    Returns:
        (B, ...).
    """
    world, rank = processes()
    if generator is not None or _seed is None or world == 1:
        return draw(samples, generator)
    place = torch.device("cpu" if device is None else device)
    if place not in _streams:
        _streams[place] = torch.Generator(place).manual_seed(_seed)
    return draw(samples * world, _streams[place])[rank::world].clone()  # the others' share is not kept alive
