"""MAGMA whose language model is adapted by mixtures of experts: of bottlenecks, or of its own MLPs (ours)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wlsup.adapters.language import LanguageAdapters, LanguageAdapterSpec, LanguageBottleneck
from wlsup.approaches.base import Approach
from wlsup.batch import CaptionBatch, VisionOutput
from wlsup.errors import WlsupError, choose
from wlsup.models.language import GenerationSpec, LanguageModel, LanguageSpec
from wlsup.models.prefix import ImagePrefix, PrefixSpec
from wlsup.models.vision import VisionEncoder, VisionSpec, build_vision
from wlsup.moe import MoE, auxiliary_losses, token_frequencies, update_biases
from wlsup.moe.cluster import ClusterSpec, activations, specialise
from wlsup.moe.hashing import HashRouter, balanced_table
from wlsup.moe.prefix_ids import PrefixTokenIds
from wlsup.moe.sites import choose_blocks
from wlsup.moe.spec import MoESpec
from wlsup.moe.upcycle import UpcycledMLPs, add_noise, change_of_function
from wlsup.objectives.captioning import prefix_captioning_loss
from wlsup.objectives.held_out_captions import captioner_task
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.optim import OptimizerSpec
from wlsup.plan import Freeze, Train, TrainPlan
from wlsup.sharding import has_shards

__all__ = ["MagmaMoE"]

_log = logging.getLogger("wlsup")


class MagmaMoE(Approach):
    """A captioner as MAGMA's, with mixtures of experts where MAGMA has one adapter, or in place of MLPs.

    ``mixture: adapters``: in each of MAGMA's slots E bottlenecks, of which a token takes k. Each has D / factor / k
    channels, so that a token meets as many parameters as in MAGMA (and k - 1 biases of the output more). ``mixture:
    ffn``: the MLP of every ``every``-th block becomes E copies of itself, which train; there are no adapters. Either
    way the language model's own weights never move, and step 0 computes what the pretrained one does.

    Source: ours. Eichenberg et al. 2022 (MAGMA) for all but the mixtures; Komatsuzaki et al. 2023, "Sparse Upcycling",
    for ``ffn``; the routers' own sources are in `MoESpec`. Keying a prefix by its positions for hash routing is ours.

    Args:
        encoder: the pretrained vision encoder.
        language: the frozen causal language model.
        prefix: how pictures go in front of captions.
        mixture: of what.
        adapters: of ``adapters``: where, and the channels of all k together.
        moe: experts, router, losses. Routers that are not causal are refused. The balanced hash counts the ids of the
            run's own captions.
        every: of ``ffn``: the last of every so many blocks; 1: all.
        noise: of ``ffn``: standard deviation of noise on the copies, relative to their own; ends the identity.
        cluster_energy: of ``ffn``: the share of spectral energy that each expert keeps on its own cluster of what the
            MLP reads of the run's captions (`moe.cluster`); nearly ends the identity. 0: copies, and no clusters. A
            checkpoint then also holds the mixtures as they were at first.
        generation: how captions are put into words.
        optimizer: optimizer and schedule.
        regularizer: what holds the encoder near the pretrained one.
        lr: of map, experts and routers, after warm-up.
        weight_decay: of matrices.
        encoder_lr: of the pretrained encoder; 0 freezes it.

    Raises:
        WlsupError: a router that is not causal; options of the other mixture; experts without a channel; what does not
            fit the language model.
    """

    name = "magma_moe"
    summary = "MAGMA with a mixture of experts for each adapter, or of copies of the language model's MLPs (ours)"

    def __init__(
        self,
        encoder: VisionSpec = VisionSpec(),
        language: LanguageSpec = LanguageSpec(),
        prefix: PrefixSpec = PrefixSpec(),
        mixture: Literal["adapters", "ffn"] = "adapters",
        adapters: LanguageAdapterSpec = LanguageAdapterSpec(),
        moe: MoESpec = MoESpec(experts=4, k=2),
        every: int = 2,
        noise: float = 0.0,
        cluster_energy: float = 0.0,
        generation: GenerationSpec = GenerationSpec(),
        optimizer: OptimizerSpec = OptimizerSpec(betas=(0.9, 0.95)),
        regularizer: RegularizerSpec = RegularizerSpec(),
        lr: float = 8e-4,
        weight_decay: float = 0.0,
        encoder_lr: float = 2e-6,
    ) -> None:
        super().__init__(optimizer, regularizer)
        _check(mixture, adapters, moe, every, noise, cluster_energy, language.dtype)
        self.lr, self.weight_decay, self.encoder_lr, self.generation = lr, weight_decay, encoder_lr, generation
        self.moe, self.noise, self.cluster_energy = moe, noise, cluster_energy
        self._parted: dict[str, Tensor] = {}  # the mixtures as clusters made them
        self.untouched = not encoder_lr
        self.cacheable = "tokens" if self.untouched else ""
        self.vision = build_vision(encoder)
        self.language = LanguageModel(language)
        self.prefix = ImagePrefix(self.encoder.embed_dim, self.language.width, prefix)
        positions = self.prefix.positions(self.encoder.grid_size)
        self.language.check_length(positions, generation)
        self.token_ids = PrefixTokenIds(self.language.vocabulary, positions)
        # Until a run's captions are there to be counted; a checkpoint brings the table that it was trained with.
        unknown = torch.ones(self.token_ids.rows)
        if mixture == "adapters":
            self.token_ids.watch(self.language.model.get_input_embeddings())
            width, numbers = self.language.hidden_size, count()
            self.mixtures: LanguageAdapters | UpcycledMLPs = LanguageAdapters(
                self.language.blocks, width, adapters, lambda _: self._mixture(width, adapters, unknown, next(numbers))
            )
        else:
            chosen = choose_blocks(len(self.language.blocks), every)
            self.mixtures = UpcycledMLPs(
                self.language,
                chosen,
                moe,
                noise=0.0 if cluster_energy else noise,  # clusters are made of the dense MLP: noise comes after them
                token_ids=self.token_ids,
                frequencies=unknown,
            )
        self.token_ids.follow(self.language.model)
        self._attach()

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder."""
        return self.vision

    @property
    def plan(self) -> TrainPlan:
        """Map, experts and routers train, and the encoder unless it is frozen; the language model never does."""
        encoder = [Freeze("vision.*pos_embed", optional=True), Train("vision.*", self.encoder_lr, self.weight_decay)]
        return TrainPlan(
            [
                Train("mixtures.*", self.lr, self.weight_decay),
                Train("prefix.*", self.lr, self.weight_decay),
                *([Freeze("vision.*")] if self.untouched else encoder),
                Freeze("language.*"),
            ]
        )

    @property
    def bases(self) -> dict[str, dict[str, str]]:
        """The vision encoder and the language model."""
        return {**super().bases, "language": self.language.base}

    def setup(self, stage: str) -> None:
        """Follow the plan; make the balanced hash, or clusters, of the run's captions. A checkpoint has its own."""
        if self._trainer is not None and hasattr(self._trainer.datamodule, "captions"):
            self.count_words(chain.from_iterable(self._trainer.datamodule.captions))
            self.part_experts(chain.from_iterable(self._trainer.datamodule.captions))
        elif self._trainer is not None and self.cluster_energy and not self._parted:
            raise WlsupError("cluster_energy makes clusters of the data module's captions, and this one has none.")
        super().setup(stage)

    def count_words(self, captions: Iterator[str]) -> None:
        """Make the balanced hash's tables of how often each id occurs; with other routers, do nothing.

        Args:
            captions: of the training pairs.
        """
        routers = [module for module in self.modules() if isinstance(module, HashRouter)]
        if self.moe.hash != "balanced" or not routers:
            return
        tokenizer = self.language.tokenizer
        frequencies = token_frequencies((tokenizer([caption]).ids[0] for caption in captions), self.token_ids)
        table = balanced_table(frequencies, self.moe.experts, self.moe.k, self.moe.hash_seed)
        for router in routers:
            router.table.copy_(table)

    def part_experts(self, captions: Iterator[str]) -> None:
        """Make the copies differ, each for its own cluster of what its MLP reads.

        Without `cluster_energy`, and where it has been done or a checkpoint was loaded, this does nothing.

        Args:
            captions: of the training pairs; the first of them are read, until there are tokens enough.
        """
        if not self.cluster_energy or self._parted:
            return
        spec = ClusterSpec(energy=self.cluster_energy)
        texts = (self.language.tokenizer(some) for some in iter(lambda: list(islice(captions, 64)), []))
        with self._without():
            batches = ((text.ids, text.mask) for text in texts)
            read = activations(self.language, self.mixtures.blocks, batches, spec.tokens)
        for layer, (name, inputs) in zip(self.mixtures.layers.values(), read.items(), strict=True):
            report = specialise(layer, inputs, spec)
            _log.info("magma_moe: experts of %s by clusters, relative error %.3f on captions", name, report.error)
        add_noise((expert for layer in self.mixtures.layers.values() for expert in layer.experts), self.noise)
        self._parted = {name: tensor.detach().cpu().clone() for name, tensor in self.mixtures.named_parameters()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the experts and routers that training started from, where clusters made them: a seed does not."""
        super().on_save_checkpoint(checkpoint)
        if self._parted:
            checkpoint["wlsup"]["clusters"] = dict(self._parted)

    @torch.no_grad()
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Start where the run started, whatever this machine's clusters would be."""
        super().on_load_checkpoint(checkpoint)
        self._parted = checkpoint["wlsup"].get("clusters", self._parted)
        for name, tensor in self._parted.items():
            if f"mixtures.{name}" in self.start.tensors:
                self.start.tensors[f"mixtures.{name}"].copy_(tensor)
            if not has_shards(self.mixtures):  # whose tensors, which come next, are laid out otherwise
                self.mixtures.get_parameter(name).copy_(tensor)

    @property
    def shardable(self) -> list[nn.Module]:
        """The language model's blocks, and the mixtures."""
        return [*self.language.blocks, *(module for module in self.mixtures.modules() if isinstance(module, MoE))]

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Captioning behind the mapped picture, and what keeps the routers in order."""
        captions = self.language.tokenizer(batch.captions, device=batch.images.device)
        loss = prefix_captioning_loss(self.language, self._front(self.encode(batch)), captions)
        order = auxiliary_losses(self.mixtures)
        return {"loss": sum(order.values(), start=loss), "captioning": loss, **order}

    def after_step(self) -> None:
        """Move the balancing biases after each optimizer step, unless that was skipped."""
        super().after_step()
        update_biases(self, skipped=all(parameter.grad is None for parameter in self.mixtures.parameters()))

    @property
    def start_in_checkpoint(self) -> bool:
        """Whether the weights of step 0 were made of the run's captions, by clusters, and lie in its checkpoint."""
        return bool(self.cluster_energy)

    def kept(self, images: Tensor) -> VisionOutput:
        """(B, 3, H, W) of the encoder's size -> what a cache keeps of them: no more tokens than the map reads."""
        return self.prefix.reduced(self.encoder(images), self.encoder.grid_size)

    @torch.no_grad()
    def caption(self, images: Tensor, generation: GenerationSpec | None = None) -> list[str]:
        """(B, 3, H, W) -> B captions; put the model in eval mode yourself.

        Raises:
            WlsupError: hash routing, which has a row for each picture position, and pictures of another size.
        """
        side = self.encoder.patch_size
        front = self.prefix(self.encoder(images), (images.shape[-2] // side, images.shape[-1] // side))
        if self.moe.router == "hash" and front.shape[1] != self.token_ids.positions:
            raise WlsupError(
                f"Hash routing knows the {self.token_ids.positions} picture positions of the training pictures, not "
                f"{front.shape[1]}: give pictures of {self.image_spec.size} pixels."
            )
        return self.language.generate(front, generation or self.generation)

    def measure(self, datamodule: Any) -> dict[str, Any]:
        """Measure the loss of held-out captions: with their pictures, with others', and without the mixtures.

        Args:
            datamodule: of the run; its held-out pairs are what is measured on.

        Returns:
            See `Approach.measure`; with "captions", a few generated ones. Nothing where no pairs are held out.
        """
        held_out = [batch.to(self.device) for batch in datamodule.val_dataloader()]
        return captioner_task(
            self.name, self.language, self.encode, self._front, held_out, self.generation, self._without
        )

    def _front(self, seen: VisionOutput) -> Tensor:
        return self.prefix(seen, self.encoder.grid_size)

    def _mixture(self, width: int, adapters: LanguageAdapterSpec, frequencies: Tensor, number: int) -> MoE:
        hidden = width // (adapters.factor * self.moe.k)
        if not hidden:
            raise WlsupError(
                f"adapters.factor={adapters.factor} and moe.k={self.moe.k} leave no channel of the language model's "
                f"{width} for an expert. Lower one of them."
            )
        experts: list[nn.Module] = [
            LanguageBottleneck(width, hidden, adapters.layer_norm, adapters.init) for _ in range(self.moe.experts)
        ]
        return MoE(experts, width, self.moe, True, self.token_ids.rows, frequencies, self.token_ids, number)

    def _attach(self) -> None:
        upcycled = isinstance(self.mixtures, UpcycledMLPs)
        self.mixtures.attach(self.language if upcycled else self.language.blocks)

    @contextmanager
    def _without(self) -> Iterator[None]:
        """Let what runs meanwhile see the pretrained language model."""
        self.mixtures.detach()
        try:
            yield
        finally:
            self._attach()


def _check(
    mixture: str, adapters: LanguageAdapterSpec, moe: MoESpec, every: int, noise: float, energy: float, dtype: str
) -> None:
    """Refuse, before weights are read, what cannot be or would do nothing."""
    choose("mixture", mixture, ("adapters", "ffn"))
    moe.check_causal()
    if mixture == "ffn" and adapters != LanguageAdapterSpec():
        raise WlsupError("mixture: ffn has no adapters: leave out what is set under model.adapters.")
    if mixture == "ffn" and (why := change_of_function(moe)):
        raise WlsupError(f"mixture: ffn would not begin as the pretrained language model: {why}.")
    if mixture == "ffn" and dtype != "float32":  # copies of its MLPs would train in half precision, without masters
        raise WlsupError(f"mixture: ffn trains copies of the language model's MLPs: leave out language.dtype: {dtype}.")
    if mixture == "adapters" and (every != 2 or noise or energy):
        raise WlsupError(
            "every, noise and cluster_energy are of mixture: ffn; with adapters there is a mixture in every block."
        )
    if noise < 0:
        raise WlsupError(f"noise is a standard deviation, 0 or more, not {noise:g}.")
    if not 0 <= energy <= 1:
        raise WlsupError(f"cluster_energy is a share of energy, between 0 (no clusters) and 1; given was {energy:g}.")
    if energy and moe.router == "hash":
        raise WlsupError("Clusters set the router's weights, which hash routing does not have: leave one of them out.")
