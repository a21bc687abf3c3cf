"""Low-rank updates through peft, in a timm encoder whose state-dict keys stay the pretrained ones."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from wlsup.errors import WlsupError

__all__ = ["LowRank", "without_low_rank"]

_ADAPTER = "default"  # peft's own name for the one adapter there is
_BASE = ".base_layer."


class LowRank(nn.Module):
    """``W x + (alpha / r) B A x`` for chosen linear layers of an encoder, with A random and B zero at first.

    Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1. The layers are peft's
    (`peft.inject_adapter_in_model`), which takes each linear layer's place and keeps it inside. So that the pretrained
    model's keys do not change with that, the backbone's state dict is given, and takes, the original names, and leaves
    A and B out: they are parameters of this module, under their layers' names.

    Args:
        backbone: the timm model; peft's layers are put into it.
        rank: r.
        alpha: the update's scale is ``alpha / rank``.
        targets: last names of the linear layers that get an update, in every block: "qkv", "proj", "fc1", "fc2".
        rslora: scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023).

    Raises:
        WlsupError: peft is not installed, a rank below 1, or a target that no block has.
    """

    def __init__(
        self,
        backbone: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] = ("qkv", "proj", "fc1", "fc2"),
        rslora: bool = False,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise WlsupError(f"rank must be at least 1, not {rank}.")
        blocks = [name for name, part in backbone.named_modules() if isinstance(part, nn.Linear) and "blocks." in name]
        there = sorted({name.rpartition(".")[2] for name in blocks})
        missing = [target for target in targets if target not in there]
        if missing or not targets:
            raise WlsupError(
                f"targets {list(targets)}: the encoder's blocks have the linear layers {', '.join(there)}."
            )
        peft = _peft()
        names = "|".join(map(re.escape, targets))
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=rf"blocks\..*\.({names})", use_rslora=rslora, lora_dropout=0.0
        )
        peft.inject_adapter_in_model(config, backbone, _ADAPTER)
        for name, layer in _layers(backbone):
            part = nn.ModuleDict({"A": layer.lora_A[_ADAPTER], "B": layer.lora_B[_ADAPTER]})
            self.add_module(name.replace(".", "_"), part)
        backbone._register_state_dict_hook(_give_original_names)
        backbone.register_load_state_dict_pre_hook(_take_original_names)


def without_low_rank(encoder: nn.Module, merge: bool = False) -> nn.Module:
    """Return a copy of an encoder with its linear layers back in place of peft's, in eval mode.

    Args:
        encoder: with a ``backbone`` that `LowRank` has been put into.
        merge: True adds each update to its layer's weights, so that the copy computes what the original does; False
            gives the pretrained weights, bit for bit.

    Returns:
        The copy; nothing in it requires gradients, and it shares no tensor with the original.
    """
    plain = copy.deepcopy(encoder)
    for name, layer in list(_layers(plain.backbone)):
        if merge:
            layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(plain.backbone.get_submodule(parent), last, layer.get_base_layer())
    plain.backbone._state_dict_hooks.clear()
    plain.backbone._load_state_dict_pre_hooks.clear()
    return plain.requires_grad_(False).eval()


def _layers(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and layer of every layer of peft's."""
    from peft.tuners.lora import LoraLayer

    yield from ((name, part) for name, part in backbone.named_modules() if isinstance(part, LoraLayer))


def _give_original_names(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        if ".lora_" in name:
            del state[name]
        elif _BASE in name:
            state[name.replace(_BASE, ".")] = state.pop(name)


def _take_original_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    for name, _ in module.named_parameters():
        original = prefix + name.replace(_BASE, ".")
        if _BASE in name and original in state:
            state[prefix + name] = state.pop(original)
        elif ".lora_" in name:
            state.setdefault(prefix + name, module.get_parameter(name))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise WlsupError(f"Low-rank updates need peft, which is not installed ({error}): pip install peft.") from error
    return peft
