"""Features of a frozen encoder, computed once: later epochs read no picture and run no encoder.

There is no augmentation then: each picture is seen whole, as evaluation sees it, the same in every epoch. The caption
is still drawn anew each epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from wlsup.batch import CaptionBatch, VisionOutput
from wlsup.data.dataset import CaptionDataset
from wlsup.data.keyed import keyed_random
from wlsup.data.loader import make_loader
from wlsup.data.sampler import EpochSampler
from wlsup.errors import WlsupError
from wlsup.waiting import PATIENCE

__all__ = ["CachedDataset", "FeatureCache", "cache_of", "what_is_kept"]

_log = logging.getLogger("wlsup.data")

Encode = Callable[[Tensor], VisionOutput]

_MEMORY, _MEMBERSHIP, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class FeatureCache:
    """What an encoder makes of each of n pictures, in fp32, in memory.

    Args:
        keep: "pooled" for one feature a picture, or "tokens" for the tokens that ``encode`` gives beside it.
    """

    def __init__(self, keep: Literal["pooled", "tokens"] = "pooled") -> None:
        self.keep = keep
        self.keys: list[str] = []
        self._pooled: Tensor | None = None
        self._tokens: Tensor | None = None
        self._prefix = 0

    def __len__(self) -> int:
        return len(self.keys)

    @torch.no_grad()
    def fill(
        self,
        dataset: CaptionDataset,
        encode: Encode,
        device: torch.device | str,
        batch_size: int = 256,
        num_workers: int = 0,
        note: Callable[[Any], None] | None = None,
        patience: float = PATIENCE,
        processes: int = 1,
    ) -> None:
        """Encode every picture that can be read.

        Args:
            dataset: with the transform of evaluation.
            encode: (B, 3, H, W) -> `VisionOutput`; in eval mode.
            device: where it runs.
            batch_size: pictures a forward pass.
            num_workers: processes that read pictures.
            note: called with each batch, to count what could not be read.
            patience: seconds to wait for one batch.
            processes: how many share this machine's memory, each with a cache of its own.

        Raises:
            WlsupError: the features would not fit into memory.
        """
        sampler = EpochSampler(len(dataset), batch_size=batch_size, shuffle=False)
        done = 0
        for batch in make_loader(dataset, sampler, batch_size, num_workers, note, patience):
            output = encode(batch.images.to(device))
            if self._pooled is None:
                self._make(len(dataset), output, processes)
            stop = done + len(batch)
            self._pooled[done:stop] = output.pooled
            if self._tokens is not None:
                self._tokens[done:stop] = output.tokens
            self.keys += batch.keys
            done = stop

    def take(self, positions: Sequence[int]) -> VisionOutput:
        """Return the features at ``positions``; without tokens, (B, 0, D), where only the pooled ones are kept."""
        if self._pooled is None:
            raise WlsupError("The feature cache is empty: fill() it first.")
        index = torch.as_tensor(positions)
        pooled = self._pooled[index]
        tokens = pooled.new_empty(len(index), 0, pooled.shape[-1]) if self._tokens is None else self._tokens[index]
        return VisionOutput(pooled, tokens, self._prefix)

    def _make(self, count: int, output: VisionOutput, processes: int) -> None:
        values = output.pooled[0].numel() + (output.tokens[0].numel() if self.keep == "tokens" else 0)
        needed, free = 4 * count * values * processes, _free_bytes()
        if free is not None and needed > 0.8 * free:
            each = f" in each of {processes} processes" if processes > 1 else ""
            raise WlsupError(
                f"data.cache_features would keep {needed / processes / 2**30:.1f} GiB for {count:,} pictures{each}, "
                f"and {free / 2**30:.1f} GiB of memory are free. Use fewer pairs (data.pairs), or set "
                "data.cache_features to false."
            )
        self._pooled = torch.empty(count, *output.pooled.shape[1:])
        self._tokens = torch.empty(count, *output.tokens.shape[1:]) if self.keep == "tokens" else None
        self._prefix = output.num_prefix_tokens


def cache_of(
    module: Any,
    dataset: CaptionDataset,
    batch_size: int,
    num_workers: int,
    note: Callable[[Any], None],
    patience: float = PATIENCE,
    processes: int = 1,
) -> FeatureCache:
    """Fill a cache with what an approach reads of a data set's pictures.

    Args:
        module: the approach; it says by ``untouched`` and ``cacheable`` whether and what of it may be kept.
        dataset: with the transform of evaluation.
        batch_size: pictures a forward pass.
        num_workers: processes that read pictures.
        note: called with each batch, to count what could not be read.
        patience: seconds to wait for one batch.
        processes: how many on this machine do the same.

    Raises:
        WlsupError: there is no approach, it changes its encoder, or it needs the pictures themselves.
    """
    if module is None or not getattr(module, "untouched", False) or not getattr(module, "cacheable", ""):
        name = getattr(module, "name", "no approach")
        raise WlsupError(
            f"data.cache_features keeps what a frozen encoder makes of each picture; {name} trains the encoder, "
            "changes the pictures it sees, or asks for them. Set it to false, or use an approach that reads a locked "
            "encoder: lit, linear_map, cross_modal_reprogramming, magma and magma_moe with model.encoder_lr 0, or "
            "selective_k with model.k 0 and a model.criterion that looks at no pictures, such as last."
        )
    _log.info("data.cache_features: %d pictures are read once; there is no augmentation", len(dataset))
    cache = FeatureCache(module.cacheable)
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        cache.fill(dataset, what_is_kept(module), module.device, batch_size, num_workers, note, patience, processes)
    finally:
        for part, was in training:
            part.training = was
    return cache


def what_is_kept(module: Any) -> Encode:
    """Return what makes of pictures what the cache keeps: an approach's ``kept`` where it has one, else its encoder.

    A ``kept`` (B, 3, H, W) -> `VisionOutput` leaves out what the approach does not read, such as the class token.
    """
    return getattr(module, "kept", module.encoder)


class CachedDataset:
    """Captions with cached features in place of pictures.

    Args:
        cache: filled from ``dataset``.
        dataset: whose captions these are.
        training: True draws captions, by (seed, epoch, key), as `CaptionDataset` does; False takes the first.
    """

    in_memory = True

    def __init__(self, cache: FeatureCache, dataset: CaptionDataset, training: bool) -> None:
        position = {key: index for index, key in enumerate(dataset.keys)}
        self.cache, self.seed, self.training = cache, dataset.seed, training
        self.keys = cache.keys
        self.captions = [dataset.captions[position[key]] for key in cache.keys]
        self.pictures = None  # none are read; the sampler asks whether they lie in shards

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, item: int | tuple[int, int]) -> CaptionBatch:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> CaptionBatch:
        """Return one batch of the given items."""
        asked = [item if isinstance(item, tuple) else (0, item) for item in items]
        return CaptionBatch(
            images=torch.empty(len(asked), 0),
            captions=[self._caption(epoch, index) for epoch, index in asked],
            keys=[self.keys[index] for _, index in asked],
            encoded=self.cache.take([index for _, index in asked]),
        )

    def _caption(self, epoch: int, index: int) -> str:
        captions = self.captions[index]
        if len(captions) == 1 or not self.training:
            return captions[0]
        return captions[int(keyed_random(self.seed, epoch, self.keys[index], "caption").random() * len(captions))]


def _free_bytes() -> int | None:
    """Return the memory that can still be taken, files that are only kept at hand not counted; None: not known here."""
    return min((*_left_on_the_machine(), *_left_to_the_groups()), default=None)


def _left_on_the_machine() -> Iterator[int]:
    for line in _MEMORY.read_text().splitlines() if _MEMORY.is_file() else ():
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])


def _left_to_the_groups() -> Iterator[int]:
    """Yield what each control group that this process is in, of version 2 or 1, may still take."""
    for line in _MEMBERSHIP.read_text().splitlines() if _MEMBERSHIP.is_file() else ():
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = _GROUPS / "memory" if controllers else _GROUPS
        names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = top / own.lstrip("/")
        for place in (group, *group.parents)[: len(group.parts) - len(top.parts) + 1]:
            limit, used = (place / f"memory.{name}" for name in names)
            if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
                facts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                cached = facts.get("total_inactive_file", facts.get("inactive_file", 0))
                yield max(int(most) - int(used.read_text()) + int(cached), 0)
