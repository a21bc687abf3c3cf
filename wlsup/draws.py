"""Random draws of a batch's samples that do not depend on over how many processes the batch is spread.

Process r of W holds rows r, r + W, r + 2 W, ... of the global batch, as `wlsup.data.sampler` deals them out. Where the
processes share a stream each draws for the global batch and takes its own rows, so that 2 processes with 16 samples
draw what one with 32 does. What is drawn token by token (a router's jitter and noise) cannot come out of a stream: how
many tokens a process has depends on the captions beside. There each number is a hash of where it stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from wlsup.ranks import processes

__all__ = ["Draw", "per_sample", "per_token", "share", "shared", "unshare"]

Draw = Callable[[int, torch.Generator | None], Tensor]
"""How many samples, and from what (None: torch's global stream) -> a tensor whose first dimension they are."""

_ODD = (0x9E3779B1 - 2**32, 0x85EBCA77 - 2**32, 0xC2B2AE3D - 2**32)  # the primes of xxHash32
_seed: int | None = None
_streams: dict[torch.device, torch.Generator] = {}


def share(seed: int) -> None:
    """Begin a shared stream; ``seed`` must be the same on all processes, and on a single one that is to draw alike."""
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


def per_token(tokens: Tensor, layer: int, what: str) -> Tensor:
    """Return a draw from U(0, 1) for each number of this process's tokens.

    Without a shared stream they are torch's. With one, each is a hash of the stream's seed, the layer, what it is for,
    the sample's row in the global batch, its position and its channel: nothing else moves it, neither what was drawn
    before nor how long the samples beside are. A second pass of one step draws the same, a recomputed one too. The
    rows of ``tokens`` must be the process's whole batch, in its order.

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", the idea of a hash of a counter; the hash
    is Wellons' lowbias32, `Hash Prospector <https://github.com/skeeto/hash-prospector>`_.

    Args:
        tokens: (B, L, C), of which shape and device count.
        layer: layers of one number draw the same.
        what: what it is for, such as "jitter".

    Returns:
        (B, L, C) float32, the middles of 2^23 intervals: neither 0 nor 1 is among them.
    """
    batch, length, channels = tokens.shape
    device = tokens.device
    if _seed is None:
        return _uniform(torch.randint(2**23, (batch, length, channels), dtype=torch.int32, device=device))
    world, rank = processes()
    digest = hashlib.blake2b(f"{_seed}/{layer}/{what}".encode(), digest_size=8).digest()
    keys = [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)]
    rows, positions, places = (torch.arange(n, dtype=torch.int32, device=device) for n in (batch, length, channels))
    # No two tokens of 2^17 samples x 10^4 positions have one number here (checked for these factors).
    token = _hashed((rows * world + rank).mul_(_ODD[0])[:, None] + positions.mul_(_ODD[1]).add_(keys[0]))
    number = _hashed(token[:, :, None] + places.mul_(_ODD[2]).bitwise_xor_(keys[1]))
    return _uniform(number.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF))


def _uniform(number: Tensor) -> Tensor:
    """Whole numbers below 2^23 -> the middles of as many intervals of (0, 1), exact in float32."""
    return number.to(torch.float32).add_(0.5).mul_(2**-23)


def _hashed(x: Tensor) -> Tensor:
    """Hash 32-bit integers, in place: a bijection in which each bit of the input turns about half of the output's."""
    _fold(x, 16).mul_(0x7FEB352D)
    _fold(x, 15).mul_(0x846CA68B - 2**32)
    return _fold(x, 16)


def _fold(x: Tensor, shift: int) -> Tensor:
    """Combine each number with its own upper bits, in place; torch's shift would bring in copies of the sign."""
    return x.bitwise_xor_((x >> shift).bitwise_and_(0xFFFFFFFF >> shift))
