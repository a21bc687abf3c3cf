"""A process's place among those of its run, read from what LSF, SLURM and torchrun set."""

import socket

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, LSFEnvironment, SLURMEnvironment

from wlsup.cli.environments import cluster_environment, compute_hosts, node_of, placement
from wlsup.errors import WlsupError

SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1",
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "a.test",
}  # fmt: skip


@pytest.fixture
def lsf(tmp_path):
    """Variables of rank 7 of two nodes of six, whose rank file lists each node once a slot after the launch node."""

    def make(hosts=("h41n05", "h41n06"), launch="batch3", slots=42):
        path = tmp_path / "rankfile"
        path.write_text("\n".join([launch, *(host for host in hosts for _ in range(slots))]) + "\n")
        return {
            "LSB_JOBID": "1234", "LSB_DJOB_RANKFILE": str(path), "JSM_NAMESPACE_SIZE": "12", "JSM_NAMESPACE_RANK": "7",
            "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "6",
        }  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("listed", "own"),
    [
        ("h41n06", "h41n06"),
        ("h41n06", "h41n06.summit.test"),
        ("h41n06.summit.test", "h41n06"),
        ("h41n06.summit.test", "H41N06.summit.test"),
    ],
)
def test_short_and_full_names_of_a_host_are_the_same(listed, own, lsf):
    found = placement(lsf(("h41n05", listed)), own)
    assert (found.launcher, found.size, found.rank, found.local_rank, found.node) == ("jsrun", 12, 7, 1, 1)
    assert (found.local_size, found.main_address) == (6, "h41n05")


def test_the_launch_node_is_dropped_once_even_where_it_computes_too(lsf):
    assert compute_hosts(lsf()) == ["h41n05", "h41n06"]
    assert compute_hosts(lsf(launch="h41n05")) == ["h41n05", "h41n06"]


def test_lightnings_lsf_environment_gets_the_node_that_its_own_reading_does_not_find(lsf, monkeypatch):
    for name, value in lsf().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "overwritten")
    monkeypatch.setattr(socket, "gethostname", lambda: "h41n06.summit.test")
    with pytest.raises(KeyError):
        LSFEnvironment()
    import os

    ours = cluster_environment(os.environ)
    assert isinstance(ours, LSFEnvironment)
    assert (ours.node_rank(), ours.global_rank(), ours.local_rank(), ours.world_size()) == (1, 7, 1, 12)
    assert (ours.main_address, ours.main_port) == ("h41n05", 10234)


@pytest.mark.parametrize(
    ("change", "hostname", "why"),
    [
        ({"LSB_DJOB_RANKFILE": ""}, "h41n05", "LSB_DJOB_RANKFILE, which names the job's nodes, is not set"),
        ({"LSB_DJOB_RANKFILE": "/nowhere/rankfile"}, "h41n05", "cannot be read on this node: No such file"),
        ({}, "login1", "calls itself 'login1', which is not in the job's rank file (h41n05, h41n06)"),
        ({"JSM_NAMESPACE_RANK": "seven"}, "h41n05", "JSM_NAMESPACE_RANK is 'seven', not a number"),
    ],
)
def test_what_lsf_did_not_set_right_is_one_sentence(change, hostname, why, lsf):
    with pytest.raises(WlsupError, match=".") as caught:
        placement(lsf() | change, hostname)
    assert why in str(caught.value)


def test_a_rank_file_without_compute_nodes_says_so(lsf):
    with pytest.raises(WlsupError, match="no compute node after the launch node"):
        compute_hosts(lsf(()))


def test_a_short_name_that_fits_two_hosts_is_refused():
    with pytest.raises(WlsupError, match="fits 2 hosts of"):
        node_of(["a.x.test", "a.y.test"], "a")
    assert node_of(["10.0.0.1", "10.0.0.2"], "10.0.0.2") == 1  # addresses are not cut at their dots


def test_slurm_and_torchrun_are_read_too():
    found = placement(SLURM, "gpu08")
    assert (found.launcher, found.size, found.rank, found.local_rank, found.node) == ("srun", 8, 5, 1, 1)
    assert (found.nodes, found.local_size, found.main_address) == (2, 4, "gpu07")
    uneven = placement(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}, "gpu08")
    assert uneven.local_size == 3
    found = placement(TORCHRUN, "b")
    assert (found.launcher, found.size, found.rank, found.node, found.nodes) == ("torchrun", 4, 3, 1, 2)
    assert placement({}, "laptop") is None


def test_slurms_requeue_is_left_to_the_scripts(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    ours = cluster_environment(SLURM)
    assert isinstance(ours, SLURMEnvironment)
    assert ours.auto_requeue is False


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])
def test_a_jobs_script_and_a_shell_in_it_are_not_srun(step):
    environ = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    environ |= {} if step is None else {"SLURM_STEP_ID": step}
    assert placement(environ, "gpu08") is None
    assert isinstance(cluster_environment(environ), LightningEnvironment)
    assert cluster_environment(TORCHRUN) is None
