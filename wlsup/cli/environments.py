"""Where a process stands among those of its run, as the scheduler's variables say, and Lightning's view of it.

Lightning's own environments are used, with three things mended: LSF's rank file may spell a host short or in full, the
launch node is dropped by one rule, and SLURM's requeue is left to the suite's checkpoints.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    SLURMEnvironment,
)

from wlsup.errors import WlsupError

_FIRST_RESERVED_STEP = 0xFFFFFFF0

__all__ = ["Placement", "cluster_environment", "compute_hosts", "node_of", "placement"]


@dataclass(frozen=True)
class Placement:
    """One process of a run, in its scheduler's numbers.

    Args:
        launcher: "jsrun", "srun" or "torchrun".
        size: processes of the run.
        rank: this one's, from 0.
        local_rank: this one's on its node, from 0.
        node: this one's node, from 0.
        nodes: of the run; None where the launcher does not say.
        local_size: processes on this node; None where the launcher does not say.
        main_address: host of rank 0.
    """

    launcher: str
    size: int
    rank: int
    local_rank: int
    node: int
    nodes: int | None
    local_size: int | None
    main_address: str


def placement(environ: Mapping[str, str], hostname: str) -> Placement | None:
    """Read where this process stands; None for one that no launcher started.

    Args:
        environ: the process's variables.
        hostname: its node's name.

    Raises:
        WlsupError: variables that are missing, not numbers, or name a rank file that cannot be read or does not list
            this host.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        size, local = _number(environ, "WORLD_SIZE"), _number(environ, "LOCAL_WORLD_SIZE")
        rank = _number(environ, "RANK")
        node = _number(environ, "GROUP_RANK")
        nodes = _number(environ, "GROUP_WORLD_SIZE") if "GROUP_WORLD_SIZE" in environ else None
        address = environ.get("MASTER_ADDR", "127.0.0.1")
        return Placement("torchrun", size, rank, _number(environ, "LOCAL_RANK"), node, nodes, local, address)
    if _in_slurm_step(environ):
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "127.0.0.1")
        nodes = next((name for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if name in environ), None)
        return Placement(
            "srun",
            _number(environ, "SLURM_NTASKS"),
            _number(environ, "SLURM_PROCID"),
            _number(environ, "SLURM_LOCALID"),
            _number(environ, "SLURM_NODEID"),
            None if nodes is None else _number(environ, nodes),
            _slurm_local_size(environ),
            environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(hosts),
        )
    if "JSM_NAMESPACE_SIZE" in environ:
        hosts = compute_hosts(environ)
        return Placement(
            "jsrun",
            _number(environ, "JSM_NAMESPACE_SIZE"),
            _number(environ, "JSM_NAMESPACE_RANK"),
            _number(environ, "JSM_NAMESPACE_LOCAL_RANK"),
            node_of(hosts, hostname),
            None,  # jsrun may start on fewer nodes than the job has
            _number(environ, "JSM_NAMESPACE_LOCAL_SIZE") if "JSM_NAMESPACE_LOCAL_SIZE" in environ else None,
            hosts[0],
        )
    return None


def compute_hosts(environ: Mapping[str, str]) -> list[str]:
    """Return the compute nodes of an LSF job in its rank file's order, each once, without the launch node.

    The file's first line is the launch node, where the job's script runs; every other line is a slot of a compute node.

    Args:
        environ: holds ``LSB_DJOB_RANKFILE``.

    Raises:
        WlsupError: no rank file, one that cannot be read, or one without compute nodes.
    """
    path = environ.get("LSB_DJOB_RANKFILE", "")
    if not path:
        raise WlsupError(
            "jsrun started this process, but LSB_DJOB_RANKFILE, which names the job's nodes, is not set: pass the "
            "job's variables on (`jsrun -E LSB_DJOB_RANKFILE`, or no `env -i` in the script)."
        )
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise WlsupError(
            f"The rank file {path} (LSB_DJOB_RANKFILE) cannot be read on this node: {reason}. It must lie on a file "
            "system that every node sees; copy it there in the job's script and set LSB_DJOB_RANKFILE to the copy."
        ) from error
    hosts = list(dict.fromkeys(lines[1:]))
    if not hosts:
        raise WlsupError(
            f"The rank file {path} names {len(lines)} host{'s' * (len(lines) != 1)}, and no compute node after the "
            "launch node: ask for nodes (`bsub -nnodes N`)."
        )
    return hosts


def node_of(hosts: list[str], hostname: str) -> int:
    """Return the position of ``hostname`` among ``hosts``; short and full names of one host are the same.

    Args:
        hosts: names as the rank file spells them.
        hostname: as the node itself does.

    Raises:
        WlsupError: it is not there, or its short name fits several.
    """
    if hostname in hosts:
        return hosts.index(hostname)
    fitting = [host for host in hosts if _short(host) == _short(hostname)]
    if len(fitting) == 1:
        return hosts.index(fitting[0])
    listed = ", ".join(hosts[:8]) + (", ..." if len(hosts) > 8 else "")
    why = f"fits {len(fitting)} hosts of" if fitting else "is not in"
    raise WlsupError(
        f"This node calls itself {hostname!r}, which {why} the job's rank file ({listed}): start the processes with "
        "jsrun inside the job, and have `hostname` on a node give its name as LSF spells it, short or in full."
    )


class _LSF(LSFEnvironment):
    """Lightning's, with the rank file read by `compute_hosts` and host names compared by `node_of`."""

    @staticmethod
    def _read_hosts() -> list[str]:
        return compute_hosts(os.environ)

    def _get_node_rank(self) -> int:
        return node_of(self._read_hosts(), socket.gethostname())


def cluster_environment(environ: Mapping[str, str]) -> ClusterEnvironment | None:
    """Return the environment that the Trainer needs; None where Lightning's own choice is right.

    Args:
        environ: the process's variables, checked by `placement` before.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return None
    if _in_slurm_step(environ):
        return SLURMEnvironment(auto_requeue=False)  # the script requeues, once the run's own checkpoint is written
    if "SLURM_NTASKS" in environ:
        return LightningEnvironment()  # one task of a job, or a shell in it: Lightning takes the variables for srun's
    if "JSM_NAMESPACE_SIZE" in environ:
        return _LSF()
    return None


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process: a job's script and an interactive shell have steps of reserved numbers."""
    step = environ.get("SLURM_STEP_ID", "")
    by_hand = environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # Lightning's own rule
    return step.isdigit() and int(step) < _FIRST_RESERVED_STEP and "SLURM_PROCID" in environ and not by_hand


def _slurm_local_size(environ: Mapping[str, str]) -> int | None:
    """Tasks on this node, of "4", or of "4(x2),3" by this node's position."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if text is None:
        return _number(environ, "SLURM_NTASKS_PER_NODE") if "SLURM_NTASKS_PER_NODE" in environ else None
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    node = _number(environ, "SLURM_NODEID")
    return counts[node] if node < len(counts) else None


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name)
    if text is None or not text.strip().isdigit():
        given = "is not set" if text is None else f"is {text!r}, not a number"
        raise WlsupError(
            f"The launcher's variable {name} {given}: start every process by srun, jsrun or torchrun, which set it."
        )
    return int(text)


def _short(host: str) -> str:
    return host if re.fullmatch(r"[\d.]+", host) else host.partition(".")[0].lower()
