"""Two nodes with networks, names and processes of their own, through the LSF and SLURM scripts, to results."""

import json

import pytest

from .conftest import SMALL, Cluster

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


MIXTURE = " --model.moe.experts 2 --model.moe.k 1 --data.pairs 32"
SLURM = ("sbatch", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--output")


@pytest.mark.parametrize(
    ("approach", "submit", "script", "args"),
    [
        ("film", ("bsub", "-nnodes", "2", "-o"), "lsf/summit.lsf", " --data.eval_sets [] --data.pairs 32"),
        ("magma_moe", ("bsub", "-nnodes", "2", "-o"), "lsf/summit_moe.lsf", MIXTURE),
        ("film", SLURM, "slurm/wlsup.sbatch", " --data.eval_sets [] --data.pairs 32"),
    ],
    ids=["lsf-film", "lsf-magma_moe", "slurm-film"],
)
def test_a_run_on_two_nodes_ends_in_its_results(approach, submit, script, args, networks, tmp_path):
    cluster = Cluster(tmp_path / "cluster", networks)
    folder = tmp_path / "run"
    variables = {
        "APPROACH": approach, "RUN_DIR": folder, "ARGS": SMALL + args, "GPUS_PER_NODE": 1, "CORES_PER_NODE": 1,
        "PRECISION": "32-true",
    }  # fmt: skip
    log = cluster.folder / ("job.%j.log" if submit is SLURM else "job.%J.log")
    submitted = cluster.call(*submit, log, script, **variables)
    assert submitted.returncode == 0, submitted.stderr
    codes = cluster.wait(seconds=900)
    assert codes == [0], cluster.log()
    results = json.loads((folder / "results.json").read_text())
    assert results["approach"] == approach
    assert results["steps"] == 1  # both nodes took part in each step
    assert results["samples_seen"] == 32
    assert "2 nodes x 1 processes" in cluster.log()
    assert list(folder.parent.glob("run*")) == [folder]
