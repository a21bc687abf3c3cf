"""Masked reconstruction told by the caption, contrast without it: the objective of MAE + contrastive language.

The image tower must never see the caption it is matched to. Were image i encoded under caption i and then matched to
caption i, the loss would fall to zero with no image-text learning at all, by passing the caption through. So captions
condition the reconstruction branch, and the contrastive branch runs under the null condition: the state in which
evaluation runs the encoder too, whose null embedding it therefore trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from wlsup.batch import CaptionBatch, Condition
from wlsup.errors import WlsupError
from wlsup.models.heads import ContrastiveHead
from wlsup.models.mae import DecoderSpec, MaskedAutoencoder, build_mae
from wlsup.models.masking import masking_noise, random_masking
from wlsup.models.text import TextEncoder, TextSpec
from wlsup.models.vision import VisionSpec
from wlsup.objectives.contrastive import info_nce, siglip
from wlsup.objectives.micro_batches import in_micro_batches
from wlsup.objectives.reconstruction import reconstruction_loss

__all__ = ["ObjectiveSpec", "build_towers", "contrast", "image_embedding", "pair_embeddings", "two_branch_losses"]


@dataclass(frozen=True)
class ObjectiveSpec:
    """Which losses, how much of each, and what each branch sees.

    Args:
        contrastive: "infonce" (CLIP) or "siglip".
        contrastive_weight: factor of the contrastive loss; 0 leaves out the branch, retrieval and zero-shot.
        reconstruction_weight: factor of the masked reconstruction loss; 0 leaves the branch out.
        mask_ratio: share of the patches that the reconstruction branch does not see, in [0, 1).
        caption_dropout: probability with which the reconstruction branch runs a sample under the null condition.
        contrastive_view: "full" pictures, or "masked" ones at ``mask_ratio`` (FLIP, Li et al. 2023: cheaper).
        projection_width: channels of the shared image-text space.
        micro_batch: encode so many pictures at a time, in their memory, for the same loss over the whole batch, by a
            second forward pass (see `wlsup.objectives.micro_batches`); None: all at once.

    Raises:
        WlsupError: a value out of its range, a null condition that nothing trains, or an option that no branch reads.
    """

    contrastive: Literal["infonce", "siglip"] = "infonce"
    contrastive_weight: float = 1.0
    reconstruction_weight: float = 1.0
    mask_ratio: float = 0.75
    caption_dropout: float = 0.5
    contrastive_view: Literal["full", "masked"] = "full"
    projection_width: int = 128
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise WlsupError(f"mask_ratio must be in [0, 1), not {self.mask_ratio}.")
        if not 0 <= self.caption_dropout <= 1:
            raise WlsupError(f"caption_dropout must be in [0, 1], not {self.caption_dropout}.")
        if min(self.contrastive_weight, self.reconstruction_weight) < 0 or not (
            self.contrastive_weight or self.reconstruction_weight
        ):
            raise WlsupError("contrastive_weight and reconstruction_weight must be >= 0, and not both 0.")
        if not self.contrastive_weight and not self.caption_dropout:
            raise WlsupError(
                "contrastive_weight and caption_dropout are both 0: the null condition, under which the encoder is "
                "evaluated and used, would never be trained."
            )
        if self.micro_batch is not None and self.micro_batch < 1:
            raise WlsupError(f"micro_batch must be at least 1, or none, not {self.micro_batch}.")
        if not self.reconstruction_weight:
            self.refuse("caption_dropout", because="with reconstruction_weight 0 no caption is told")
            if self.contrastive_view == "full":
                self.refuse("mask_ratio", because="with reconstruction_weight 0 and the full view nothing is masked")

    def refuse(self, *options: str, because: str) -> None:
        """Refuse options that an approach does not read and that are set.

        Raises:
            WlsupError: one of them is not its default.
        """
        for option in options:
            if getattr(self, option) != getattr(ObjectiveSpec, option):
                raise WlsupError(f"{because}: leave objective.{option} out.")


def build_towers(
    encoder: VisionSpec, decoder: DecoderSpec, text: TextSpec, spec: ObjectiveSpec
) -> tuple[MaskedAutoencoder, TextEncoder, ContrastiveHead]:
    """Build what both branches need: a masked autoencoder, a frozen text encoder, and projections between them.

    Args:
        encoder: the pretrained vision encoder.
        decoder: MAE's decoder, where the encoder's weights bring none.
        text: the text encoder.
        spec: width of the shared space, and whose initial scale and bias to take.

    Returns:
        The three.

    Raises:
        WlsupError: weights that are lacking or do not fit.
    """
    mae, captions = build_mae(encoder, decoder), TextEncoder(text)
    head = ContrastiveHead(mae.encoder.embed_dim, captions.width, spec.projection_width, spec.contrastive)
    return mae, captions, head


def image_embedding(mae: MaskedAutoencoder, head: ContrastiveHead, images: Tensor, spec: ObjectiveSpec) -> Tensor:
    """Encode pictures for the contrastive branch: under the null condition, never under their own caption.

    Args:
        mae: holds the encoder.
        head: its image projection is applied; in train mode a masked view is one.
        images: (B, 3, H, W).
        spec: says whether the branch sees the full picture or a masked one.

    Returns:
        (B, projection_width), of unit length.
    """
    keep = None
    if spec.contrastive_view == "masked" and head.training:  # the encoder may be frozen
        patches = (images.shape[-2] // mae.patch_size) * (images.shape[-1] // mae.patch_size)
        keep, _, _ = random_masking(len(images), patches, spec.mask_ratio, device=images.device)

    def encode(rows: slice) -> Tensor:
        ids = None if keep is None else keep[rows]
        return head.embed_images(mae.encoder(images[rows], condition=None, ids_keep=ids).pooled)

    return in_micro_batches(encode, len(images), spec.micro_batch)


def pair_embeddings(
    mae: MaskedAutoencoder, head: ContrastiveHead, text: TextEncoder, batch: CaptionBatch, spec: ObjectiveSpec
) -> tuple[Tensor, Tensor] | None:
    """Embed pictures, by `image_embedding`, and captions in the space in which retrieval compares them.

    Args:
        mae: holds the encoder.
        head: both projections.
        text: the text encoder.
        batch: B pairs.
        spec: says whether the space is learned, and what the branch sees.

    Returns:
        (B, projection_width) of pictures and of captions, of unit length; None where the contrastive loss has no
        weight, so that the projections are as they were drawn.
    """
    if not spec.contrastive_weight:
        return None
    return image_embedding(mae, head, batch.images, spec), head.embed_captions(text(batch.captions).pooled)


def contrast(
    head: ContrastiveHead, image: Tensor, text: Tensor, spec: ObjectiveSpec, keys: Sequence[str] | None = None
) -> Tensor:
    """Return the contrastive loss that ``spec`` names, unweighted.

    Args:
        head: its logit scale and bias.
        image: (B, projection_width), of unit length.
        text: likewise; ``text[i]`` belongs to ``image[i]``.
        spec: which loss.
        keys: B names of the pictures; pairs of one picture are not each other's negatives.
    """
    if spec.contrastive == "siglip":
        return siglip(image, text, head.logit_scale, head.logit_bias, keys=keys)
    return info_nce(image, text, head.logit_scale, keys=keys)


def two_branch_losses(
    mae: MaskedAutoencoder,
    head: ContrastiveHead,
    images: Tensor,
    captions: Condition,
    spec: ObjectiveSpec,
    keys: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return the losses of one batch.

    Args:
        mae: encoder and decoder; adapters may be attached to the encoder.
        head: projections and logit scale of the contrastive branch.
        images: (B, 3, H, W), normalised.
        captions: the encoded captions, ``captions.pooled[i]`` of ``images[i]``.
        spec: weights and views.
        keys: B names of the pictures; pairs of one picture are not each other's negatives.

    Returns:
        "loss", the weighted sum, and each part unweighted: "reconstruction", "contrastive".
    """
    losses: dict[str, Tensor] = {}
    total = images.new_zeros((), dtype=torch.float32)
    if spec.reconstruction_weight:
        losses["reconstruction"] = _reconstruction(mae, images, captions.drop(spec.caption_dropout), spec)
        total = total + spec.reconstruction_weight * losses["reconstruction"]
    if spec.contrastive_weight:
        image = image_embedding(mae, head, images, spec)
        text = head.embed_captions(captions.pooled)
        losses["contrastive"] = contrast(head, image, text, spec, keys)
        total = total + spec.contrastive_weight * losses["contrastive"]
    losses["loss"] = total
    return losses


def _reconstruction(mae: MaskedAutoencoder, images: Tensor, told: Condition, spec: ObjectiveSpec) -> Tensor:
    patches = (images.shape[-2] // mae.patch_size) * (images.shape[-1] // mae.patch_size)
    noise = masking_noise(len(images), patches, device=images.device)
    warming = mae.warming_up()

    def share(rows: slice) -> Tensor:
        """Return the rows' share of the loss, (1,): of every picture as many patches are removed."""
        own = images[rows]
        output = mae(own, told[rows], spec.mask_ratio, noise[rows], predict_kept=False, warming=warming)
        loss = reconstruction_loss(output.prediction, own, output.mask, mae.patch_size, mae.normalize_pixels)
        return (loss * (len(own) / len(images)))[None]

    return in_micro_batches(share, len(images), spec.micro_batch).sum()
