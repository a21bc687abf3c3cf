"""The masked autoencoder over the same encoder that everything else uses.

Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners" (FAIR's ``models_mae.py``).
Shapes: B samples, N patches, K = int(N * (1 - mask_ratio)) of them kept, P prefix tokens, D encoder width, W decoder
width, p the patch size in pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from wlsup.batch import Condition, VisionOutput
from wlsup.errors import WlsupError
from wlsup.models.backbones import check_fit
from wlsup.models.mae_decoder import DecoderSpec, MAEDecoder, sincos_position_embedding
from wlsup.models.masking import random_masking
from wlsup.models.saving import export_transformers, save_mae
from wlsup.models.sources import Source, VisionSpec, open_source
from wlsup.models.vision import VisionEncoder, encoder_from
from wlsup.models.weights import tensors_sha256

__all__ = [
    "DecoderSpec",
    "MAEDecoder",
    "MAEOutput",
    "MaskedAutoencoder",
    "build_mae",
    "export_transformers",
    "random_masking",
    "save_mae",
    "sincos_position_embedding",
]


@dataclass
class MAEOutput:
    """What a masked autoencoder returns.

    Args:
        prediction: (B, N, p * p * 3) pixels of every patch, in `patchify`'s order; zeros at kept patches when only the
            removed ones were asked for.
        mask: (B, N) fp32, 1 where the patch was removed.
        latent: the encoder's output over the kept patches, in the order of ``ids_keep``.
        ids_keep: (B, K) indices of the kept patches.
        ids_restore: (B, N) place of each patch in the shuffled order, kept ones first.
    """

    prediction: Tensor
    mask: Tensor
    latent: VisionOutput
    ids_keep: Tensor
    ids_restore: Tensor


class MaskedAutoencoder(nn.Module):
    """An encoder and a decoder that reconstructs what the encoder did not see.

    Adapters attached to ``encoder`` work inside it as they do alone.

    Parameter counts are FAIR's, ViT-B/L/H: 111,907,840, 329,541,888 and 657,074,508 in all, of which both fixed
    sine-cosine position embeddings do not train: `build_mae` switches their gradients off (in a bare timm model the
    encoder's position embedding counts as trainable).

    Args:
        encoder: the vision encoder.
        decoder: the decoder.
        spec: the decoder's effective shape and target.
        decoder_pretrained: whether the decoder's weights came with the checkpoint.
    """

    def __init__(
        self, encoder: VisionEncoder, decoder: MAEDecoder, spec: DecoderSpec, decoder_pretrained: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.decoder_spec = spec
        self.decoder_pretrained = decoder_pretrained
        if spec.warmup_batches:
            decoder.register_buffer("warmed", torch.tensor(0))  # beside its weights, so that a checkpoint holds it

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.encoder.patch_size

    @property
    def normalize_pixels(self) -> bool:
        """Whether the decoder predicts pixels normalised patch by patch."""
        return self.decoder_spec.normalize_pixels

    def forward(
        self,
        images: Tensor,
        condition: Condition | None = None,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        predict_kept: bool = True,
        warming: Tensor | None = None,
    ) -> MAEOutput:
        """Remove patches, encode the rest, predict all.

        Args:
            images: (B, 3, H, W), normalised.
            condition: what the encoder's conditioned adapters may look at; None: the null condition.
            mask_ratio: share of patches removed, in [0, 1).
            noise: (B, N) deciding which, for an exact replay; None: drawn.
            predict_kept: False leaves the predictions of kept patches zero. The loss does not look at them, and is the
                same with the same gradients, a few percent sooner.
            warming: what `warming_up` said of this batch; True keeps the decoder's gradient from the encoder.

        Returns:
            prediction (B, N, p * p * 3), mask (B, N), latent, and the indices.

        Raises:
            WlsupError: a ratio out of range, or shapes that do not fit.
        """
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        count = grid[0] * grid[1]
        ids_keep, ids_restore, mask = random_masking(images.shape[0], count, mask_ratio, noise, device=images.device)
        latent = self.encoder(images, condition, ids_keep)
        # the encoder's gradient is then zero, not absent
        tokens = latent.tokens if warming is None else torch.where(warming, latent.tokens.detach(), latent.tokens)
        if predict_kept:
            prediction = self.decoder(tokens, ids_keep, count, grid)
        else:
            removed = ids_restore.argsort(dim=1)[:, ids_keep.shape[1] :]
            some = self.decoder(tokens, ids_keep, count, grid, removed)
            length = some.shape[-1]
            index = removed[..., None].expand(-1, -1, length)
            prediction = some.new_zeros(len(images), count, length).scatter(1, index, some)
        return MAEOutput(prediction, mask, latent, ids_keep, ids_restore)

    def decoder_lr(self, pretrained: float, fresh: float) -> float:
        """Choose the decoder's learning rate: a fresh one learns as fast as what else is fresh."""
        return pretrained if self.decoder_pretrained else fresh

    def warming_up(self) -> Tensor | None:
        """Count a training batch of a fresh decoder; return, as a scalar, whether it still warms up (None: never)."""
        # its positions never train, so that the decoder as a whole is always in eval mode
        if not self.decoder_spec.warmup_batches or not self.decoder.pred.training or not torch.is_grad_enabled():
            return None
        warming = self.decoder.warmed < self.decoder_spec.warmup_batches
        self.decoder.warmed += 1
        return warming

    @torch.no_grad()
    def initialize(self, encoder: bool = True) -> None:
        """Draw fresh weights as FAIR does; the decoder's always, the encoder's if asked.

        Source: He et al. 2022, appendix A.1; ``models_mae.py`` ``initialize_weights``.

        Args:
            encoder: also draw the encoder's weights, and set its positions to the fixed sine-cosine ones.
        """
        _initialize_linear(self.decoder)
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        if not encoder:
            return
        backbone = self.encoder.backbone
        _initialize_linear(backbone)
        nn.init.xavier_uniform_(backbone.patch_embed.proj.weight.flatten(1))
        for token in (backbone.cls_token, backbone.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if backbone.pos_embed is not None:
            skip = 0 if getattr(backbone, "no_embed_class", False) else self.encoder.num_prefix_tokens
            positions = sincos_position_embedding(self.encoder.embed_dim, self.encoder.grid_size, skip)
            backbone.pos_embed.copy_(positions)
        self.encoder.base_sha256 = tensors_sha256(backbone.state_dict())


def build_mae(spec: VisionSpec, decoder: DecoderSpec | None = None) -> MaskedAutoencoder:
    """Build a masked autoencoder over the encoder that ``spec`` names.

    Checkpoints may be FAIR's (encoder only, or with the decoder), Hugging Face's ViTMAEModel and
    ViTMAEForPreTraining, wlsup's own, or any encoder. Where there is no decoder it begins fresh and
    ``decoder_pretrained`` is False; `DecoderSpec.warmup_batches` warms it up with the encoder left alone.

    Args:
        spec: the encoder.
        decoder: the decoder's shape and target; None: `DecoderSpec`'s defaults.

    Returns:
        The autoencoder; both position embeddings do not require gradients, as in FAIR's code.

    Raises:
        WlsupError: as `build_vision`, or a decoder that does not fit the encoder.
    """
    wanted = decoder or DecoderSpec()
    source = open_source(spec)
    found = source.decoder if wanted.pretrained else {}
    # Without weights, "the same architecture" still means the decoder that the configuration describes.
    described = wanted.pretrained and not source.pretrained and "width" in source.decoder_config
    effective = _effective_spec(wanted, source) if found or described else wanted
    if found or not source.pretrained:
        effective = replace(effective, warmup_batches=0)  # it knows something, or the encoder knows as little
    encoder = encoder_from(source)
    mae = MaskedAutoencoder(encoder, _make_decoder(encoder, effective, source), effective, bool(found))
    mae.initialize(encoder=not source.pretrained)
    if found:
        _load_decoder(mae.decoder, found, source.name)
    if encoder.backbone.pos_embed is not None:
        encoder.backbone.pos_embed.requires_grad_(False)
    return mae


def _initialize_linear(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def _effective_spec(wanted: DecoderSpec, source: Source) -> DecoderSpec:
    """Take the checkpoint's decoder's shape, and what its configuration says, over what was wanted."""
    tensors, config = source.decoder, source.decoder_config
    said = {name: config[name] for name in asdict(wanted) if name in config}
    effective = replace(wanted, **said)
    if not tensors:
        return effective
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=-1)
    projection, fc1 = tensors.get("embed.weight"), tensors.get("blocks.0.mlp.fc1.weight")
    if depth == 0 or projection is None or fc1 is None:
        raise WlsupError(
            f"{source.name} has an incomplete decoder; set the decoder's `pretrained` to false for a fresh one."
        )
    width = projection.shape[0]
    return replace(effective, width=width, depth=depth, mlp_ratio=fc1.shape[0] / width)


def _make_decoder(encoder: VisionEncoder, spec: DecoderSpec, source: Source) -> MAEDecoder:
    return MAEDecoder(
        embed_dim=encoder.embed_dim,
        patch_size=encoder.patch_size,
        grid_size=encoder.grid_size,
        spec=spec,
        num_prefix_tokens=encoder.num_prefix_tokens,
        in_chans=encoder.backbone.patch_embed.proj.in_channels,
        norm_eps=source.decoder_config.get("norm_eps", 1e-6),
    )


def _load_decoder(decoder: MAEDecoder, tensors: dict[str, Tensor], source: str) -> None:
    given = dict(tensors)
    positions = given.get("pos_embed")
    if positions is not None and positions.shape[1] != decoder.pos_embed.shape[1]:
        given["pos_embed"] = resample_abs_pos_embed(
            positions, new_size=list(decoder.grid_size), num_prefix_tokens=decoder.num_prefix_tokens
        )
    check_fit(
        decoder.state_dict(), given, f"The decoder of {source}", f"MAE decoder of width {decoder.norm.weight.numel()}"
    )
    decoder.load_state_dict(given)
