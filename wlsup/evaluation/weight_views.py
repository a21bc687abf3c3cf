"""A model's linear maps, one by one: what a spectrum is taken of.

Tools that walk over modules see `nn.Linear` and convolutions only. A fused ``qkv`` is then one matrix, a stack of
experts or an ``in_proj_weight`` nothing at all, and an adapter two thin factors where its update is their product.

Shapes: m outputs, n inputs, r channels of a bottleneck, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["FactoredUpdate", "LeftOut", "WeightView", "linear_shim", "weight_views"]

_FUSED = {
    "qkv": ("q", "k", "v"),
    "Wqkv": ("q", "k", "v"),
    "c_attn": ("q", "k", "v"),
    "in_proj_weight": ("q", "k", "v"),
    "kv": ("k", "v"),
    "key_value": ("k", "v"),
    "key_values": ("k", "v"),
}
"""What timm, torch, transformers and this package call projections that lie one on another in one weight."""

_INTERLEAVED = ("query_key_value",)  # GPT-NeoX and Bloom: q, k, v of the first head, then those of the second, ...

_MAPS = ("weight", "proj", "projection")
"""How the name of a bare two-dimensional parameter ends that is a linear map; others are tokens, positions, noise."""


@runtime_checkable
class FactoredUpdate(Protocol):
    """A module with a bottleneck, whose linear part is the product of two factors."""

    def update_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Return up (m, r) and down (r, n); the linear part of the change is ``up @ down``, (m, n)."""
        ...


class LeftOut(NamedTuple):
    """A parameter of two or more dimensions that is not looked at, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class WeightView:
    """One linear map of a model; nothing is copied until `matrix` is called.

    Args:
        name: of the module, then the part: ``blocks.0.attn.qkv.q``, ``moe.experts.3``, ``adapter.0.update``.
        shape: (m, n), outputs and inputs.
        rank: the largest that it can have: min(m, n), or r of a product through a bottleneck.
        sources: names of the parameters it is made of.
        update: it is a change of weights (an adapter's, LoRA's), not weights.
        matrix: gives the map as it is now, (m, n), without a graph.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    sources: tuple[str, ...]
    update: bool
    matrix: Callable[[], Tensor]


def weight_views(model: nn.Module, *, fused: bool = False) -> tuple[list[WeightView], list[LeftOut]]:
    """Return every linear map of a model, in its own order; the model is not touched.

    Fused projections come apart into q, k and v, stacked experts into experts, convolutions as the map from a patch to
    its channels (out, rest), GPT-2's transposed weights turned. Where peft has put LoRA into a layer, its weight is the
    one it computes with, base and update together, and the update ``B A`` comes after it. Of a `FactoredUpdate` there
    is only the product: its linear part, without the nonlinearity between. A tensor that is used twice counts once.

    Args:
        model: any; timm's, transformers', torch's and this package's layers are known.
        fused: leave fused projections whole, as weightwatcher sees them.

    Returns:
        The views, and the parameters of two dimensions or more that are none. Vectors have no spectrum, and are in
        neither.
    """
    walk = _Walk(model, fused)
    return list(walk.views()), walk.left_out


def linear_shim(views: Sequence[WeightView]) -> nn.Module:
    """Return a module of one plain `nn.Linear` a view, for tools that see no others.

    It is safe to let such a tool set attributes on it. Weights are shared where a view is a slice, so do not write
    to them.

    Args:
        views: with names of their own.

    Returns:
        A module whose children are named as the views, with "/" for ".".
    """
    shim = nn.Module()
    for view in views:
        linear = nn.Linear(view.shape[1], view.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(view.matrix(), requires_grad=False)
        shim.add_module(view.name.replace(".", "/"), linear)
    return shim


class _Walk:
    def __init__(self, model: nn.Module, fused: bool) -> None:
        self.model, self.fused = model, fused
        self.left_out: list[LeftOut] = []
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.taken = {id(factor) for part in model.modules() for factor in _factors(part)}

    def views(self) -> Iterator[WeightView]:
        for name, part in self.model.named_modules():
            if _is_lora(part):
                yield from self._lora(name, part)
            elif isinstance(part, FactoredUpdate):
                up, down = part.update_factors()
                shape = (up.shape[0], down.shape[1])
                yield self._view(_join(name, "update"), _product(up, down), shape, (up, down), len(down))
            for own, parameter in part.named_parameters(recurse=False):
                if id(parameter) not in self.taken and parameter.ndim >= 2:
                    self.taken.add(id(parameter))
                    yield from self._parameter(name, part, own, parameter)

    def _parameter(self, name: str, part: nn.Module, own: str, parameter: nn.Parameter) -> Iterator[WeightView]:
        full = self.names[id(parameter)]
        turned = type(part).__name__ == "Conv1D"  # transformers' linear layer of GPT-2, weight (in, out)
        known = turned or isinstance(part, nn.Linear | nn.Embedding)
        convolution = isinstance(part, nn.modules.conv._ConvNd)
        label = name if own == "weight" else _join(name, own)
        if convolution and part.groups > 1:
            self.left_out.append(LeftOut(full, f"a convolution in {part.groups} groups, which is not one matrix"))
        elif convolution:
            yield self._view(label, lambda: parameter.detach().flatten(1), _flat(parameter), (parameter,))
        elif min(parameter.shape) < 2 and parameter.ndim == 2:
            self.left_out.append(LeftOut(full, "a vector, which has one eigenvalue"))
        elif parameter.ndim == 2 and (known or own.endswith(_MAPS)):
            matrix = (lambda: parameter.detach().T) if turned else parameter.detach
            yield from self._split(label, matrix, _shape(parameter, turned), (parameter,))
        elif parameter.ndim == 3 and "expert" in f"{full}.{type(part).__name__}".lower():
            for expert in range(len(parameter)):
                shape = (parameter.shape[1], parameter.shape[2])
                yield self._view(f"{label}.{expert}", _row(parameter, expert), shape, (parameter,))
        elif parameter.ndim == 3:
            self.left_out.append(LeftOut(full, "of three dimensions, and not named as experts: positions or tokens"))
        else:
            self.left_out.append(LeftOut(full, "tokens, positions or pixels, not a linear map"))

    def _lora(self, name: str, part: Any) -> Iterator[WeightView]:
        base = part.get_base_layer()
        turned, active = type(base).__name__ == "Conv1D", list(part.active_adapters)
        factors = [layer[adapter].weight for adapter in active for layer in (part.lora_A, part.lora_B)]
        self.taken.add(id(base.weight))

        def update() -> Tensor:
            delta = sum(part.get_delta_weight(adapter).detach() for adapter in active)
            return delta.T if turned else delta

        def merged() -> Tensor:
            weight = base.weight.detach().T if turned else base.weight.detach()
            return weight if part.merged else weight + update().to(weight.dtype)

        rank = sum(part.lora_A[adapter].weight.shape[0] for adapter in active)
        shape = _shape(base.weight, turned)
        yield from self._split(name, merged, shape, (base.weight, *factors))
        yield from self._split(f"{name}.update", update, shape, tuple(factors), rank)

    def _split(
        self,
        name: str,
        matrix: Callable[[], Tensor],
        shape: tuple[int, int],
        sources: tuple[Tensor, ...],
        rank: int | None = None,
    ) -> Iterator[WeightView]:
        """Yield one view, or of fused projections several."""
        rows, columns = shape
        last = [part for part in name.removesuffix(".update").split(".") if not part.isdigit()][-1:]
        parts = () if self.fused else _FUSED.get(last[0] if last else "", ())
        interleaved = last and last[0] in _INTERLEAVED and not self.fused
        if interleaved and (head := self._head_size(name.removesuffix(".update"), rows)):
            pieces = {part: _interleaved(matrix, head, place) for place, part in enumerate(("q", "k", "v"))}
        # with fewer keys than queries the three are not of one size
        elif not parts or rows % len(parts) or (len(parts) == 3 and last[0] != "qkv" and rows != 3 * columns):
            yield self._view(name, matrix, (rows, columns), sources, rank)
            return
        else:
            pieces = {part: _chunk(matrix, len(parts), place) for place, part in enumerate(parts)}
        for part, piece in pieces.items():
            yield self._view(f"{name}.{part}", piece, (rows // len(pieces), columns), sources, rank)

    def _head_size(self, name: str, rows: int) -> int:
        """Return the channels of a head of the attention that a layer belongs to, 0 where it does not say."""
        attention = self.model.get_submodule(name.rpartition(".")[0])
        head = next(
            (size for key in ("head_size", "head_dim") if isinstance(size := getattr(attention, key, 0), int)), 0
        )
        return head if head and rows % (3 * head) == 0 else 0

    def _view(
        self,
        name: str,
        matrix: Callable[[], Tensor],
        shape: tuple[int, int],
        sources: tuple[Tensor, ...],
        rank: int | None = None,
    ) -> WeightView:
        names = tuple(self.names[id(source)] for source in sources)
        largest = min(shape) if rank is None else min(rank, *shape)
        return WeightView(name, shape, largest, names, rank is not None, matrix)


def _product(up: Tensor, down: Tensor) -> Callable[[], Tensor]:
    return lambda: up.detach().double() @ down.detach().double()


def _row(stack: Tensor, position: int) -> Callable[[], Tensor]:
    return lambda: stack.detach()[position]


def _chunk(matrix: Callable[[], Tensor], parts: int, place: int) -> Callable[[], Tensor]:
    return lambda: matrix().chunk(parts)[place]


def _interleaved(matrix: Callable[[], Tensor], head: int, place: int) -> Callable[[], Tensor]:
    """Give q, k or v of a weight that holds, head by head, ``head`` rows of each."""
    return lambda: matrix().unflatten(0, (-1, 3, head))[:, place].flatten(0, 1)


def _factors(part: nn.Module) -> tuple[Tensor, ...]:
    """Return the parameters that are looked at as a product only."""
    if _is_lora(part):
        return tuple(
            parameter
            for layer in (part.lora_A, part.lora_B)
            for own in layer.values()
            for parameter in own.parameters()
        )
    return tuple(part.update_factors()) if isinstance(part, FactoredUpdate) else ()


def _is_lora(part: nn.Module) -> bool:
    """Whether peft has put LoRA into a linear layer; told by what such a layer has, so that peft need not be there."""
    return (
        all(
            hasattr(part, name)
            for name in ("get_base_layer", "get_delta_weight", "lora_A", "lora_B", "active_adapters")
        )
        and getattr(part.get_base_layer(), "weight", None) is not None
        and part.get_base_layer().weight.ndim == 2
        and all(adapter in part.lora_A for adapter in part.active_adapters)
        and not any(getattr(part, "use_dora", {}).values())  # which is no sum of weight and update
    )


def _shape(weight: Tensor, turned: bool) -> tuple[int, int]:
    return (weight.shape[1], weight.shape[0]) if turned else (weight.shape[0], weight.shape[1])


def _flat(parameter: Tensor) -> tuple[int, int]:
    return parameter.shape[0], parameter[0].numel()


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
