"""What both data modules share, captions' and pretraining's: the spec, the ranks, the manifest, bad samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import lightning

from wlsup.batch import CaptionBatch, ImageBatch, ImageSpec
from wlsup.data.badness import BadSampleCounter
from wlsup.data.dataset import PictureDataset
from wlsup.data.decoders import available_decoders, check_decoder, decoders_used
from wlsup.data.loader import BatchLoader, make_loader
from wlsup.data.sampler import EpochSampler
from wlsup.data.subset import manifest_sha256, write_manifest
from wlsup.errors import WlsupError
from wlsup.waiting import PATIENCE

__all__ = ["KeyedDataModule"]


class KeyedDataModule(lightning.LightningDataModule, ABC):
    """What both data modules share: the spec, the ranks, the manifest, the count of bad samples.

    Args:
        batch_size: of one process.
        num_workers: processes that read pictures; 0 reads in the main one.
        seed: of order and augmentation.
        max_bad_fraction: stop when more than this fraction of the pictures cannot be had or read.
        decoder: what decodes JPEGs in training.
        patience: seconds to wait for one batch before the run ends and says so, 0 for ever.

    Raises:
        WlsupError: if a setting is out of range.
    """

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        seed: int,
        max_bad_fraction: float,
        decoder: str = "auto",
        patience: float = PATIENCE,
    ) -> None:
        super().__init__()
        if patience < 0:
            raise WlsupError(f"patience={patience:g}: give seconds >= 0.")
        if batch_size < 1 or num_workers < 0:
            raise WlsupError(
                f"batch_size={batch_size}, num_workers={num_workers}: give batch_size >= 1, num_workers >= 0."
            )
        if not 0 <= max_bad_fraction < 1:
            raise WlsupError(f"max_bad_fraction={max_bad_fraction}: give a number in [0, 1).")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.decoder = check_decoder(decoder)
        self.bad = BadSampleCounter(max_bad_fraction)
        self.image_spec: ImageSpec | None = None
        self.patience = patience

    @abstractmethod
    def check_files(self) -> None:
        """Refuse, before a run has a folder, paths that are named and lead nowhere."""

    @property
    @abstractmethod
    def manifest(self) -> list[str]:
        """The keys of the training pictures, sorted."""

    @property
    def manifest_sha256(self) -> str:
        """SHA-256 of the manifest, one key a line: the same pictures give the same on every machine."""
        return manifest_sha256(self.manifest)

    def write_manifest(self, path: str | Path) -> str:
        """Write the manifest, one key a line, and return its SHA-256, which `sha256sum` also prints."""
        return write_manifest(path, self.manifest)

    @property
    def image_decoder(self) -> dict[str, Any]:
        """The decoder asked for, those that take whole pictures and reduced crops here, and all that are installed."""
        return {"asked": self.decoder, **decoders_used(self.decoder), "available": list(available_decoders())}

    @property
    def skipped(self) -> dict[str, str]:
        """Key and reason of every picture left out so far: listed but missing, or met and found unreadable."""
        return self.bad.skipped

    def note(self, batch: CaptionBatch | ImageBatch) -> None:
        """Count a batch's skipped samples; the loaders call it on every batch they yield.

        Raises:
            WlsupError: once more than ``max_bad_fraction`` of the samples are known to be bad.
        """
        self.bad.note(batch.skipped, len(batch))

    def _expect(self, train: int, validation: int) -> None:
        """Tell the counter how many samples there are; a rank's share of an epoch is told when it is known."""
        self.bad.expect("train", train, train)
        self.bad.expect("validation", validation, validation)

    def _spec(self) -> ImageSpec:
        """Return the spec that was set, or the one of the trainer's module."""
        if self.image_spec is None and self.trainer is not None:
            self.image_spec = getattr(self.trainer.lightning_module, "image_spec", None)
        if self.image_spec is None:
            raise WlsupError(
                "The data module has no image_spec, so it does not know the encoder's picture size. Attach it to a "
                "trainer whose module has an image_spec, or set data.image_spec = encoder.image_spec first."
            )
        return self.image_spec

    def _train_loader(self, dataset: PictureDataset, shuffle_window: int | None = None) -> BatchLoader:
        groups = getattr(dataset.pictures, "groups", None)
        if shuffle_window is not None and groups is None:
            raise WlsupError(
                f"shuffle_window={shuffle_window} shuffles by shards, and this source's pictures lie in none. Leave it "
                "unset, or make shards with `wlsup data prepare`."
            )
        rank = self.trainer.global_rank if self.trainer is not None else 0
        world_size = self.trainer.world_size if self.trainer is not None else 1
        sampler = EpochSampler(
            len(dataset),
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            groups=groups,
            shuffle_window=shuffle_window,
        )
        if not len(sampler):
            raise WlsupError(
                f"batch_size={self.batch_size} on {world_size} process(es) needs {self.batch_size * world_size} "
                f"training samples for one step, and there are {len(dataset)}. Lower batch_size or use more pairs."
            )
        self.bad.expect("train", len(sampler), len(dataset))
        return make_loader(dataset, sampler, self.batch_size, self._workers(dataset), self.note, self.patience)

    def _val_loader(self, dataset: PictureDataset) -> BatchLoader:
        # Every rank sees all of it: it is small, and retrieval ranks each caption against every picture.
        sampler = EpochSampler(len(dataset), batch_size=self.batch_size, shuffle=False)
        return make_loader(dataset, sampler, self.batch_size, self._workers(dataset), self.note, self.patience)

    def _workers(self, dataset: Any) -> int:
        """None for what lies in memory: there they only copy it once more, at half the speed."""
        return 0 if getattr(dataset, "in_memory", False) else self.num_workers
