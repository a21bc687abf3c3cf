"""The network that is reprogrammed: a frozen encoder with a linear head, fitted once and then frozen too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wlsup.errors import WlsupError
from wlsup.models.vision import VisionEncoder

__all__ = ["FrozenClassifier", "fit_head"]


def fit_head(features: Tensor, labels: Tensor, classes: int, penalty: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Fit a linear head by multinomial logistic regression: L-BFGS over all features at once, in fp64, from zero.

    The problem is convex and nothing is drawn at random: the same features give the same head.

    Args:
        features: (n, D).
        labels: (n,) class ids.
        classes: number K of classes.
        penalty: factor of half the squared norm of the weights over standardised features.

    Returns:
        Weight (K, D) and bias (K,), fp32, for the features as they were given.
    """
    with torch.inference_mode(False), torch.enable_grad():
        given = features.detach().double().clone()
        mean, std = given.mean(0), given.std(0).clamp(min=1e-8)
        standard, targets = (given - mean) / std, labels.clone()
        weight = torch.zeros(classes, given.shape[1], dtype=torch.float64, device=given.device, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, device=given.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(standard, weight, bias), targets)
            loss = loss + 0.5 * penalty * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    weight = weight.detach() / std
    bias = bias.detach() - weight @ mean
    return weight.float(), bias.float()


class FrozenClassifier(nn.Module):
    """An encoder and a linear head over its features; the head is no parameter of training.

    Args:
        encoder: the vision encoder.
    """

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("weight", torch.zeros(0, encoder.embed_dim), persistent=False)
        self.register_buffer("bias", torch.zeros(0), persistent=False)

    @property
    def labels(self) -> int:
        """Number of classes it tells apart; 0 before it is fitted."""
        return len(self.bias)

    def fit(self, features: Tensor, labels: Tensor, classes: int) -> FrozenClassifier:
        """Fit the head on (n, D) features and their (n,) labels; see `fit_head`."""
        return self.set_head(*fit_head(features, labels, classes))

    def set_head(self, weight: Tensor, bias: Tensor) -> FrozenClassifier:
        """Take a head (K, D), (K,) as it is."""
        self.weight, self.bias = weight.to(self.weight.device), bias.to(self.bias.device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, K) logits."""
        return self.read(self.encoder.features(images))

    def read(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, K) logits.

        Raises:
            WlsupError: the head was not fitted.
        """
        if not self.labels:
            raise WlsupError(
                "The frozen classifier has no head yet: it is fitted on a labelled set when training is set up. "
                "Attach a data module that has the set, or call the approach's prepare(datamodule)."
            )
        return F.linear(features, self.weight, self.bias)
