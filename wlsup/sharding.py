"""Large parts shared out over the processes: fully sharded data parallelism for what does not fit on one GPU.

The blocks of a language model, and each mixture of experts, are units of torch's ``fully_shard`` (FSDP2): a process
holds a slice of each of their tensors, and a unit is gathered when it is computed. All else, the encoder above all, is
on every process under DistributedDataParallel. Both average gradients over the processes, so a run learns the same.

Source: Rajbhandari et al. 2020 (ZeRO, stage 3); Zhao et al. 2023, "PyTorch FSDP".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from wlsup.errors import WlsupError

__all__ = [
    "SlicedGradScaler",
    "any_sliced",
    "clip_gradients_",
    "cut",
    "gathered",
    "gradient_norm",
    "has_shards",
    "leave_alone",
    "shard",
]


def shard(units: Sequence[nn.Module], device: torch.device) -> None:
    """Cut every parameter of each unit along its first dimension, a slice a process.

    Args:
        units: modules that have no parameter in common, and are computed by calling them. Of one dtype each.
        device: where the slices go.

    Raises:
        WlsupError: a CPU, and a torch that shares out on GPUs only.
    """
    if device.type == "cpu" and not hasattr(torch.cpu.Stream(), "record_event"):
        raise WlsupError(f"torch {torch.__version__} shares out on GPUs only: use trainer.strategy ddp on CPUs.")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        # No unit has a parent, and some torch versions leave such a one whole after its forward pass, whatever is said.
        unit.register_forward_hook(lambda module, inputs, output: module.reshard())


def leave_alone(module: nn.Module) -> None:
    """Have a DistributedDataParallel around ``module`` leave what is shared out to `fully_shard`."""
    names = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def has_shards(module: nn.Module) -> bool:
    """Say whether some part is shared out, so that all processes must compute whenever one does."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def any_sliced(parameters: Iterable[nn.Parameter]) -> bool:
    """Say whether some of them are slices of shared out tensors."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def _own(tensor: Tensor) -> Tensor:
    """Return this process's slice, or the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Return the 2-norm of all gradients in fp32, slices of other processes included; None without a gradient."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    norms = [torch.linalg.vector_norm(_own(gradient), dtype=torch.float32) for gradient in gradients]
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        shared = [norm for norm, gradient in zip(norms, gradients, strict=True) if isinstance(gradient, DTensor)]
        squares = torch.stack(shared).square().sum()
        dist.all_reduce(squares)
        whole = [norm for norm, gradient in zip(norms, gradients, strict=True) if not isinstance(gradient, DTensor)]
        norms = [*whole, squares.sqrt()]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


@torch.no_grad()
def clip_gradients_(parameters: Sequence[nn.Parameter], limit: float, algorithm: str) -> None:
    """Clip in place, as torch's ``clip_grad_norm_`` and ``clip_grad_value_`` do where nothing is shared out.

    Args:
        parameters: some of them shared out.
        limit: of the norm of all, or of each value.
        algorithm: "norm" or "value".
    """
    gradients = [_own(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if algorithm == "value":
        for gradient in gradients:
            gradient.clamp_(-limit, limit)
        return
    norm = gradient_norm(parameters)
    if norm is not None:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))


class SlicedGradScaler(torch.amp.GradScaler):
    """The gradient scaler of 16-mixed precision, where gradients are slices: a step is skipped by all or by none."""

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        own = [_own(p.detach()) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = _own(gradient)
        slices = SimpleNamespace(param_groups=[{"params": own}])
        found = super()._unscale_grads_(slices, inv_scale, found_inf, allow_fp16)
        for flag in found.values():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return found


def gathered(part: DTensor, keep: bool) -> Tensor | None:
    """Return the whole tensor, on the CPU, where it is to be kept; all processes take part."""
    whole = part.full_tensor()
    return whole.cpu() if keep else None


def cut(entry: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """Return a parameter's entry of an optimizer's state, its whole tensors cut as the parameter is."""
    if not isinstance(parameter, DTensor):
        return entry
    return {
        key: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim()
        else value
        for key, value in entry.items()
    }
