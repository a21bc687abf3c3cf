"""Bottleneck adapters in a frozen language model's blocks, attached from outside (MAGMA).

Shapes: B samples, L positions, D the language model's hidden size, H channels of a bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wlsup.errors import WlsupError, choose

__all__ = ["LanguageAdapterSpec", "LanguageAdapters", "LanguageBottleneck"]

Placement = Literal["none", "sequential", "parallel", "scaled_parallel"]

_PLACEMENTS = ("none", "sequential", "parallel", "scaled_parallel")
_ATTENTIONS = ("attn", "attention", "self_attn")
"""What transformers' families call a block's attention."""

_INIT_STD = 1e-3


@dataclass(frozen=True)
class LanguageAdapterSpec:
    """Where adapters go in each block of a language model, and what they are.

    With f the block's attention or MLP, x what goes into it and A the adapter's change:

        sequential        f(x) + A(f(x))
        parallel          f(x) + A(x)
        scaled_parallel   f(x) + s A(x), s learned, 1 at first

    Source: Eichenberg et al. 2022 (MAGMA), section 3.3 and table 6; parallel adapters, He et al. 2022, "Towards a
    Unified View of Parameter-Efficient Transfer Learning", section 3.

    Args:
        mlp: at the MLP, or "none".
        attention: at the attention, or "none".
        factor: a bottleneck has D // factor channels. MAGMA's are 4 with adapters at the MLP only, and 8 at both.
        layer_norm: normalise what an adapter reads.
        init: "zero_up", an exact identity at step 0; or "magma", as published: weights and biases normal, of standard
            deviation 1e-3, clamped to twice that, so that the model begins near itself.

    Raises:
        WlsupError: adapters nowhere, an unknown value, or a factor below 1.
    """

    mlp: Placement = "sequential"
    attention: Placement = "none"
    factor: int = 4
    layer_norm: bool = False
    init: Literal["zero_up", "magma"] = "zero_up"

    def __post_init__(self) -> None:
        choose("adapters.mlp", self.mlp, _PLACEMENTS)
        choose("adapters.attention", self.attention, _PLACEMENTS)
        choose("adapters.init", self.init, ("zero_up", "magma"))
        if self.factor < 1:
            raise WlsupError(f"adapters.factor must be at least 1, not {self.factor}.")
        if self.mlp == self.attention == "none":
            raise WlsupError(
                "adapters.mlp and adapters.attention are both 'none': there is no adapter. Give one of them a place "
                f"({', '.join(_PLACEMENTS[1:])}), or use the approach linear_map."
            )


class LanguageBottleneck(nn.Module):
    """``W_up relu(W_down x)``, what an adapter adds; 2 D H + H + D parameters, and 2 D with a LayerNorm.

    Source: Eichenberg et al. 2022 (MAGMA), section 3.3. The zero first weights of ``W_up`` are ours.

    Args:
        width: D.
        hidden: H.
        layer_norm: normalise x.
        init: see `LanguageAdapterSpec`.
    """

    def __init__(
        self, width: int, hidden: int, layer_norm: bool = False, init: Literal["zero_up", "magma"] = "zero_up"
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if layer_norm else None
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        if init == "magma":
            for parameter in (*self.down.parameters(), *self.up.parameters()):
                nn.init.normal_(parameter, std=_INIT_STD)
                parameter.data.clamp_(-2 * _INIT_STD, 2 * _INIT_STD)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), the change."""
        normalised = x if self.norm is None else self.norm(x)
        return self.up(nn.functional.relu(self.down(normalised)))

    def update_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Return (D, H) and (H, D), whose product is the change's linear part: what spectra are taken of."""
        return self.up.weight, self.down.weight


class LanguageAdapters(nn.Module):
    """A slot at the attention, at the MLP or at both of every block of a causal language model.

    Its keys are ``attention.<block>.*`` and ``mlp.<block>.*``, and for scaled slots ``scales.attention`` and
    ``scales.mlp``, one number a block. What stands in a slot sees each position's hidden state, and in generation those
    of the positions that are fed.

    Args:
        blocks: the transformer blocks, of any family that `wlsup.models.language` admits.
        width: D, the model's hidden size, which is not always that of its input embeddings.
        spec: where, and which bottlenecks.
        make: what to put into a slot instead of a bottleneck, given the number of its block: a module from (B, L, D) to
            the change, (B, L, D).

    Raises:
        WlsupError: a block whose attention or MLP is not found, or bottlenecks without a channel.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        width: int,
        spec: LanguageAdapterSpec,
        make: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if make is None and spec.factor > width:
            raise WlsupError(f"adapters.factor={spec.factor} leaves no channel of the language model's {width}.")
        self.spec, self.depth = spec, len(blocks)
        self.placed: dict[str, Placement] = {
            branch: place for branch in ("attention", "mlp") if (place := getattr(spec, branch)) != "none"
        }
        self.scales = nn.ParameterDict()
        for branch, place in self.placed.items():
            slots = nn.ModuleList(make(index) if make else _bottleneck(width, spec) for index in range(self.depth))
            self.add_module(branch, slots)
            if place == "scaled_parallel":
                self.scales[branch] = nn.Parameter(torch.ones(self.depth))
            for block in blocks:
                _ends(block, branch)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._blocks: list[nn.ModuleList] = []  # in a list, so that they do not become a part of this module
        self._shapes: dict[int, torch.Size] = {}
        self._read: dict[tuple[str, int], Tensor] = {}

    def attach(self, blocks: nn.ModuleList) -> LanguageAdapters:
        """Hook the slots into the blocks, whose keys and tensors stay as they are; return the adapters.

        Raises:
            WlsupError: attached already, or another number of blocks than the adapters were made for.
        """
        if self._handles:
            raise WlsupError("These language adapters are attached already; detach() them first.")
        if len(blocks) != self.depth:
            raise WlsupError(f"These language adapters were made for {self.depth} blocks; there are {len(blocks)}.")
        self._blocks = [blocks]
        for index, block in enumerate(blocks):
            before = block.register_forward_pre_hook(partial(self._note_shape, index), with_kwargs=True)
            self._handles.append(before)
            for branch, place in self.placed.items():
                first, last = _ends(block, branch)
                if place != "sequential":
                    read = first.register_forward_pre_hook(partial(self._note_input, branch, index), with_kwargs=True)
                    self._handles.append(read)
                self._handles.append(last.register_forward_hook(partial(self._change, branch, index)))
        return self

    def detach(self) -> None:
        """Take every hook out: the language model is the pretrained one again, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._blocks.clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Detach for a while: what runs meanwhile sees the pretrained language model.

        Raises:
            WlsupError: not attached.
        """
        if not self._blocks:
            raise WlsupError("These language adapters are not attached: attach() them first.")
        blocks = self._blocks[0]
        self.detach()
        try:
            yield
        finally:
            self.attach(blocks)

    # The hooks are methods, so that a deep copy of a model together with its adapters is driven by the copied ones.

    def _note_shape(self, index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._shapes[index] = _hidden(args, kwargs).shape

    def _note_input(self, branch: str, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._read[branch, index] = _hidden(args, kwargs)

    def _change(self, branch: str, index: int, module: nn.Module, args: tuple, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        x = self._read.pop((branch, index), y)  # of a sequential slot nothing was noted
        slot = getattr(self, branch)[index]
        # OPT runs its MLP over all positions of all samples in one row. The base's weights may be of half precision.
        x = x.view(self._shapes[index]).to(next((p.dtype for p in slot.parameters()), x.dtype))
        change = slot(x).reshape(y.shape)
        if branch in self.scales:
            change = self.scales[branch][index] * change
        changed = (y + change).to(y.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _bottleneck(width: int, spec: LanguageAdapterSpec) -> LanguageBottleneck:
    return LanguageBottleneck(width, width // spec.factor, spec.layer_norm, spec.init)


def _ends(block: nn.Module, branch: str) -> tuple[nn.Module, nn.Module]:
    """Return the module that reads a branch's input and the one that gives its output, mostly the same.

    Raises:
        WlsupError: the block is built otherwise than those of the tested families.
    """
    if branch == "attention":
        names = next(((name, name) for name in _ATTENTIONS if hasattr(block, name)), None)
    else:
        # OPT's blocks have the MLP's two layers and no module around them.
        names = next((pair for pair in (("mlp", "mlp"), ("fc1", "fc2")) if hasattr(block, pair[0])), None)
    if names is None:
        parts = ", ".join(name for name, _ in block.named_children())
        raise WlsupError(
            f"No {branch} found in a {type(block).__name__}, which has {parts}: language adapters know the blocks of "
            "transformers' GPT-2, GPT-J, GPT-Neo, GPT-NeoX, OPT, Llama, Mistral and Qwen2."
        )
    return getattr(block, names[0]), getattr(block, names[1])


def _hidden(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states that a block, an attention or an MLP was called with."""
    return args[0] if args else kwargs["hidden_states"]
