"""What keeps a fine-tuned encoder near the pretrained one: distillation, L2-SP, replay, and averaged weights.

Captions teach an encoder something and make it forget something. Each term here holds on to what it knew, and each
works with every approach: what is held is defined by what the approach trains, not by how it is built.

A term that has nothing to hold (the approach leaves the encoder's function as it is) is 0, and says so once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wlsup.batch import CaptionBatch, FeatureExtractor, ImageBatch
from wlsup.errors import WlsupError
from wlsup.objectives.micro_batches import in_micro_batches

__all__ = ["Regularizer", "RegularizerSpec", "cosine_distance", "l2_to_start", "without_adapters"]

_log = logging.getLogger("wlsup")


@dataclass(frozen=True)
class RegularizerSpec:
    """How much of each regulariser; 0 leaves it out.

    Args:
        distill: weight of `cosine_distance` between the features of the batch's pictures and the frozen pretrained
            encoder's, both under the null condition.
        l2sp: weight of the squared distance of what trains from where it started (`l2_to_start`).
        replay: weight of the same distance as ``distill``'s on unlabelled pictures of the pretrained encoder's own
            domain, which the data module adds to each batch (``data.replay``).
        ema: decay of the exponential moving average of what trains, in [0, 1); k-NN, validation, checkpoints and export
            see the average. 0.99 averages over about the last 100 steps.

    Raises:
        WlsupError: a weight below 0, or a decay outside [0, 1).
    """

    distill: float = 0.0
    l2sp: float = 0.0
    replay: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in ("distill", "l2sp", "replay"):
            if not getattr(self, name) >= 0:
                raise WlsupError(f"regularizer.{name} is a weight and must be >= 0, not {getattr(self, name)}.")
        if not 0 <= self.ema < 1:
            raise WlsupError(f"regularizer.ema is a decay and must be in [0, 1), not {self.ema}. 0 turns it off.")


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of ``1 - cos(student_i, teacher_i)``, in fp32, in [0, 2].

    Source: Hinton et al. 2015 and Romero et al. 2015 for the idea of a teacher's features; the cosine is ours, because
    k-NN compares features by it.

    Args:
        student: (B, D).
        teacher: (B, D), without gradient.
    """
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def l2_to_start(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """Return the sum over tensors of ``||theta - theta_0||^2``, in fp32.

    Source: Li et al. 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks" (L2-SP),
    equation 2, for pretrained weights, where theta_0 is the pretrained value. For an adapter theta_0 is its state at
    step 0, at which it is an identity: the same pull towards the pretrained function (ours).

    Args:
        parameters: by name.
        start: the same names and shapes.
    """
    return torch.stack(
        [(parameters[name].float() - value.float()).square().sum() for name, value in start.items()]
    ).sum()


def without_adapters(encoder: nn.Module) -> nn.Module:
    """Return a copy of an encoder without what is hooked into it, in eval mode, that shares its frozen tensors.

    Args:
        encoder: as it was loaded, adapters or none attached by hooks; what trains in it is copied as it is now.
    """
    shared = {id(p): p for p in encoder.parameters() if not p.requires_grad}
    plain = copy.deepcopy(encoder, memo=shared)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return plain.requires_grad_(False).eval()


class Regularizer:
    """The terms of one run: remembers where training started, and adds what the specification asks for to a loss.

    Args:
        spec: weights.
    """

    def __init__(self, spec: RegularizerSpec) -> None:
        self.spec = spec
        self.averaged = False
        """Whether someone averages the weights, if the specification asks for it: the callback `EMA` says so."""
        self._teacher: FeatureExtractor | None = None
        self._start: dict[str, Tensor] | None = None
        self._held: dict[str, nn.Parameter] = {}

    @property
    def active(self) -> bool:
        """Whether any term is added to the loss."""
        return bool(self.spec.distill or self.spec.l2sp or self.spec.replay)

    @property
    def replays(self) -> bool:
        """Whether batches are to bring pictures to replay."""
        return self.spec.replay > 0

    def begin(
        self,
        features: Callable[[Tensor], Tensor],
        pretrained: Callable[[], FeatureExtractor],
        trained: Mapping[str, nn.Parameter],
        size: int,
    ) -> None:
        """Remember the start, before the first step; later calls do nothing.

        What L2-SP holds is what the features under the null condition depend on among the tensors that train, as the
        graph of one forward pass says: heads and decoders, which the features do not go through, are free.

        Args:
            features: (B, 3, H, W) -> (B, D), of the encoder that trains.
            pretrained: makes the teacher.
            trained: the tensors that train, by name.
            size: side of a picture in pixels.
        """
        if self._start is not None or not self.active:
            return
        self._held = _reached(features, trained, size)
        self._start = {name: parameter.detach().clone() for name, parameter in self._held.items()}
        if not self._held:
            _log.warning(
                "regularizer: nothing that trains changes the encoder's features, so its terms are 0 by design"
            )
        elif self.spec.distill or self.spec.replay:
            self._teacher = pretrained()

    def forget(self) -> bool:
        """Let `begin` note the start again, of other tensors; return whether it had."""
        begun, self._start, self._held = self._start is not None, None, {}
        return begun

    def add(
        self,
        losses: dict[str, Tensor],
        features: Callable[[Tensor], Tensor],
        batch: CaptionBatch | ImageBatch,
        micro_batch: int | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses with each term, unweighted, under its own name, and its share added to "loss".

        Args:
            losses: of the batch; holds "loss".
            features: (B, 3, H, W) -> (B, D), of the encoder that trains.
            batch: its pictures are what "distill" looks at, and its ``replay`` is what "replay" does.
            micro_batch: encode so many pictures at a time, in their memory (`in_micro_batches`); None: all at once.

        Raises:
            WlsupError: replay is asked for and the batch brings no pictures for it, or training has not begun.
        """
        if self.spec.ema and not self.averaged:
            raise WlsupError(
                f"regularizer.ema is {self.spec.ema:g}, but nothing averages the weights: give the trainer the "
                "callback wlsup.callbacks.ema.EMA, as the wlsup command does."
            )
        if not self.active:
            return losses
        if self._start is None:
            raise WlsupError("The regularizer does not know where training started: call setup('fit') first.")
        terms: dict[str, Tensor] = {}
        if self.spec.distill:
            terms["distill"] = self._distance(features, batch.images, micro_batch)
        if self.spec.l2sp:
            terms["l2sp"] = self._pull(losses["loss"].device)
        if self.spec.replay:
            pictures = getattr(batch, "replay", None)
            if pictures is None and self._held:
                raise WlsupError(
                    f"regularizer.replay is {self.spec.replay:g}, but the batches bring no pictures to replay. Set "
                    "data.replay: mini for generated ones, or a folder or tar of pictures of the pretrained domain."
                )
            terms["replay"] = self._distance(features, batch.images if pictures is None else pictures, micro_batch)
        total = losses["loss"] + sum(getattr(self.spec, name) * term for name, term in terms.items())
        return {**losses, **terms, "loss": total}

    def _distance(self, features: Callable[[Tensor], Tensor], images: Tensor, micro_batch: int | None) -> Tensor:
        if self._teacher is None:
            return images.new_zeros((), dtype=torch.float32)
        teacher = self._teacher.to(images.device)
        with torch.no_grad():
            wanted = in_micro_batches(lambda rows: teacher.features(images[rows]), len(images), micro_batch)
        found = in_micro_batches(lambda rows: features(images[rows]), len(images), micro_batch)
        return cosine_distance(found, wanted)

    def _pull(self, device: torch.device) -> Tensor:
        if not self._held:
            return torch.zeros((), device=device)
        self._start = {name: value.to(device) for name, value in self._start.items()}
        return l2_to_start(self._held, self._start)


def _reached(
    features: Callable[[Tensor], Tensor], trained: Mapping[str, nn.Parameter], size: int
) -> dict[str, nn.Parameter]:
    """Return the tensors that the features depend on."""
    if not trained:
        return {}
    device = next(iter(trained.values())).device
    with torch.enable_grad():
        pooled = features(torch.zeros(2, 3, size, size, device=device))
        if not pooled.requires_grad:
            return {}
        gradients = torch.autograd.grad(pooled.sum(), list(trained.values()), allow_unused=True)
    return {name: p for (name, p), gradient in zip(trained.items(), gradients, strict=True) if gradient is not None}
