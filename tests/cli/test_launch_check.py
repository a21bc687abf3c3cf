"""Each way a launch can be wrong, given by variables and torch's facts: one sentence with its cure."""

import subprocess
import sys

import pytest

from wlsup.cli.launch_check import Asked, Machine, check_launch
from wlsup.errors import WlsupError

V100 = Machine(6, ("sm_70", "sm_80", "sm_90"), (7, 0), "Tesla V100-SXM2-16GB", "12.6", "2.7.0")
NEW = Machine(6, ("sm_75", "sm_80", "sm_90", "compute_90"), (7, 0), "Tesla V100-SXM2-16GB", "13.0", "2.9.0")
H100 = Machine(8, ("sm_75", "sm_80", "sm_90", "compute_90"), (9, 0), "H100", "13.0", "2.9.0")
CPU = Machine(torch="2.9.0", cuda="13.0")
GPU6 = Asked(2, 6, "gpu", "16-mixed", "ddp")


@pytest.fixture
def jsrun(tmp_path):
    path = tmp_path / "rankfile"
    path.write_text("batch1\n" + "a1\n" * 42 + "a2\n" * 42)
    return {
        "LSB_JOBID": "9", "LSB_DJOB_RANKFILE": str(path), "JSM_NAMESPACE_SIZE": "12", "JSM_NAMESPACE_RANK": "7",
        "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "6", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5",
    }  # fmt: skip


def check(environ, asked=GPU6, machine=V100, hostname="a2", resolves=lambda host: True):
    check_launch(environ, asked, machine, hostname, resolves)


def test_a_right_launch_passes(jsrun):
    check(jsrun)
    check(jsrun, Asked(2, "auto", "auto", "16-mixed"))
    check({}, Asked(), CPU)
    check({}, Asked(precision="16-mixed"), CPU)  # alone on a CPU: Lightning takes bfloat16, and says so


@pytest.mark.parametrize(
    ("change", "asked", "machine", "why"),
    [
        ({"JSM_NAMESPACE_SIZE": "6"}, GPU6, V100, "started 6 processes, and the configuration asks for 2 nodes x 6"),
        ({"JSM_NAMESPACE_LOCAL_SIZE": "12"}, GPU6, V100, "12 processes on this node, and trainer.devices is 6"),
        (
            {"JSM_NAMESPACE_RANK": "2"},
            GPU6,
            V100,
            "process 2 of node 0: fill the nodes in their order",
        ),
        ({}, Asked(2, 6, "gpu", run_dir=False), V100, "give one that all nodes see, --run_dir DIR"),
        ({}, GPU6, Machine(1, V100.architectures, (7, 0), "V100", "12.6", "2.7"), "-r1 -a6 -g6"),
        ({}, GPU6, CPU, "this process sees no GPU: ask the scheduler for GPUs (jsrun -g"),
        ({}, GPU6, Machine(torch="2.9.0+cpu"), "torch 2.9.0+cpu is a build without CUDA"),
        ({}, Asked(2, 6, "auto"), CPU, "so that it would train on the CPU"),
        ({}, GPU6, NEW, "has architecture sm_70, and torch 2.9.0 (CUDA 13.0) has code for sm_75, sm_80, sm_90"),
        (
            {},
            Asked(2, 6, "gpu", "bf16-mixed"),
            V100,
            "has no bfloat16 (that begins with sm_80): use",
        ),
        ({}, Asked(2, 6, "cpu", "16-mixed"), CPU, "needs a GPU: use 32-true or bf16-mixed"),
    ],
)
def test_each_failure_is_one_sentence_with_its_cure(change, asked, machine, why, jsrun):
    with pytest.raises(WlsupError) as caught:
        check(jsrun | change, asked, machine)
    message = str(caught.value)
    assert why in message
    assert message.startswith("The launch is not right: rank ")
    assert " on a2: " in message
    assert message.count(". ") == 0
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "8"},
            "uses 1 nodes, and trainer.num_nodes is 2",
        ),
        ({"SLURM_NTASKS_PER_NODE": None}, "SLURM_NTASKS_PER_NODE is not set, as it is when --ntasks alone was given"),
        ({"SLURM_STEP_ID": None}, "has 8 tasks, but srun did not start this process"),
    ],
)
def test_slurms_numbers_are_compared_too(change, why):
    environ = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
        "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODELIST": "a[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    } | change  # fmt: skip
    environ = {name: value for name, value in environ.items() if value is not None}
    with pytest.raises(WlsupError) as caught:
        check(environ, Asked(2, 4, "gpu"), H100)
    assert why in str(caught.value)


def test_names_that_have_no_address_are_told(jsrun):
    with pytest.raises(WlsupError, match="host name 'a1' has no address on this node"):
        check(jsrun, resolves=lambda host: host != "a1")
    check(jsrun, resolves=lambda host: host != "a2")  # NCCL does not look its own host up
    with pytest.raises(WlsupError, match="this node's own name 'a2' has no address"):
        check(jsrun, Asked(2, 6, "cpu"), CPU, resolves=lambda host: host != "a2")


def test_several_nodes_without_a_launcher_are_refused():
    with pytest.raises(WlsupError, match="neither jsrun, srun nor torchrun started this process: start 2 x 4"):
        check({}, Asked(2, 4, "cpu"), CPU)
    check({"MASTER_ADDR": "a", "NODE_RANK": "1"}, Asked(2, 4, "cpu"), CPU)  # by hand, as Lightning lets one


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 6), ("sm_80",), True),  # machine code runs on later minors of its major
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("sm_80", "compute_80"), True),  # PTX is compiled for any later one
        ((7, 0), ("compute_75",), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a", "sm_100"), True),
        ((12, 1), ("sm_120",), True),
    ],
)
def test_which_architectures_run_on_which_gpu_follows_cudas_rules(capability, architectures, runs):
    machine = Machine(1, architectures, capability, "GPU", "12.8", "2.8")
    if runs:
        check({}, Asked(accelerator="gpu"), machine)
    else:
        with pytest.raises(WlsupError, match="has architecture"):
            check({}, Asked(accelerator="gpu"), machine)


@pytest.mark.parametrize(
    ("devices", "count"), [(4, 4), ("4", 4), ("0,2,3", 3), ([0, 1], 2), ("auto", 6), (-1, 6), ("-1", 6)]
)
def test_devices_are_counted_as_the_trainer_does(devices, count):
    assert Asked(devices=devices, accelerator="gpu").processes_a_node(V100) == count


@pytest.mark.slow
def test_a_wrong_launch_ends_before_anything_is_built(tmp_path):
    """Through the command line: exit code 2, one message, no folder."""
    import os

    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "wlsup", "fit", "-c", "experiments/base.yaml", "-c", "experiments/film.yaml",
         "--trainer.num_nodes", "2", "--trainer.accelerator", "cpu", "--run_dir", str(run)],
        capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("wlsup: error: ")]
    assert len(errors) == 1
    assert "trainer.num_nodes is 2" in errors[0]
    assert "Traceback" not in done.stderr
    assert not run.exists()
