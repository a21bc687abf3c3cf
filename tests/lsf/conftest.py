"""A fake cluster on the PATH; two nodes with networks of their own, where there is root."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..conftest import lacking

ROOT = Path(__file__).parents[2]
BIN = Path(__file__).parent / "bin"
SMALL = (
    "--data.pairs 64 --data.validation_pairs 32 --data.eval_sets '[mini_shapes]' --data.batch_size 16 "
    "--trainer.max_epochs 1 --trainer.accelerator cpu --captioning.pictures 8"
)
"""What makes a run tiny, as ARGS."""


class Cluster:
    """The fake commands over one description, in one folder of state."""

    def __init__(self, folder, hosts, work=ROOT, **description):
        self.folder, self.work = folder, work
        (folder / "bin").mkdir(parents=True)
        description = {"launch": "batch1", "hosts": hosts, "cores": 42, "gpus": 6, "minute": 60.0, "longest": 120,
                       "grace": 600, "parse_script": True} | description  # fmt: skip
        (folder / "cluster.json").write_text(json.dumps(description))

    def environ(self, **variables):
        theirs = ("SLURM", "LSB", "JSM", "WLSUP", "MASTER_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        return kept | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "FAKE_CLUSTER": str(self.folder), "PYTHONPATH": str(ROOT),
            "PYTHON": sys.executable, "LSB_DEFAULTPROJECT": "abc123", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        } | {name: str(value) for name, value in variables.items()}  # fmt: skip

    def call(self, *command, stdin=None, timeout=60, **variables):
        """Run a command, such as bsub, in the repository."""
        return subprocess.run(
            list(map(str, command)), cwd=self.work, env=self.environ(**variables), text=True, input=stdin,
            capture_output=True, timeout=timeout,
        )  # fmt: skip

    def jobs(self):
        return sorted((self.folder / "jobs").glob("*")) if (self.folder / "jobs").exists() else []

    def wait(self, jobs=1, seconds=60):
        """Wait until ``jobs`` jobs have ended, and none goes on; return their exit codes."""
        deadline, busy = time.monotonic() + seconds, time.monotonic()
        while time.monotonic() < deadline and time.monotonic() < busy + 30:
            ended = [job for job in self.jobs() if (job / "exit").exists()]
            if len(ended) == len(self.jobs()) >= jobs:
                return [int((job / "exit").read_text()) for job in ended]
            if len(ended) < len(self.jobs()) or not ended:
                busy = time.monotonic()  # later, no job runs that could submit another one
            time.sleep(0.1)
        pytest.fail(f"after {seconds} s: {[(job.name, (job / 'exit').exists()) for job in self.jobs()]}\n{self.log()}")

    def log(self):
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@pytest.fixture
def cluster(tmp_path):
    """Make a cluster of one node, this machine; options describe it."""
    import socket

    def make(hosts=None, **description):
        name = socket.gethostname()
        hosts = hosts or [{"listed": name, "hostname": name}]
        return Cluster(tmp_path / f"cluster{len(list(tmp_path.glob('cluster*')))}", hosts, **description)

    return make


@contextmanager
def two_networks():
    """Two network namespaces joined by a veth pair, in which the nodes' names have addresses; yields the hosts."""
    if os.geteuid() != 0:
        lacking("network namespaces need root")
    if not shutil.which("ip") or not shutil.which("unshare"):
        lacking("network namespaces need `ip` (iproute2) and `unshare` (util-linux)")

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    tag = f"w{os.getpid() % 100000}"
    spaces, hosts = [f"{tag}a", f"{tag}b"], []
    etc = [Path("/etc/netns") / space for space in spaces]
    table = "127.0.0.1 localhost\n" + "".join(f"10.231.7.{i} node{i}.cluster.test node{i}\n" for i in (1, 2))
    try:
        try:
            for space in spaces:
                ip("netns", "add", space)
            ip("link", "add", spaces[0], "type", "veth", "peer", "name", spaces[1])
            for number, space in enumerate(spaces, start=1):
                ip("link", "set", space, "netns", space)
                ip("-n", space, "address", "add", f"10.231.7.{number}/24", "dev", space)
                ip("-n", space, "link", "set", "lo", "up")
                ip("-n", space, "link", "set", space, "up")
                etc[number - 1].mkdir(parents=True)
                (etc[number - 1] / "hosts").write_text(table)
                # LSF's files spell the node short, and the node itself in full
                hosts.append({"listed": f"node{number}", "hostname": f"node{number}.cluster.test", "netns": space})
            ip("netns", "exec", spaces[0], "unshare", "--uts", "true")
        except (subprocess.CalledProcessError, OSError) as error:
            lacking(f"network namespaces cannot be made here: {getattr(error, 'stderr', b'') or error}")
        yield hosts
    finally:
        for space, folder in zip(spaces, etc, strict=True):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def networks():
    with two_networks() as hosts:
        yield hosts


@pytest.fixture
def linked_cluster(tmp_path):
    """Make a fake cluster of two nodes over links to the scripts; ``plan`` is what each job's run does."""

    def make(*plan, **description):
        work = tmp_path / "work"
        work.mkdir()
        for name in ("cluster", "lsf", "slurm", "experiments"):
            (work / name).symlink_to(ROOT / name)
        hosts = [{"listed": f"node{number}", "hostname": f"node{number}"} for number in (1, 2)]
        made = Cluster(tmp_path / "fake", hosts, work, **description)
        (made.folder / "plan").write_text(" ".join(plan))
        return made

    return make
