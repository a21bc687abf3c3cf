"""The SLURM and torchrun scripts on a fake SLURM: requeued until finished, and no longer. No torch runs here."""

import json
import os
import signal
import time

import pytest

from .conftest import ROOT

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def slurm(linked_cluster):
    return linked_cluster


def submit(slurm, *options, **variables):
    variables = {"PYTHON": ROOT / "tests/lsf/stub_python", "MARGIN": 0} | variables
    done = slurm.call("sbatch", *options, "slurm/wlsup.sbatch", **variables)
    assert done.returncode == 0, done.stderr


def log(slurm):
    return (slurm.work / "wlsup.4711.log").read_text()


def processes(slurm):
    return {path.stem: json.loads(path.read_text()) for path in (slurm.folder / "seen").glob("*.json")}


def test_a_job_is_requeued_until_the_run_is_finished(slurm):
    slurm = slurm("stop", "stop", "finish", "fail")
    submit(slurm)
    assert slurm.wait() == [0], log(slurm)
    found = processes(slurm)
    assert sorted(found) == sorted(f"4711-{start}-{rank}" for start in range(3) for rank in range(8))
    for process in found.values():
        arguments = process["arguments"]
        assert arguments[arguments.index("--run_dir") + 1] == "runs/film/mini/seed0/slurm-4711"
        assert arguments[arguments.index("--trainer.num_nodes") + 1] == "2"
        assert arguments[arguments.index("--trainer.devices") + 1] == "4"
        assert "--checkpoints.time_limit" in arguments


@pytest.mark.parametrize(
    ("plan", "jobs", "starts", "code", "why"),
    [
        (("stop",) * 5, 3, 3, 75, "3 starts, and the run is not finished"),
        (("stop", "fail", "finish"), 9, 2, 2, "the recipe is wrong"),
        (("idle", "idle", "finish"), 9, 2, 75, "two starts in a row made no step"),
    ],
)
def test_requeueing_ends(plan, jobs, starts, code, why, slurm):
    slurm = slurm(*plan)
    submit(slurm, "--ntasks-per-node=1", JOBS=jobs)
    assert slurm.wait() == [code], log(slurm)
    assert len({name.rpartition("-")[0] for name in processes(slurm)}) == starts
    assert why in log(slurm)


def test_an_end_without_results_is_not_called_finished(slurm):
    slurm = slurm("vanish", "finish")
    submit(slurm, "--ntasks-per-node=1")
    assert slurm.wait() == [2]
    assert "there is no" in log(slurm) and "the run is finished" not in log(slurm)


def test_a_rank_that_dies_ends_the_others_and_is_not_requeued(slurm):
    slurm = slurm("lose", "finish")
    started = time.monotonic()
    submit(slurm, "--ntasks-per-node=2")
    (code,) = slurm.wait()
    assert code not in (0, 75), log(slurm)  # the dead one's, or a killed one's
    assert time.monotonic() - started < 30  # rank 0 would wait for a minute


def test_the_signal_before_the_limit_stops_the_run_and_it_is_requeued(slurm):
    slurm = slurm("hang", "finish", minute=1.2, grace=10)
    submit(slurm, "--time=20", "--ntasks-per-node=2")  # 24 seconds; the signal after twelve
    assert slurm.wait() == [0], log(slurm)
    assert "start 2" in log(slurm)


def test_a_cancelled_job_is_not_requeued(slurm):
    slurm = slurm("hang", "finish")
    submit(slurm, "--ntasks-per-node=1")
    deadline = time.monotonic() + 20
    while not (slurm.folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(os.getpgid(int((slurm.jobs()[0] / "tasks").read_text().split()[0])), signal.SIGTERM)
    assert slurm.wait() == [75]
    assert "cancelled" in log(slurm)


@pytest.mark.parametrize(
    ("options", "why"),
    [(["--gpus-per-node=8"], "not available"), (["--time=9:00:00"], "time limit"), (["--signal=USR1"], "signal")],
)
def test_the_fake_sbatch_refuses_what_is_wrong(options, why, slurm):
    done = slurm().call("sbatch", *options, "slurm/wlsup.sbatch")
    assert done.returncode != 0
    assert why in done.stderr


def test_torchrun_gets_the_same_options(slurm):
    slurm = slurm()
    variables = {"PYTHON": ROOT / "tests/lsf/stub_python", "GPUS_PER_NODE": 3, "APPROACH": "lora", "RUN_DIR": "here"}
    assert slurm.call("cluster/torchrun.sh", **variables).returncode == 0
    arguments = processes(slurm)["0-0-0"]["arguments"]
    launcher, own = arguments[: arguments.index("fit")], arguments[arguments.index("fit") :]
    assert launcher[:2] == ["-m", "torch.distributed.run"]
    assert launcher[launcher.index("--nproc-per-node") + 1] == "3"
    assert "--standalone" in launcher
    assert own[own.index("--trainer.devices") + 1] == "3"
    assert "experiments/lora.yaml" in own
    refused = slurm.call("cluster/torchrun.sh", NODES=2, GPUS_PER_NODE=1)
    assert refused.returncode == 2
    assert "NODES=2 needs RENDEZVOUS" in refused.stderr
