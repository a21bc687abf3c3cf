"""The data module of pretraining: pictures alone."""

from __future__ import annotations

from wlsup.data.dataset import PictureDataset
from wlsup.data.keyed_datamodule import KeyedDataModule
from wlsup.data.loader import BatchLoader
from wlsup.data.sources import MemoryPictures, Pictures, StoredPictures
from wlsup.data.stores import JoinedStore, check_path, open_store
from wlsup.data.subset import split_by_hash
from wlsup.data.transforms import EvalTransform, TrainTransform
from wlsup.errors import WlsupError
from wlsup.waiting import PATIENCE

__all__ = ["ImageDataModule"]

MINI_PICTURES = 8000
"""Generated pictures for pretraining unless more or fewer are asked for."""

_Keyed = tuple[list[str], Pictures]


class ImageDataModule(KeyedDataModule):
    """Pictures without captions, for masked-autoencoder pretraining.

    Source: He et al. 2022, the pretraining augmentation: random resized crops of 0.2 to 1 of the area, and flips.

    Args:
        images: a folder or tar, or several; None for the generated pretraining scenes.
        pictures: number of training pictures, chosen by hash; None for all (of the generated ones, 8,000).
        validation_pictures: number held out, for the validation loss; 0 for none.
        batch_size: of one process.
        num_workers: processes that read pictures.
        seed: of order and augmentation.
        crop_scale: lowest and highest area fraction of the crop.
        horizontal_flip: flip half the pictures.
        max_bad_fraction: stop when more than this fraction of the pictures cannot be read.
        patience: seconds to wait for one batch before the run ends and says so, 0 for ever.

    Attributes:
        image_spec: set it, or attach a trainer whose module has one.

    Raises:
        WlsupError: if a setting is out of range.
    """

    def __init__(
        self,
        images: str | list[str] | None = None,
        pictures: int | None = None,
        validation_pictures: int = 0,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        horizontal_flip: bool = True,
        max_bad_fraction: float = 0.05,
        patience: float = PATIENCE,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, max_bad_fraction, patience=patience)
        self.images = images
        self.pictures = pictures
        self.validation_pictures = validation_pictures
        self.crop_scale = crop_scale
        self.horizontal_flip = horizontal_flip
        self._parts: tuple[_Keyed, _Keyed] | None = None

    def check_files(self) -> None:
        """Refuse, before a run has a folder, pictures that are not there.

        Raises:
            WlsupError: naming the path.
        """
        for path in self._paths():
            check_path(path, "data.images")

    def setup(self, stage: str | None = None) -> None:
        """List the pictures and choose which. A second call does nothing.

        Raises:
            WlsupError: if a folder or tar is missing, damaged or without pictures, or there are too few.
        """
        if self._parts is not None:
            return
        self._parts = self._generate() if self.images is None else self._list()
        self._expect(*(len(keys) for keys, _ in self._parts))

    @property
    def manifest(self) -> list[str]:
        """The keys of the training pictures, sorted."""
        return self._ready()[0][0]

    def train_dataloader(self) -> BatchLoader:
        """Return the loader of training batches (`ImageBatch` with labels -1), shuffled, whole batches only."""
        (keys, pictures), _ = self._ready()
        spec = self._spec()
        transform = TrainTransform(spec, tuple(self.crop_scale), self.horizontal_flip)
        return self._train_loader(PictureDataset(keys, pictures, transform, spec, self.seed))

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Return the loader of held-out pictures, without augmentation; an empty list if none are held out."""
        _, (keys, pictures) = self._ready()
        spec = self._spec()
        return self._val_loader(PictureDataset(keys, pictures, EvalTransform(spec), spec, self.seed)) if keys else []

    def _generate(self) -> tuple[_Keyed, _Keyed]:
        """Make the mini world's pretraining scenes; those held out come from another seed."""
        from wlsup.data.mini import mini_captions  # on use: not needed by those who train on files

        train = mini_captions("pretrain", self.pictures or MINI_PICTURES, 0)
        if not self.validation_pictures:
            return (train.keys, MemoryPictures(train.images)), ([], MemoryPictures(train.images[:0]))
        held_out = mini_captions("pretrain", self.validation_pictures, 1)
        return (train.keys, MemoryPictures(train.images)), (held_out.keys, MemoryPictures(held_out.images))

    def _list(self) -> tuple[_Keyed, _Keyed]:
        """List the pictures of the folders or tars and choose by hash."""
        stores = [open_store(path) for path in self._paths()]
        if not stores:
            raise WlsupError("images is an empty list. Give a folder or tar, or leave it unset for generated scenes.")
        store = stores[0] if len(stores) == 1 else JoinedStore(stores)
        names = store.names()
        if not names:
            raise WlsupError(
                f"images: {store.path} holds no pictures. Check the path; .jpg, .png, .webp, ... are read."
            )
        train, held_out = split_by_hash(
            names, self.pictures, self.validation_pictures, ("pictures", "validation_pictures")
        )
        return (train, StoredPictures(store, train)), (held_out, StoredPictures(store, held_out))

    def _paths(self) -> list[str]:
        return [self.images] if isinstance(self.images, str) else self.images or []

    def _ready(self) -> tuple[_Keyed, _Keyed]:
        if self._parts is None:
            self.setup()
        if self._parts is None:
            raise WlsupError("The data module's setup did not complete.")
        return self._parts
