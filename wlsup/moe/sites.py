"""The dense MLPs of a transformer: where they are, what they are made of, and how another module takes their place.

Shapes: N tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wlsup.errors import WlsupError

__all__ = [
    "LooseMLP",
    "Site",
    "blocks_of",
    "choose_blocks",
    "inputs_of",
    "language_model_of",
    "layout_of",
    "sites_of",
    "weight_of",
]

# The linear maps of an MLP, by the names that timm and transformers give them: those that read the input (two of a
# gated MLP), and the one that writes the output.
_LAYOUTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fc1",), "fc2"),  # timm's Mlp and GluMlp (whose fc1 holds both halves); OPT, on the block itself
    (("fc1_g", "fc1_x"), "fc2"),  # timm's SwiGLU
    (("c_fc",), "c_proj"),  # GPT-2 (Conv1D: weights transposed), GPT-Neo
    (("fc_in",), "fc_out"),  # GPT-J
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen2
)
# OPT has its MLP's three parts beside everything else in the block.
_LOOSE = ("fc1", "activation_fn", "fc2")


class LooseMLP(nn.Module):
    """OPT's MLP as a module of its own: ``fc2(activation_fn(fc1(x)))``."""

    def __init__(self, fc1: nn.Module, activation_fn: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = fc1, activation_fn, fc2

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.activation_fn(self.fc1(x)))


@dataclass
class Site:
    """One block's dense MLP.

    Args:
        name: path of the attribute that an MoE layer takes over ("blocks.1.mlp"; of OPT "model.decoder.layers.1.fc1").
        index: position of the block.
        block: the transformer block.
        parts: the MLP's modules by their names in the block: one "mlp", or OPT's three.
        width: D.
    """

    name: str
    index: int
    block: nn.Module
    parts: dict[str, nn.Module]
    width: int

    @property
    def loose(self) -> bool:
        """Whether the MLP's parts lie in the block itself, where tokens arrive flattened (OPT)."""
        return len(self.parts) > 1

    def mlp(self) -> nn.Module:
        """Return the MLP as one module (N, D) -> (N, D), its tensors the model's own."""
        return LooseMLP(*self.parts.values()) if self.loose else next(iter(self.parts.values()))

    def expert(self) -> nn.Module:
        """Return a copy of the MLP with parameters of its own, bit for bit the same, that never drops anything out.

        GPT-2's MLP does in training, by draws that depend on who computes which tokens: the copies would then not be
        the dense model at step 0, nor two processes one.
        """
        expert = copy.deepcopy(self.mlp())
        for part in expert.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        return expert

    def replace(self, layer: nn.Module) -> None:
        """Put ``layer`` where the MLP is: its keys become ``name`` + the layer's own."""
        first, *others = self.parts
        setattr(self.block, first, layer)
        for other in others:
            setattr(self.block, other, nn.Identity())

    def divert(self, layer: nn.Module) -> Callable[[], None]:
        """Let ``layer`` compute what the MLP did, leaving the MLP, its keys and the hooks on it where they are.

        Returns:
            What undoes it.
        """
        first, *others = self.parts.values()
        # An attribute of the instance goes before the class's method, and is not part of a state dict.
        first.forward = _Through(layer)
        for other in others:
            other.forward = _Through(nn.Identity())

        def undo() -> None:
            for part in self.parts.values():
                part.__dict__.pop("forward", None)

        return undo


class _Through:
    """Call a module in another's place; a class, so that a deep copy of both keeps them together."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.layer(*inputs, **named)


def language_model_of(module: nn.Module) -> nn.Module | None:
    """Return the causal language model of transformers that a module is, or holds as ``model`` (as ours does)."""
    for candidate in (module, getattr(module, "model", None)):
        if isinstance(candidate, nn.Module) and hasattr(candidate, "config") and hasattr(candidate, "generate"):
            return candidate
    return None


def blocks_of(module: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """Find the transformer blocks of a timm ViT, a `VisionEncoder`, a causal LM of transformers or a `LanguageModel`.

    Returns:
        Their list's path inside ``module``, and the blocks.

    Raises:
        WlsupError: none are found.
    """
    model = language_model_of(module)
    if model is not None:
        depth = model.config.num_hidden_layers
        candidates = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    else:
        candidates = [getattr(module, "blocks", None)]
    for candidate in candidates:
        for name, part in module.named_modules():
            if part is candidate and isinstance(part, nn.ModuleList | nn.Sequential):
                return name, list(part)
    raise WlsupError(
        f"No transformer blocks in a {type(module).__name__}: upcycling takes timm's ViTs, wlsup's encoders, and "
        "causal language models of transformers."
    )


def sites_of(module: nn.Module, blocks: Sequence[int] | None = None) -> list[Site]:
    """Find the dense MLPs of the chosen blocks, all for None.

    Raises:
        WlsupError: a block that there is not, or one without an MLP of a known form (an MoE layer already, ...).
    """
    path, there = blocks_of(module)
    chosen = range(len(there)) if blocks is None else blocks
    if outside := [index for index in chosen if not 0 <= index < len(there)]:
        raise WlsupError(f"There is no block {outside[0]}: the model has blocks 0 to {len(there) - 1}.")
    return [_site(f"{path}.{index}", index, there[index]) for index in chosen]


def choose_blocks(
    depth: int, every: int | None = None, last: int | None = None, blocks: Sequence[int] | None = None
) -> list[int]:
    """Say which blocks become MoE layers.

    Args:
        depth: number of blocks.
        every: the last of every ``every`` blocks, so 1, 3, 5, ... for 2: half of them, as Komatsuzaki et al. 2023 and
            Riquelme et al. 2021 ("every-2") have it. 1: all.
        last: the last so many blocks.
        blocks: these very ones.

    Returns:
        Positions, ascending. With none of the three given: every second block.

    Raises:
        WlsupError: more than one way given, or a number out of range.
    """
    given = {name: value for name, value in (("every", every), ("last", last), ("blocks", blocks)) if value is not None}
    if len(given) > 1:
        raise WlsupError(f"Blocks are chosen by one of every, last and blocks, not by {' and '.join(given)} together.")
    if blocks is not None:
        chosen = sorted(set(blocks))
        if not chosen or len(chosen) < len(blocks) or not 0 <= chosen[0] <= chosen[-1] < depth:
            raise WlsupError(f"blocks {list(blocks)}: give different numbers from 0 to {depth - 1}.")
        return chosen
    name, value = next(iter(given.items()), ("every", 2))
    if not 1 <= value <= depth:
        raise WlsupError(f"{name} must be between 1 and the model's {depth} blocks, not {value}.")
    return list(range(depth - value, depth)) if name == "last" else list(range(value - 1, depth, value))


def weight_of(linear: nn.Module) -> Tensor:
    """Return a linear map's weight as (out, in), a view also of GPT-2's transposed Conv1D."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T


@contextmanager
def inputs_of(sites: Sequence[Site]) -> Iterator[list[list[Tensor]]]:
    """Keep what each site's MLP reads during the forward passes inside the ``with``: for each, a list of (..., D)."""
    kept: list[list[Tensor]] = [[] for _ in sites]
    handles = []
    for site, inputs in zip(sites, kept, strict=True):
        entry = next(iter(site.parts.values()))
        handles.append(entry.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0])))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def layout_of(mlp: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """Return the names of an MLP's linear maps, (those that read the input, the one that writes); None if unknown."""
    for reads, writes in _LAYOUTS:
        if all(_is_linear(getattr(mlp, name, None)) for name in (*reads, writes)):
            return reads, writes
    return None


def _site(path: str, index: int, block: nn.Module) -> Site:
    mlp = getattr(block, "mlp", None)
    loose = mlp is None and all(isinstance(getattr(block, name, None), nn.Module) for name in _LOOSE)
    holder = block if loose else mlp
    layout = None if holder is None else layout_of(holder)
    if layout is None:
        what = "none" if mlp is None else f"a {type(mlp).__name__}"
        raise WlsupError(
            f"Block {index} ({type(block).__name__}) has no dense MLP that could be upcycled (found: {what}). Known "
            "are those of timm's ViTs and of GPT-2, GPT-J, GPT-Neo, GPT-NeoX, OPT, Llama, Mistral and Qwen2; choose "
            "other blocks, or give a dense model."
        )
    parts = {name: getattr(block, name) for name in _LOOSE} if loose else {"mlp": mlp}
    width = weight_of(getattr(holder, layout[0][0])).shape[1]
    return Site(f"{path}.{next(iter(parts))}", index, block, parts, width)


def _is_linear(part: Any) -> bool:
    return isinstance(part, nn.Linear) or (
        type(part).__name__ == "Conv1D" and isinstance(getattr(part, "weight", None), torch.nn.Parameter)
    )
