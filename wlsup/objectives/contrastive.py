"""InfoNCE (CLIP) and the sigmoid loss (SigLIP), exact, in tiles, over one rank or many.

The B x B logits are never kept: one tile of them exists at a time. The gradients are formed from tiles in the forward
pass too, and all of the arithmetic is done in fp32 (in fp64 for fp64 input), whatever autocast says.

**Over ranks.** Rank k holds b_k pairs (the b_k may differ), B in all. It computes the rows of the logits that belong to
its own images, against all B texts: the work is divided evenly and nothing is computed twice. The columns' normalisers
are combined by an all-reduce of B numbers, the texts' gradients by a reduce-scatter. Each rank returns the loss of the
*global* batch, divided by the global B: the number that a single process would compute on the B pairs. Each rank's
gradients are W times its rows' share of that loss's gradient, so that the *mean* over ranks which
DistributedDataParallel takes is exactly the single process's gradient. That holds for ``logit_scale`` and
``logit_bias`` too. All collectives run in forward, backward only scales; all ranks must multiply the loss by the same
factor. With ``gather=False`` each rank is on its own: fewer negatives, another loss.

Shapes: W ranks, B pairs in all, b of them on this rank, D channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from wlsup.errors import WlsupError
from wlsup.objectives.contrastive_tiles import Needs, Strip, StripResult, info_nce_strip, siglip_strip
from wlsup.objectives.distributed import Ranks, meet

__all__ = [
    "CLIP_LOGIT_SCALE",
    "LOGIT_SCALE_MAX",
    "SIGLIP_LOGIT_BIAS",
    "SIGLIP_LOGIT_SCALE",
    "clamp_logit_scale_",
    "clamp_logit_scales_",
    "info_nce",
    "siglip",
]

CLIP_LOGIT_SCALE = math.log(1 / 0.07)
"""Where CLIP starts ``logit_scale`` (Radford et al. 2021, section 2.5)."""
LOGIT_SCALE_MAX = math.log(100.0)
"""CLIP clips ``logit_scale`` so that logits are not multiplied by more than 100 (Radford et al. 2021, section 2.5)."""
SIGLIP_LOGIT_SCALE = math.log(10.0)
"""Where SigLIP starts ``logit_scale``, t' = log 10 (Zhai et al. 2023, section 3.2)."""
SIGLIP_LOGIT_BIAS = -10.0
"""Where SigLIP starts ``logit_bias``: nearly all pairs are negatives, which from 0 the first steps would only learn."""

# Above this somebody passed exp(logit_scale), which starts at 14.3 (CLIP) or 10 (SigLIP); published models end below 5.
_IMPLAUSIBLE_LOG = 9.0
_TILES = {"cpu": 512, "cuda": 4096}


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    tile: int | None = None,
    group: dist.ProcessGroup | None = None,
    gather: bool = True,
    keys: Sequence[str] | Tensor | None = None,
) -> Tensor:
    """Match each image to its own text among all texts, and each text to its image.

    Source: Radford et al. 2021 (CLIP), figure 3. With s_ij = exp(logit_scale) <x_i, y_j>, the mean of two cross
    entropies: L = 1/(2B) sum_i [logsumexp_j s_ij + logsumexp_j s_ji - 2 s_ii]. About ln B where nothing is learned yet.

    Args:
        image: (b, D) image embeddings of unit length, fp16, bf16, fp32 or fp64.
        text: (b, D) text embeddings of unit length; ``text[i]`` belongs to ``image[i]``.
        logit_scale: scalar, the *logarithm* of the factor: the learned parameter as it is. See `clamp_logit_scale_`.
        tile: side of the square tiles of logits. Memory beside the gradients is two tiles. None is 512 on a CPU, the
            fastest of those measured on a core, and 4,096 on a GPU: a batch of some thousands is then one tile, and
            as few kernels as there can be.
        group: ranks to gather over; None is the default process group, if one is initialised with more than one rank.
        gather: False keeps to this rank's pairs.
        keys: b names (or whole numbers) of the images. Two pairs of one key (two captions of one image) are not each
            other's negatives: their logits are left out of both sums. None treats all pairs as distinct.

    Returns:
        The loss of the global batch, a scalar, the same on all ranks (see the module's text for gradients over ranks).

    Raises:
        WlsupError: shapes, dtypes or keys do not fit, or the ranks disagree on them. It is raised on all ranks: none is
            left waiting for the others.
    """
    return _loss(info_nce_strip, 2, image, text, logit_scale, None, tile, group, gather, keys)


def siglip(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    tile: int | None = None,
    group: dist.ProcessGroup | None = None,
    gather: bool = True,
    keys: Sequence[str] | Tensor | None = None,
) -> Tensor:
    """Decide for each image and each text whether they belong together.

    Source: Zhai et al. 2023 (SigLIP), equation 1 and algorithm 1: with z_ii = 1 and z_ij = -1 otherwise,
    L = -1/B sum_ij log sigmoid(z_ij (exp(logit_scale) <x_i, y_j> + logit_bias)). The sum is over all B x B pairs and is
    divided by B, not B^2. About 10 at the paper's initial values.

    Args:
        image: (b, D) image embeddings of unit length, fp16, bf16, fp32 or fp64.
        text: (b, D) text embeddings of unit length; ``text[i]`` belongs to ``image[i]``.
        logit_scale: scalar, the *logarithm* of the factor (the paper's t').
        logit_bias: scalar, the paper's b.
        tile: side of the square tiles of logits; None as for `info_nce`.
        group: ranks to gather over; None is the default process group, if one is initialised with more than one rank.
        gather: False keeps to this rank's pairs.
        keys: b names (or whole numbers) of the images; the terms of two different pairs of one key are left out.

    Returns:
        The loss of the global batch, a scalar, the same on all ranks (see the module's text for gradients over ranks).

    Raises:
        WlsupError: as `info_nce`.
    """
    return _loss(siglip_strip, 1, image, text, logit_scale, logit_bias, tile, group, gather, keys)


@torch.no_grad()
def clamp_logit_scale_(logit_scale: Tensor, maximum: float = LOGIT_SCALE_MAX) -> Tensor:
    """Clamp ``logit_scale`` to [0, maximum] in place; to be called *after* each optimizer step.

    Clamping in the forward pass instead would give the parameter a zero gradient at the bound and no way back.

    Source: Radford et al. 2021 (CLIP), section 2.5; 0 as the lower bound is the original training's practice.

    Args:
        logit_scale: the parameter, logarithm of the factor.
        maximum: upper bound, ln 100 in CLIP.
    """
    return logit_scale.clamp_(0.0, maximum)


def clamp_logit_scales_(module: torch.nn.Module) -> None:
    """Clamp every parameter of ``module`` that is named ``logit_scale``, by `clamp_logit_scale_`."""
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] == "logit_scale":
            clamp_logit_scale_(parameter)


class _WithGradients(torch.autograd.Function):
    """Hand out a loss whose gradients are known already; backward scales them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.forms = [None if x is None else (x.shape, x.dtype) for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        # The scaling comes before the cast: under fp16 and a loss scaler, small gradients survive it.
        return (
            None,
            None,
            *(
                None if g is None else (g * incoming).reshape(form[0]).to(form[1])
                for g, form in zip(ctx.saved_tensors, ctx.forms, strict=True)
            ),
        )


def _loss(
    strip_loss: Callable[[Strip, Ranks, Needs], StripResult],
    terms: int,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    tile: int | None,
    group: dist.ProcessGroup | None,
    gather: bool,
    keys: Sequence[str] | Tensor | None,
) -> Tensor:
    """Return the mean over the global batch of a loss that has ``terms`` terms a pair, with its gradients attached."""
    inputs = (image, text, logit_scale, logit_bias)
    tile = _TILES.get(image.device.type, 512) if tile is None else tile
    problem = _problem(*inputs, keys, tile, sigmoid=strip_loss is siglip_strip)
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    if gather:
        facts = [("loss (2 InfoNCE, 1 SigLIP)", terms), ("use of keys (1 given, 0 not)", int(keys is not None))]
        ranks, granted = meet(image, group=group, problem=problem, facts=facts, wishes=wants)
    elif problem:
        raise WlsupError(problem)
    else:
        ranks, granted = Ranks((image.shape[0],)), tuple(wants)
    if not ranks.total:
        raise WlsupError("The contrastive loss got an empty batch on every rank; it needs at least one pair.")
    need = Needs(wants[0], granted[1], wants[2], wants[3])
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        wide = torch.float64 if torch.float64 in (image.dtype, text.dtype) else torch.float32
        strip = Strip(
            image=image.detach().to(wide),
            text=ranks.gather(text.detach()).to(wide),
            scale=math.exp(float(logit_scale)),
            bias=0.0 if logit_bias is None else float(logit_bias),
            keys=None if keys is None else _shared_keys(keys, image.device, ranks),
            offset=ranks.offset,
            tile=tile,
        )
        loss, *gradients = _global(strip_loss(strip, ranks, need), strip, ranks, need, terms)
    return _WithGradients.apply(loss, gradients, *inputs) if any(wants) else loss


def _global(
    part: StripResult, strip: Strip, ranks: Ranks, need: Needs, terms: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the global loss and this rank's gradients (times W) by image, text, logit_scale and logit_bias."""
    # DistributedDataParallel's mean over ranks turns W times each share into the sum of the shares.
    share = ranks.world / (terms * ranks.total)
    d_image = None if part.d_image is None else part.d_image.mul_(share * strip.scale)
    d_text = None if part.d_text is None else part.d_text.mul_(share)
    d_bias = None if part.d_bias is None else part.d_bias * share
    d_scale = None
    if need.scale:
        # s_ij - bias is exp(logit_scale) <x_i, y_j>: sum_ij G_ij (s_ij - bias) is <d_image, image>, and <d_text, text>.
        d_scale = (d_image * strip.image).sum() if d_image is not None else (d_text * strip.text).sum()
    if d_text is not None:
        d_text = ranks.scatter_sum(d_text)
    return ranks.sum(part.loss) / (terms * ranks.total), d_image if need.image else None, d_text, d_scale, d_bias


def _ids(keys: Sequence[str] | Tensor, device: torch.device) -> Tensor:
    """Return (b,) int64 ids, the same for the same key on every rank (Python's own hash is salted for each process)."""
    if isinstance(keys, Tensor):
        return keys.to(device=device, dtype=torch.int64)
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64, device=device)


def _shared_keys(keys: Sequence[str] | Tensor, device: torch.device, ranks: Ranks) -> tuple[Tensor, Tensor] | None:
    """Return the ids of this rank's rows and of all columns, or None where all are distinct and nothing is masked."""
    if ranks.world == 1 and not isinstance(keys, Tensor) and len(set(keys)) == len(keys):
        return None  # seen without a GPU's help, which costs more than the rest of a short step
    own = _ids(keys, device)
    everyone = ranks.gather(own)
    return None if torch.unique(everyone).numel() == ranks.total else (own, everyone)


def _problem(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    keys: Sequence[str] | Tensor | None,
    tile: int,
    *,
    sigmoid: bool,
) -> str | None:
    """Return what is wrong with this rank's input, or None."""
    if image.ndim != 2 or image.shape != text.shape:
        shapes = f"{tuple(image.shape)} and {tuple(text.shape)}"
        return f"The contrastive loss takes image and text embeddings of one shape (B, D); got {shapes}."
    if not (image.is_floating_point() and text.is_floating_point()):
        return f"The contrastive loss takes floating-point embeddings; got {image.dtype} and {text.dtype}."
    if image.device != text.device:
        return f"The contrastive loss takes embeddings on one device; got {image.device} and {text.device}."
    if not isinstance(tile, int) or tile < 1:
        return f"tile must be a whole number >= 1, not {tile!r}."
    if sigmoid and logit_bias is None:
        return f"siglip needs a logit_bias, a learned scalar that starts at {SIGLIP_LOGIT_BIAS}; got None."
    for name, scalar in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if scalar is not None and scalar.numel() != 1:
            return f"{name} must be a scalar; got shape {tuple(scalar.shape)}."
    if float(logit_scale.detach()) > _IMPLAUSIBLE_LOG:
        return (
            f"logit_scale is the logarithm of the factor, and exp({float(logit_scale.detach()):.4g}) cannot be meant; "
            "pass the parameter itself, not its exp()."
        )
    if keys is not None and len(keys) != image.shape[0]:
        return f"keys must name each of the {image.shape[0]} pairs; got {len(keys)}."
    if isinstance(keys, Tensor) and (keys.ndim != 1 or keys.is_floating_point()):
        return f"keys given as a tensor must be (B,) whole numbers; got {tuple(keys.shape)} of {keys.dtype}."
    return None
