"""A launch is checked before anything is built: sizes, host names, GPUs, architecture, precision; a sentence each."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wlsup.cli.environments import Placement, placement
from wlsup.cli.logs import log_to_terminal
from wlsup.errors import WlsupError

__all__ = ["Asked", "Machine", "check_launch", "check_this_launch"]

_CURES = {
    "jsrun": "jsrun starts -n resource sets of -a tasks (one set a node: -n NODES -r1 -a{devices} -g{devices})",
    "srun": "ask SLURM for --nodes={nodes} --ntasks-per-node={devices}",
    "torchrun": "start with torchrun --nnodes {nodes} --nproc-per-node {devices}",
}
_ONE_SET = {
    "jsrun": "use one resource set a node, -r1 -a{local} -g{local}, so that each process sees all of the node's GPUs",
    "srun": "ask for --gpus-per-node={local} without --gpu-bind or --gpus-per-task",
    "torchrun": "start no more processes than there are GPUs (--nproc-per-node), and look at CUDA_VISIBLE_DEVICES",
}


@dataclass(frozen=True)
class Machine:
    """What torch says of this process's machine.

    Args:
        gpus: number that this process sees.
        architectures: that the torch build has code for ("sm_70", "compute_90", ...).
        capability: (major, minor) of the GPU this process will use; None without one.
        gpu: its name.
        cuda: the CUDA version of the torch build; None for a build without.
        torch: its version.
    """

    gpus: int = 0
    architectures: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None
    gpu: str = ""
    cuda: str | None = None
    torch: str = ""


@dataclass(frozen=True)
class Asked:
    """What the configuration asks of the trainer.

    Args:
        num_nodes: of the run.
        devices: as given: a number, "auto", "-1", or the numbers of devices.
        accelerator: "auto", "cpu", "gpu", "cuda", ...
        precision: "32-true", "16-mixed", "bf16-mixed", ...; None for the default.
        run_dir: whether all processes are told one folder.
    """

    num_nodes: int = 1
    devices: int | str | list[int] = 1
    accelerator: str = "auto"
    precision: str | None = None
    run_dir: bool = True

    def on_gpu(self, machine: Machine) -> bool:
        """Whether the trainer will use a GPU."""
        return self.accelerator in ("gpu", "cuda") or (self.accelerator == "auto" and machine.gpus > 0)

    def processes_a_node(self, machine: Machine) -> int:
        """How many processes a node the trainer will count."""
        devices = self.devices
        if isinstance(devices, str) and devices.strip().lstrip("-").isdigit():
            devices = int(devices)
        if devices in ("auto", -1):
            return max(machine.gpus, 1) if self.on_gpu(machine) else 1
        if isinstance(devices, str):
            return len([part for part in devices.split(",") if part.strip()])
        return devices if isinstance(devices, int) else len(devices)


def check_this_launch(config: Any) -> None:
    """Check the launch of this process; see `check_launch`.

    Args:
        config: the parsed configuration.
    """
    here = socket.gethostname()
    where = placement(os.environ, here)
    trainer = config.trainer
    if where is not None and where.rank:
        log_to_terminal(quiet=True)  # what rank 0 says stands for all; warnings come from each
    asked = Asked(
        trainer.num_nodes,
        trainer.devices,
        trainer.accelerator if isinstance(trainer.accelerator, str) else "other",
        None if trainer.precision is None else str(trainer.precision),
        bool(config.run_dir or os.environ.get("WLSUP_RUN_DIR")),
    )
    check_launch(os.environ, asked, this_machine(0 if where is None else where.local_rank), here, _resolves)


def check_launch(
    environ: Mapping[str, str], asked: Asked, machine: Machine, hostname: str, resolves: Callable[[str], bool]
) -> None:
    """Refuse a launch that would hang, crash or train on the wrong device.

    Without a launcher and with one process only the GPU is checked, if one is used.

    Args:
        environ: the process's variables.
        asked: the configuration's wishes.
        machine: torch's facts.
        hostname: of this node.
        resolves: whether a host name has an address here.

    Raises:
        WlsupError: the first thing that is wrong, where it was found, and its cure.
    """
    where = placement(environ, hostname)
    if where is None:
        problem = _not_started(environ, asked, machine)
    else:
        problem = _sizes(environ, asked, machine, where) or _names(asked, machine, where, hostname, resolves)
    problem = problem or _devices(environ, asked, machine, where) or _precision(asked, machine, where)
    if problem is None:
        return
    told = "" if where is None or where.size == 1 else f"rank {where.rank} on {hostname}: "
    raise WlsupError(f"The launch is not right: {told}{problem}")


def this_machine(local_rank: int) -> Machine:
    """Return torch's facts; of a GPU those of number ``local_rank``, which the process will use."""
    import torch

    if not torch.cuda.is_available():
        return Machine(cuda=torch.version.cuda, torch=torch.__version__)
    gpus = torch.cuda.device_count()
    device = local_rank if local_rank < gpus else 0
    return Machine(
        gpus,
        tuple(torch.cuda.get_arch_list()) if torch.version.hip is None else (),
        torch.cuda.get_device_capability(device) if torch.version.hip is None else None,
        torch.cuda.get_device_name(device),
        torch.version.cuda,
        torch.__version__,
    )


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _not_started(environ: Mapping[str, str], asked: Asked, machine: Machine) -> str | None:
    """What is wrong where no launcher started this process."""
    devices = asked.processes_a_node(machine)
    tasks = environ.get("SLURM_NTASKS", "")
    by_hand = environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_JOB_ID" in environ and tasks.isdigit() and int(tasks) > 1 and not by_hand:
        return (
            f"SLURM job {environ['SLURM_JOB_ID']} has {tasks} tasks, but srun did not start this process, which "
            "would train alone, once on each node or not at all: put srun before the command."
        )
    if asked.num_nodes > 1:
        start = "jsrun" if "LSB_JOBID" in environ else "srun" if "SLURM_JOB_ID" in environ else "torchrun"
        if "MASTER_ADDR" in environ and "NODE_RANK" in environ:
            return None  # the user starts one process a node, and Lightning the rest
        return (
            f"trainer.num_nodes is {asked.num_nodes}, but neither jsrun, srun nor torchrun started this process: "
            f"start {asked.num_nodes} x {devices} processes by {start}."
        )
    return None


def _sizes(environ: Mapping[str, str], asked: Asked, machine: Machine, where: Placement) -> str | None:
    """What is wrong with the numbers of processes and nodes."""
    devices, nodes = asked.processes_a_node(machine), asked.num_nodes
    cure = _CURES[where.launcher].format(devices=devices, nodes=nodes)
    if where.size != nodes * devices:
        return (
            f"{where.launcher} started {where.size} processes, and the configuration asks for {nodes} nodes x "
            f"{devices} devices = {nodes * devices}: {cure}, or set --trainer.num_nodes and --trainer.devices."
        )
    if where.nodes is not None and where.nodes != nodes:
        return (
            f"{where.launcher} uses {where.nodes} nodes, and trainer.num_nodes is {nodes}: {cure}, or set "
            f"--trainer.num_nodes {where.nodes}."
        )
    if where.local_size is not None and where.local_size != devices:
        return (
            f"{where.launcher} started {where.local_size} processes on this node, and trainer.devices is {devices}: "
            f"{cure}, or set --trainer.devices {where.local_size}."
        )
    if (where.node, where.local_rank) != divmod(where.rank, devices):
        node, local = divmod(where.rank, devices)
        packed = "jsrun -d packed" if where.launcher == "jsrun" else "srun --distribution=block"
        return (
            f"it is process {where.local_rank} of node {where.node}, and with {devices} a node it would have to be "
            f"process {local} of node {node}: fill the nodes in their order ({packed}), one resource set a node."
        )
    if where.launcher == "srun" and where.size > 1 and "SLURM_NTASKS_PER_NODE" not in environ:
        return f"SLURM_NTASKS_PER_NODE is not set, as it is when --ntasks alone was given: {cure}."
    if where.size > 1 and not asked.run_dir:
        return "its processes would each make a folder of their own: give one that all nodes see, --run_dir DIR."
    return None


def _names(
    asked: Asked, machine: Machine, where: Placement, hostname: str, resolves: Callable[[str], bool]
) -> str | None:
    """What is wrong with host names; gloo, which connects processes on CPUs, looks its own host's up too."""
    if where.size == 1:
        return None
    needed = [where.main_address] + ([] if asked.on_gpu(machine) or asked.num_nodes == 1 else [hostname])
    for host in needed:
        if not resolves(host):
            return (
                f"the host name {host!r} has no address on this node: have it added to DNS or /etc/hosts, or set "
                "MASTER_ADDR to rank 0's address."
                if host == where.main_address
                else f"this node's own name {host!r} has no address: have it added to DNS or /etc/hosts, or name the "
                "network by GLOO_SOCKET_IFNAME=eth0."
            )
    return None


def _devices(environ: Mapping[str, str], asked: Asked, machine: Machine, where: Placement | None) -> str | None:
    """What is wrong with this process's GPU."""
    granted = environ.get("CUDA_VISIBLE_DEVICES", "") not in ("", "-1", "NoDevFiles")
    if not asked.on_gpu(machine):
        if where is None or asked.accelerator != "auto" or not granted:
            return None
        return (
            f"it was given GPUs (CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']}) and torch {machine.torch} "
            f"sees none, so that it would train on the CPU: {_why_none(machine)}, or say --trainer.accelerator cpu."
        )
    if machine.gpus == 0:
        if where is None and asked.num_nodes == 1:
            return None  # Lightning says so itself
        return f"trainer.accelerator is {asked.accelerator!r} and this process sees no GPU: {_why_none(machine)}."
    if where is not None and where.local_rank >= machine.gpus:
        return (
            f"it is process {where.local_rank} of its node, and sees {machine.gpus} "
            f"GPU{'s' * (machine.gpus > 1)}: "
            + _ONE_SET[where.launcher].format(local=asked.processes_a_node(machine))
            + "."
        )
    if machine.capability is not None and machine.architectures and not _carries(machine):
        major, minor = machine.capability
        return (
            f"{machine.gpu} has architecture sm_{major}{minor}, and torch {machine.torch} (CUDA {machine.cuda}) has "
            f"code for {', '.join(machine.architectures)} only: install a build that carries it (lsf/README.md, "
            '"Old stacks", has the matrix).'
        )
    return None


def _why_none(machine: Machine) -> str:
    if machine.cuda is None:
        return f"torch {machine.torch} is a build without CUDA; install one with it"
    return "ask the scheduler for GPUs (jsrun -g, srun --gpus-per-node), and see whether the driver is as new as CUDA"


def _carries(machine: Machine) -> bool:
    """Whether the build runs on the GPU: machine code of its major version, or PTX that is no newer (CUDA's rules)."""
    own = machine.capability
    for name in machine.architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if own is None or found is None:
            continue
        theirs = (int(found[2]), int(found[3]))
        only_it = bool(found[4])  # for one architecture (a) or family (f)
        later = theirs <= own if found[1] == "compute" else theirs[0] == own[0] and theirs[1] <= own[1]
        if theirs == own or (later and not only_it):
            return True
    return False


def _precision(asked: Asked, machine: Machine, where: Placement | None) -> str | None:
    """What is wrong with the precision on this device."""
    precision = asked.precision or "32-true"
    if not asked.on_gpu(machine):
        if where is not None and precision.startswith("16"):
            return f"trainer.precision {precision!r} needs a GPU: use 32-true or bf16-mixed on CPUs."
        return None
    if machine.capability is not None and precision.startswith("bf16") and machine.capability < (8, 0):
        return (
            f"{machine.gpu} has no bfloat16 (that begins with sm_80): use --trainer.precision "
            f"{'16-mixed' if precision == 'bf16-mixed' else '32-true'}."
        )
    return None
