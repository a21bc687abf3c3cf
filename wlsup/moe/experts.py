"""Experts, and the view of one as two (or, gated, three) products that a batched computation needs.

Shapes: N tokens, D width, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wlsup.errors import WlsupError, choose

__all__ = ["MLPExpert", "MLPParts", "parts_of", "stack"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class MLPParts:
    """An MLP taken apart: ``W_down act(W_up x + b_up) + b_down``; of a gated one the hidden layer
    is ``act(W_gate x + b_gate) * (W_up x + b_up)``.

    Args:
        up: (H, D), or (E, H, D) of E experts.
        down: (D, H), or (E, D, H).
        up_bias: (H,), (E, H) or None.
        down_bias: (D,), (E, D) or None.
        gate: as ``up``, or None.
        gate_bias: as ``up_bias``.
        activation: elementwise.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    gate: Tensor | None
    gate_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]


class MLPExpert(nn.Module):
    """``W_down act(W_up x + b_up) + b_down``.

    Args:
        width: D.
        hidden: H.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        bias: whether both maps have one.

    Raises:
        WlsupError: an unknown activation.
    """

    def __init__(self, width: int, hidden: int, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.activation = choose("activation", activation, ACTIVATIONS)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


# How MLPs of timm, transformers and this package are made: up, down, gate, activation. By the class's name, since the
# same names of layers stand for other formulas elsewhere.
_KNOWN: dict[str, tuple[str, str, str | None, str | Callable[[Tensor], Tensor]]] = {
    "Mlp": ("fc1", "fc2", None, "act"),
    "LooseMLP": ("fc1", "fc2", None, "activation_fn"),
    "GPT2MLP": ("c_fc", "c_proj", None, "act"),
    "GPTNeoMLP": ("c_fc", "c_proj", None, "act"),
    "GPTJMLP": ("fc_in", "fc_out", None, "act"),
    "GPTNeoXMLP": ("dense_h_to_4h", "dense_4h_to_h", None, "act"),
    "LlamaMLP": ("up_proj", "down_proj", "gate_proj", "act_fn"),
    "MistralMLP": ("up_proj", "down_proj", "gate_proj", "act_fn"),
    "Qwen2MLP": ("up_proj", "down_proj", "gate_proj", "act_fn"),
    "LanguageBottleneck": ("down", "up", None, F.relu),
}


def parts_of(expert: nn.Module) -> MLPParts | None:
    """Take an MLP apart, or return None for a module that is none of the known ones, or does more than an MLP does.

    More: dropout in training, a norm, hooks.
    """
    if isinstance(expert, MLPExpert):
        form = ("up", "down", None, ACTIVATIONS[expert.activation])
    elif type(expert).__name__ in _KNOWN:
        form = _KNOWN[type(expert).__name__]
    else:
        return None
    up, down, gate = (None if name is None else getattr(expert, name) for name in form[:3])
    activation = getattr(expert, form[3]) if isinstance(form[3], str) else form[3]
    linears = [part for part in (up, down, gate) if part is not None]
    for part in expert.modules():
        if part._forward_hooks or part._forward_pre_hooks:
            return None
        if part in linears or part is expert or isinstance(part, nn.Identity) or part is activation:
            continue
        if isinstance(part, nn.Dropout) and (part.p == 0 or not part.training):
            continue
        if isinstance(activation, nn.Module) and part in activation.modules():
            continue
        return None
    # Not a subclass of Linear: quantised ones compute something else from their weight.
    if not all(type(part) is nn.Linear or type(part).__name__ == "Conv1D" for part in linears):
        return None
    return MLPParts(
        _weight(up),
        _weight(down),
        up.bias,
        down.bias,
        None if gate is None else _weight(gate),
        None if gate is None else gate.bias,
        activation,
    )


def stack(experts: Sequence[nn.Module], dtype: torch.dtype) -> MLPParts | None:
    """Return E experts' tensors one on another, copies that carry gradients back; None where one is no known MLP.

    What is written, and held until the backward pass, is in ``dtype``.
    """
    parts = [parts_of(expert) for expert in experts]
    if any(part is None for part in parts):
        return None

    def all_of(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else _StackedAs.apply(dtype, *tensors)

    names = ("up", "down", "up_bias", "down_bias", "gate", "gate_bias")
    return MLPParts(*(all_of(name) for name in names), parts[0].activation)


class _StackedAs(torch.autograd.Function):
    """Stack and cast in one node: E casts, and as many on the way back, are more work for a GPU to start than to do.

    Transposed tensors (GPT-2's Conv1D) are copied one by one.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        if len({tensor.shape for tensor in tensors}) > 1:
            raise WlsupError("Experts of different shapes cannot be computed together. Use moe.dispatch: sort.")
        ctx.dtype = tensors[0].dtype
        stacked = tensors[0].new_empty(len(tensors), *tensors[0].shape, dtype=dtype)
        torch._foreach_copy_(list(stacked.unbind()), list(tensors))
        return stacked

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradient.to(ctx.dtype).unbind()


def _weight(linear: nn.Module) -> Tensor:
    """(out, in), a view also of GPT-2's transposed Conv1D."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
