"""The data module of weak supervision: captioned pictures, held-out pairs, labelled sets."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from wlsup.batch import EvalSet, ImageSpec
from wlsup.data.dataset import CaptionDataset, PictureDataset
from wlsup.data.evalsets import EvalSetSpec, build_eval_set, check_eval_sets, locate_eval_set
from wlsup.data.feature_cache import CachedDataset, cache_of
from wlsup.data.keyed_datamodule import KeyedDataModule
from wlsup.data.loader import BatchLoader
from wlsup.data.locate import data_root, fetched_paths
from wlsup.data.replay import ReplayDataset, check_replay, replay_pictures
from wlsup.data.sources import CaptionSource, SourceRequest, check_source, load_source
from wlsup.data.stores import check_path
from wlsup.data.subset import hash_positions, read_manifest, split_positions
from wlsup.data.transforms import EvalTransform, TrainTransform
from wlsup.errors import WlsupError
from wlsup.waiting import PATIENCE

__all__ = ["DEFAULT_EVAL_SETS", "CaptionDataModule"]

DEFAULT_EVAL_SETS = ("mini_shapes", "mini_digits", "mini_landcover", "mini_textures")

_log = logging.getLogger("wlsup.data")


class CaptionDataModule(KeyedDataModule):
    """Image-caption pairs for training, held-out pairs for retrieval, labelled sets for evaluation.

    Which pairs is decided by a hash of their keys; order, crops and the one caption drawn for each image in each epoch
    by (seed, epoch, key): nothing depends on the number of workers, and a resumed run sees what it would have seen.

    Args:
        source: name of a source: "mini", "table", "coco", "conceptual_captions", "imagenet_captions",
            "imagenet_class_names" or "shards".
        captions: path of the captions, for sources that read files. With neither this nor ``images``, a set that
            `wlsup data fetch` brings is looked for where that puts it, below ``root``.
        images: folder, tar or zip of the pictures, likewise; for shards their folder.
        pairs: number of training images; None for all that are not held out.
        manifest: file of keys, as a run saves them, that are to be the training images again, whatever ``pairs``
            says; keys that the source no longer has count as bad.
        validation_pairs: number of images held out for retrieval.
        batch_size: of one process.
        num_workers: processes that read pictures; 0 reads in the main one.
        seed: of order, crops, caption draws and replacements; not of the choice of pairs.
        crop_scale: lowest and highest area fraction of the training crop.
        horizontal_flip: flip half the training pictures. Off: captions say "left" and "right".
        eval_sets: names of known sets, or descriptions of one's own; None for the four mini sets.
        max_bad_fraction: stop when more than this fraction of the images cannot be had or read.
        source_options: the source's own settings.
        root: folder of the published evaluation sets; None for the environment variable WLSUP_DATA, or ``data``.
        decoder: what decodes JPEGs in training: "auto" for the fastest that is installed, which decodes at half the
            size or less where a crop is shrunk anyway; "pil" for the exact crop. Evaluation is always exact.
        shuffle_window: number of shards shuffled together, for file systems that serve long reads better than random
            ones; None to shuffle all samples as one.
        replay: unlabelled pictures of the pretrained encoder's own domain for ``regularizer.replay``, as many a batch
            as captioned ones: "mini" for generated ones, a folder or tar, or several. None: "mini" with source "mini".
        cache_features: for approaches that leave the encoder as it is: run it once over all pictures, and train on what
            it made of them. There is no augmentation then.
        patience: seconds to wait for one batch before the run ends and says so, 0 for ever.

    Attributes:
        image_spec: set it, or attach a trainer whose module has one.

    Raises:
        WlsupError: if a setting is out of range.
    """

    def __init__(
        self,
        source: str = "mini",
        captions: str | None = None,
        images: str | None = None,
        pairs: int | None = None,
        validation_pairs: int = 256,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        crop_scale: tuple[float, float] = (0.4, 1.0),
        horizontal_flip: bool = False,
        eval_sets: list[str | EvalSetSpec] | None = None,
        max_bad_fraction: float = 0.05,
        source_options: dict[str, Any] | None = None,
        manifest: str | None = None,
        root: str | None = None,
        decoder: str = "auto",
        shuffle_window: int | None = None,
        replay: str | list[str] | None = None,
        cache_features: bool = False,
        patience: float = PATIENCE,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, max_bad_fraction, decoder, patience)
        self.replay = "mini" if replay is None and source == "mini" else replay
        self.cache_features = cache_features
        self._caches: dict[str, tuple[weakref.ref | None, CachedDataset]] = {}  # and of which approach
        if shuffle_window is not None and shuffle_window < 1:
            raise WlsupError(f"shuffle_window={shuffle_window}: give a number of shards >= 1, or leave it unset.")
        check_source(source, source_options or {})
        self.source = source
        self.manifest_file = manifest
        self.root = root
        self.shuffle_window = shuffle_window
        if captions is None and images is None:
            captions, images = fetched_paths(source, data_root(root))
        self.request = SourceRequest(captions, images, pairs, validation_pairs, max_bad_fraction)
        self.crop_scale = crop_scale
        self.horizontal_flip = horizontal_flip
        self.eval_sets: list[str | EvalSetSpec] = list(DEFAULT_EVAL_SETS) if eval_sets is None else eval_sets
        check_eval_sets(self.eval_sets)
        self.source_options = source_options or {}
        self._train: CaptionSource | None = None
        self._validation: CaptionSource | None = None
        self._evals: tuple[ImageSpec, list[EvalSet]] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the captions, check that the pictures are there, choose the pairs. A second call does nothing.

        Raises:
            WlsupError: naming the file, column, option or count at fault.
        """
        if self._train is not None:
            return
        fixed = None if self.manifest_file is None else read_manifest(self.manifest_file)
        source = load_source(self.source, self._request(fixed), self.source_options)
        for note in source.notes:
            _log.warning("source %s: %s", source.name, note)
        if fixed is not None:
            self._check_manifest(source, fixed)
            # Only the manifest's own keys count: what else the source has lost since changes nothing.
            lost = sorted(set(fixed).difference(source.keys))
            dropped = {key: source.dropped.get(key, "in the manifest, but not in the source") for key in lost}
            self.bad.admit(dropped, listed=len(fixed))
        else:
            self.bad.admit(source.dropped, listed=len(source.keys) + len(source.dropped))
        held_out = 0 if source.validation is not None else self.request.validation_pairs
        train, validation = split_positions(source.keys, self.request.pairs, held_out, fixed=fixed)
        self._validation = source.validation if source.validation is not None else source.take(validation)
        self._train = source.take(train)
        self._expect(len(self._train.keys), len(self._validation.keys))

    def check_files(self) -> None:
        """Refuse, before a run has a folder, paths that lead nowhere and eval sets that are not here.

        Raises:
            WlsupError: naming the path and where it was looked for.
        """
        for option in ("captions", "images"):
            check_path(getattr(self.request, option), f"data.{option}")
        check_path(self.manifest_file, "data.manifest")
        check_replay(self.replay)
        for entry in self.eval_sets:
            locate_eval_set(entry, self.root)

    @property
    def manifest(self) -> list[str]:
        """The keys of the training pairs, sorted."""
        return list(self._ready().keys)

    @property
    def captions(self) -> Sequence[Sequence[str]]:
        """Of each training picture all the captions that it has."""
        return self._ready().captions

    @property
    def pairs(self) -> int:
        """Number of training images, each with one caption an epoch."""
        return len(self._ready().keys)

    def train_dataloader(self) -> BatchLoader:
        """Return the loader of training batches (`CaptionBatch`), shuffled by (seed, epoch), whole batches only."""
        source, spec = self._ready(), self._spec()
        if self.cache_features:
            return self._train_loader(self._cached("train", source, spec))
        transform = TrainTransform(spec, tuple(self.crop_scale), self.horizontal_flip, decoder=self.decoder)
        dataset = CaptionDataset(source.keys, source.captions, source.pictures, transform, spec, self.seed)
        return self._train_loader(self._with_replay(dataset, transform, spec), self.shuffle_window)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Return the loader of held-out pairs (`CaptionBatch`): first captions, no augmentation, sorted by key."""
        self._ready()
        source, spec = self._validation, self._spec()
        if source is None or not source.keys:
            return []
        if self.cache_features:
            return self._val_loader(self._cached("validation", source, spec))
        return self._val_loader(
            CaptionDataset(source.keys, source.captions, source.pictures, EvalTransform(spec), spec, self.seed)
        )

    def held_out(self, pictures: int) -> tuple[BatchLoader | list[BatchLoader], dict[str, list[str]]]:
        """Return held-out pictures, whole whatever is cached, and every caption that each has.

        Args:
            pictures: how many at most; a hash of the keys chooses, so that fewer are some of more.

        Returns:
            (the loader of their batches, sorted by key and without those that cannot be read; captions by key).
        """
        self._ready()
        source, spec = self._validation, self._spec()
        if source is None or not source.keys or pictures < 1:
            return [], {}
        part = source.take(sorted(hash_positions(source.keys, "wlsup captions")[:pictures].tolist()))
        captions = [list(some) for some in part.captions]
        dataset = CaptionDataset(part.keys, captions, part.pictures, EvalTransform(spec), spec, self.seed)
        return self._val_loader(dataset), dict(zip(part.keys, captions, strict=True))

    def _with_replay(
        self, dataset: CaptionDataset, transform: TrainTransform, spec: ImageSpec
    ) -> CaptionDataset | ReplayDataset:
        """Add pictures to replay to each batch, if the approach's regulariser asks for them."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if not getattr(getattr(module, "regularizer", None), "replays", False):
            return dataset
        if self.replay is None:
            raise WlsupError(
                "regularizer.replay needs pictures of what the encoder was pretrained on: set data.replay to a folder "
                "or tar of them, or to mini for generated ones."
            )
        keys, pictures = replay_pictures(self.replay)
        return ReplayDataset(dataset, PictureDataset(keys, pictures, transform, spec, self.seed), self.seed)

    def _cached(self, part: str, source: CaptionSource, spec: ImageSpec) -> CachedDataset:
        """Return the pairs of a part with features in place of pictures, computed on an approach's first call.

        Without an approach they are those of the last one.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        owner = None if module is None else weakref.ref(module)
        if part not in self._caches or (owner is not None and owner != self._caches[part][0]):
            dataset = CaptionDataset(
                source.keys, source.captions, source.pictures, EvalTransform(spec), spec, self.seed
            )
            local = getattr(self.trainer, "num_devices", 1)
            cache = cache_of(module, dataset, self.batch_size, self.num_workers, self.note, self.patience, local)
            self._caches[part] = owner, CachedDataset(cache, dataset, training=part == "train")
        return self._caches[part][1]

    def eval_datasets(self) -> list[EvalSet]:
        """Return the labelled sets, built once."""
        spec = self._spec()
        if self._evals is None or self._evals[0] != spec:
            self._evals = spec, [build_eval_set(entry, spec, self.root) for entry in self.eval_sets]
        return self._evals[1]

    def _request(self, fixed: list[str] | None) -> SourceRequest:
        """Return what to ask the source for: sources that make their pairs must make as many as a manifest holds."""
        if fixed is None or self.request.pairs is None:
            return self.request
        return replace(self.request, pairs=max(self.request.pairs, len(fixed)))

    def _check_manifest(self, source: CaptionSource, fixed: list[str]) -> None:
        """Hold what the source lacks of a manifest against the manifest, not against the far larger source."""
        lost = set(fixed).difference(source.keys)
        if len(lost) > self.bad.max_bad_fraction * len(fixed):
            raise WlsupError(
                f"{len(lost)} of {len(fixed)} keys of {self.manifest_file} are not in source {source.name!r}, such as "
                f"{min(lost)!r}, more than max_bad_fraction={self.bad.max_bad_fraction:g} allows. Give the run's own "
                "captions and images."
            )

    def _ready(self) -> CaptionSource:
        if self._train is None:
            self.setup()
        if self._train is None:
            raise WlsupError("The data module's setup did not complete.")
        return self._train
