"""One linear map from a frozen encoder into a frozen language model: what language finds in the encoder as it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch, VisionOutput
from wlsup.models.language import GenerationSpec, LanguageModel, LanguageSpec
from wlsup.models.prefix import ImagePrefix, PrefixSpec
from wlsup.models.vision import VisionEncoder, VisionSpec, build_vision
from wlsup.objectives.captioning import prefix_captioning_loss
from wlsup.objectives.held_out_captions import (
    PROTOCOL,
    SAMPLES,
    CaptionLosses,
    caption_losses,
    generated_captions,
    interval,
    likelier_row,
    loss_rows,
    next_pictures,
    said_lines,
)
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainPlan
from wlsup.reprogramming.control import StepsAlike, compared

__all__ = ["LinearMap"]

_log = logging.getLogger("wlsup")

_See = Callable[[CaptionBatch], VisionOutput]


class LinearMap(Approach):
    """A linear map of the encoder's patch tokens to input embeddings of a language model; all else is frozen.

    The encoder stays as it is, and so does its k-NN accuracy. The result is the captioner, and what it reveals: how
    much lower the loss of held-out captions is than with a random encoder, or with no picture at all, given the same
    training (`measure`).

    Source: Merullo et al. 2023, "Linearly Mapping from Image to Text Space" (LiMBeR), section 3.

    Args:
        encoder: the frozen vision encoder.
        language: the frozen causal language model.
        prefix: which tokens are mapped; LiMBeR's form has no LayerNorm.
        generation: how captions are put into words.
        optimizer: optimizer and schedule; LiMBeR's is AdamW with betas (0.9, 0.95).
        regularizer: of the encoder; 0 by design here, since nothing in it trains.
        lr: of the map, after warm-up.
        weight_decay: of the map's matrix.
        compare: measure the encoder against a random one and against no picture: two more maps are trained, on the
            same batches, when the run's own is done.

    Raises:
        WlsupError: prefix and captions do not fit the language model's positions.
    """

    name = "linear_map"
    summary = "one linear map from a frozen encoder into a frozen language model (LiMBeR)"
    untouched = True
    cacheable = "tokens"

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(),
        language: LanguageSpec = LanguageSpec(),
        prefix: PrefixSpec = PrefixSpec(layer_norm=False),
        generation: GenerationSpec = GenerationSpec(),
        optimizer: OptimizerSpec = OptimizerSpec(betas=(0.9, 0.95)),
        regularizer: RegularizerSpec = RegularizerSpec(),
        lr: float = 8e-4,
        weight_decay: float = 0.0,
        compare: bool = True,
    ) -> None:
        super().__init__(optimizer, regularizer)
        self.lr, self.weight_decay, self.compare = lr, weight_decay, compare
        self.generation, self.vision_spec = generation, encoder
        self.vision = build_vision(encoder)
        self.language = LanguageModel(language)
        self.prefix = ImagePrefix(self.encoder.embed_dim, self.language.width, prefix)
        self.language.check_length(self.prefix.positions(self.encoder.grid_size), generation)
        # Where the maps that this one is compared to begin; not a parameter of the run.
        self._initial = {name: tensor.clone() for name, tensor in self.prefix.state_dict().items()}

    @property
    def encoder(self) -> VisionEncoder:
        """The frozen vision encoder."""
        return self.vision

    @property
    def plan(self) -> TrainPlan:
        """The map trains, and nothing else."""
        return TrainPlan([Train("prefix.*", self.lr, self.weight_decay), Freeze("vision.*"), Freeze("language.*")])

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The vision encoder and the language model."""
        return {**super().bases, "language": self.language.base}

    @property
    def shardable(self) -> list[nn.Module]:
        """The language model's blocks."""
        return list(self.language.blocks)

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Captioning behind the mapped picture."""
        loss = self._loss(self.prefix, self._see, batch)
        return {"loss": loss, "captioning": loss}

    def kept(self, images: Tensor) -> VisionOutput:
        """(B, 3, H, W) of the encoder's size -> what a cache keeps of them: no more tokens than the map reads."""
        return self.prefix.reduced(self.encoder(images), self.encoder.grid_size)

    @torch.no_grad()
    def caption(self, images: Tensor, generation: GenerationSpec | None = None) -> list[str]:
        """(B, 3, H, W) -> B captions; put the model in eval mode yourself."""
        side = self.encoder.patch_size
        prefix = self.prefix(self.encoder(images), (images.shape[-2] // side, images.shape[-1] // side))
        return self.language.generate(prefix, generation or self.generation)

    def measure(self, datamodule: Any) -> dict[str, Any]:
        """Measure what the map found: the loss of held-out captions, beside what the same training finds elsewhere.

        Compared are a random encoder of the same architecture, and this encoder looking at a grey picture whatever the
        caption says: a map for each begins where this run's began and takes the same steps on the same batches.

        Args:
            datamodule: of the run; its held-out pairs are what is measured on.

        Returns:
            See `Approach.measure`; with "captions", a few generated ones beside those of people. Nothing where no pairs
            are held out.
        """
        held_out = [batch.to(self.device) for batch in datamodule.val_dataloader()]
        if not held_out:
            return {}
        with torch.inference_mode(False):
            controls, failed = {}, ""
            if self.compare:
                pictures = held_out[0].encoded is None
                trained, failed = compared(lambda: self._train_controls(self._controls(pictures), datamodule))
                controls = trained or {}
            untrained = copy.deepcopy(self.prefix)
            untrained.load_state_dict(self._initial)
            own = self._held_out(self.prefix, self._see, held_out)
            results = {
                "this encoder, this map": own,
                **{what: self._held_out(control.map, control.see, held_out) for what, control in controls.items()},
                "this encoder, an untrained map": self._held_out(untrained, self._see, held_out),
                "this encoder, this map, the next pair's picture": self._held_out(
                    self.prefix, next_pictures(self._see), held_out
                ),
                "the language model alone": caption_losses(self.language, held_out),
            }
        other = results["this encoder, this map, the next pair's picture"]
        captions = self._samples(held_out[0])
        return {
            "title": f"Caption loss a token, {len(own.nats)} held-out pairs: {self.name}",
            "rows": [*loss_rows(results), likelier_row(own, other)],
            "note": "\n".join(
                [
                    *_findings(results),
                    *(
                        []
                        if held_out[0].encoded is None
                        else ["a random encoder: needs pictures, and features are cached"]
                    ),
                    *filter(None, [failed]),
                    *said_lines(captions),
                ]
            ),
            "protocol": PROTOCOL,
            "captions": captions,
        }

    @torch.no_grad()
    def _see(self, batch: CaptionBatch) -> VisionOutput:
        return self.encode(batch)

    def _samples(self, batch: CaptionBatch) -> list[dict[str, str]]:
        few = next(_split(batch, SAMPLES))
        with torch.no_grad():
            prefix = self.prefix.eval()(self._see(few), self.encoder.grid_size)
        return generated_captions(self.language, prefix, few, self.generation)

    def _held_out(self, prefix: ImagePrefix, see: _See, batches: list[CaptionBatch]) -> CaptionLosses:
        prefix.eval()
        return caption_losses(self.language, batches, lambda batch: prefix(see(batch), self.encoder.grid_size))

    def _controls(self, pictures: bool = True) -> dict[str, _Control]:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            random = build_vision(replace(self.vision_spec, pretrained=False)).to(self.device).eval()
        random.requires_grad_(False)
        size = self.image_spec.size
        with torch.no_grad():
            grey = self.encoder(torch.zeros(1, 3, size, size, device=self.device))

        def see_grey(batch: CaptionBatch) -> VisionOutput:
            whole = (len(batch), *[-1] * 2)
            return replace(grey, pooled=grey.pooled.expand(*whole[:2]), tokens=grey.tokens.expand(*whole))

        views = {"a random encoder, its map": lambda batch: random(batch.images)} if pictures else {}
        views["no picture (grey), its map"] = see_grey
        return {what: _Control(self, see) for what, see in views.items()}

    def _train_controls(self, controls: dict[str, _Control], datamodule: Any) -> dict[str, _Control]:
        """Take the run's steps, on the run's batches, with other maps; return them."""
        trainer, chunk = self.trainer, datamodule.batch_size
        _log.info("training %d maps to compare with, %d steps each", len(controls), trainer.global_step)
        parts_of_a_step = trainer.accumulate_grad_batches * trainer.world_size  # of an epoch's last too
        with torch.enable_grad(), torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for step, batches in enumerate(islice(_run_batches(trainer, datamodule), trainer.global_step)):
                for control in controls.values():
                    torch.manual_seed(step)  # of the dropout, alike for all
                    for part in (part for batch in batches for part in _split(batch.to(self.device), chunk)):
                        control.steps.add(partial(self._loss, control.map, control.see, part), of=parts_of_a_step)
                    control.steps.step()
        for control in controls.values():
            control.steps.average.show()
        return controls

    def _loss(self, prefix: ImagePrefix, see: _See, batch: CaptionBatch) -> Tensor:
        captions = self.language.tokenizer(batch.captions, device=self.device)
        return prefix_captioning_loss(self.language, prefix(see(batch), self.encoder.grid_size), captions)


class _Control:
    """A map in training, from another view, as this run's was trained.

    Args:
        approach: whose initial map, plan and schedule to take.
        see: a batch to what the map reads.
    """

    def __init__(self, approach: LinearMap, see: _See) -> None:
        self.see = see
        self.map = copy.deepcopy(approach.prefix)
        self.map.load_state_dict(approach._initial)
        self.map.train()
        plan, ema = TrainPlan([Train("*", approach.lr, approach.weight_decay)]), approach.regularizer.spec.ema
        self.steps = StepsAlike(self.map, plan, approach.optimizer_spec, approach.trainer, ema)


def _run_batches(trainer: Any, datamodule: Any) -> Iterator[list[CaptionBatch]]:
    """Yield what each optimizer step of the run saw, of all processes together, from the first on."""
    before = datamodule.trainer, datamodule.batch_size
    # Without a trainer the loader is that of a single process: with all processes' samples in a batch, the same ones.
    datamodule.trainer, datamodule.batch_size = None, datamodule.batch_size * trainer.world_size
    try:
        loader = datamodule.train_dataloader()
    finally:
        datamodule.trainer, datamodule.batch_size = before
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        batches = islice(loader, int(trainer.num_training_batches))
        while together := list(islice(batches, trainer.accumulate_grad_batches)):
            yield together


def _split(batch: CaptionBatch, size: int) -> Iterator[CaptionBatch]:
    for start in range(0, len(batch), size):
        part = slice(start, start + size)
        seen = batch.encoded
        if seen is not None:
            seen = replace(seen, pooled=seen.pooled[part], tokens=seen.tokens[part])
        yield replace(
            batch, images=batch.images[part], captions=batch.captions[part], keys=batch.keys[part], encoded=seen
        )


def _findings(results: dict[str, CaptionLosses]) -> list[str]:
    """Say what the comparison shows, with 95 % intervals over captions."""
    own, lines = results["this encoder, this map"], []
    for what, result in results.items():
        if "its map" not in what:
            continue
        mean, half = interval(result, own)
        verdict = "lower" if mean - half > 0 else "higher" if mean + half < 0 else "not distinguishable from"
        lines.append(
            f"{what.split(',')[0]}: {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] nats a token against this "
            f"encoder, whose loss is {verdict}{'' if verdict.endswith('from') else ' than'} that"
        )
    return lines
