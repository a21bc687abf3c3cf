"""One node, two processes: real runs through Lightning's LSF, SLURM and torchrun environments, to results.json."""

import json
import socket

import pytest

from .conftest import Cluster

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

TINY = (
    "--data.pairs 32 --data.validation_pairs 16 --data.eval_sets [] --data.batch_size 8 --trainer.max_epochs 1 "
    "--trainer.accelerator cpu"
)
"""Two steps of two processes."""


@pytest.fixture
def cluster(tmp_path):
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        pytest.skip(f"this machine's name {socket.gethostname()!r} has no address")
    name = socket.gethostname()
    made = Cluster(tmp_path / "cluster", [{"listed": name, "hostname": name}])
    made.run_dir = tmp_path / "run"
    made.common = {
        "RUN_DIR": made.run_dir, "GPUS_PER_NODE": 2, "CORES_PER_NODE": 2, "PRECISION": "32-true", "ARGS": TINY,
    }  # fmt: skip
    return made


def results(cluster, steps=2):
    found = json.loads((cluster.run_dir / "results.json").read_text())
    assert (found["steps"], found["samples_seen"]) == (steps, 16 * steps)
    return found


def test_a_chain_of_lsf_jobs_ends_in_the_results(cluster):
    cluster.common["ARGS"] = f"{TINY} --data.pairs 16 --checkpoints.time_limit 0.001s"
    log = cluster.folder / "job.%J.log"
    done = cluster.call("lsf/chain.sh", "lsf/summit.lsf", "-o", log, **cluster.common)
    assert done.returncode == 0, done.stderr
    # the first job stops after the only step: the second one finds nothing left to train, and evaluates
    assert cluster.wait(2, seconds=900) == [75, 0], cluster.log()
    results(cluster, steps=1)
    assert not (cluster.run_dir / "checkpoints" / "stopped").exists()


def test_a_trainer_that_counts_otherwise_than_the_scheduler_is_refused_before_training(cluster):
    cluster.common["ARGS"] = f"{TINY} --trainer.devices 1"
    log = cluster.folder / "job.%J.log"
    done = cluster.call("bsub", "-o", log, "lsf/summit.lsf", **cluster.common)
    assert done.returncode == 0, done.stderr
    (code,) = cluster.wait(seconds=300)
    assert code not in (0, 75), cluster.log()  # 2, or what the launcher makes of the rank it ended
    assert "The launch is not right" in cluster.log()
    assert not (cluster.run_dir / "config.yaml").exists()


def test_a_slurm_job_ends_in_the_results(cluster):
    options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", f"--output={cluster.folder}/job.%j.log"]
    done = cluster.call("sbatch", *options, "slurm/wlsup.sbatch", **cluster.common)
    assert done.returncode == 0, done.stderr
    assert cluster.wait(seconds=600) == [0], cluster.log()
    results(cluster)


def test_torchrun_ends_in_the_results(cluster):
    done = cluster.call("cluster/torchrun.sh", timeout=600, **cluster.common)
    assert done.returncode == 0, done.stderr
    results(cluster)
