"""Replay: unlabelled pictures of the pretrained encoder's own domain, beside each batch of captioned ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from wlsup.batch import CaptionBatch
from wlsup.data.dataset import CaptionDataset, PictureDataset
from wlsup.data.keyed import keyed_random
from wlsup.data.loader import Failure
from wlsup.data.sources import MemoryPictures, Pictures, StoredPictures
from wlsup.data.stores import JoinedStore, check_path, open_store
from wlsup.errors import WlsupError

__all__ = ["MINI_REPLAY", "ReplayDataset", "check_replay", "replay_pictures"]

MINI_REPLAY = 2000
"""Generated pictures to replay."""

_SEED = 980_000  # neither the seeds that the mini encoder was pretrained on, nor those that a user would take


def check_replay(replay: str | Sequence[str] | None) -> None:
    """Refuse paths that lead nowhere.

    Raises:
        WlsupError: naming the path.
    """
    for path in _paths(replay):
        check_path(path, "data.replay")


def replay_pictures(replay: str | Sequence[str]) -> tuple[list[str], Pictures]:
    """Return keys and pictures.

    Args:
        replay: "mini", the plain scenes that the mini encoder was pretrained on (others of them), or a folder or tar of
            pictures, or several.

    Raises:
        WlsupError: a path that is missing or holds no pictures.
    """
    if replay == "mini":
        from wlsup.data.mini import pretraining_pictures  # on use: not needed by those who train on files

        keys = [f"replay/{index}" for index in range(MINI_REPLAY)]
        return keys, MemoryPictures(pretraining_pictures(MINI_REPLAY, _SEED))
    stores = [open_store(path) for path in _paths(replay)]
    if not stores:
        raise WlsupError("data.replay is an empty list. Give mini, or a folder or tar of pictures, or several.")
    store = stores[0] if len(stores) == 1 else JoinedStore(stores)
    names = sorted(store.names())
    if not names:
        raise WlsupError(f"data.replay: {store.path} holds no pictures; .jpg, .png, .webp, ... are read.")
    return names, StoredPictures(store, names)


class ReplayDataset:
    """Gives each batch of captioned pictures as many others, drawn by (seed, epoch, key of the captioned picture).

    Args:
        captioned: what is trained on.
        replayed: what is drawn from, with its own transform.
        seed: of the draw.
    """

    def __init__(self, captioned: CaptionDataset, replayed: PictureDataset, seed: int = 0) -> None:
        self.captioned, self.replayed, self.seed = captioned, replayed, seed

    @property
    def pictures(self) -> Pictures:
        """Of the captioned ones: the sampler asks how they lie in shards."""
        return self.captioned.pictures

    def __len__(self) -> int:
        return len(self.captioned)

    def __getitem__(self, item: int | tuple[int, int]) -> Any:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> CaptionBatch | Failure:
        """Return one batch of the given items, or a `Failure`."""
        batch = self.captioned.__getitems__(items)
        if isinstance(batch, Failure):
            return batch
        asked = [item if isinstance(item, tuple) else (0, item) for item in items]
        others = self.replayed.__getitems__([(epoch, self._draw(epoch, index)) for epoch, index in asked])
        if isinstance(others, Failure):
            return others
        return replace(batch, replay=others.images, skipped=[*batch.skipped, *others.skipped])

    def _draw(self, epoch: int, index: int) -> int:
        stream = keyed_random(self.seed, epoch, self.captioned.keys[index], "replay")
        return int(stream.random() * len(self.replayed))


def _paths(replay: str | Sequence[str] | None) -> list[str]:
    if replay is None or replay == "mini":
        return []
    return [replay] if isinstance(replay, str) else list(replay)
