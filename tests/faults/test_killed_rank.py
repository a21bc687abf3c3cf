"""One process of a run is killed in mid-epoch: the rest end, nothing hangs, and the run goes on where it saved."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from wlsup.checkpoint_file import read_checkpoint
from wlsup.cli import main

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
STEPS = 16  # 128 pairs, two processes of 8, two epochs


def start(folder, *options):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "wlsup",
        "fit", "-c", "experiments/base.yaml", "-c", "experiments/lit.yaml", "--run_dir", folder / "run",
        "--data.pairs", "128", "--data.validation_pairs", "16", "--data.batch_size", "8", "--data.eval_sets", "[]",
        "--trainer.max_epochs", "2", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator",
        "cpu", "--trainer.log_every_n_steps", "1", "--checkpoints.every_minutes", "1e-6", *options,
    ]  # fmt: skip
    with (folder / "output").open("a") as output:
        return subprocess.Popen(list(map(str, command)), stdout=output, stderr=output)


def ranks(folder):
    """Process ids of the run, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        rank = [value[len(b"LOCAL_RANK=") :] for value in environ if value.startswith(b"LOCAL_RANK=")]
        if rank and os.fsencode(folder / "run") in command:
            found[int(rank[0])] = int(process.name)
    return found


def losses(folder):
    with (folder / "run" / "metrics.csv").open() as file:
        return [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


DIES = """
import os, signal, sys
from wlsup.approaches.base import Approach
from wlsup.cli import main
step = Approach.training_step
def dies(self, batch, batch_idx):
    if self.trainer.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
Approach.training_step = dies
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("name", "options"),
    [("film", ["--model.regularizer.ema", "0.9"]), ("magma_moe", ["--model.moe.balance", "bias"])],
)
def test_killed_steps_after_the_checkpoint_it_logs_each_step_once_and_ends_as_the_unbroken_run(name, options, tmp_path):
    def command(folder):
        words = [
            "fit", "-c", "experiments/base.yaml", "-c", f"experiments/{name}.yaml", "--run_dir", folder / "run",
            "--data.pairs", "32", "--data.validation_pairs", "8", "--data.batch_size", "8", "--data.eval_sets", "[]",
            "--captioning.pictures", "0", "--reconstructions.pictures", "0", "--trainer.max_epochs", "2",
            "--trainer.log_every_n_steps", "1", *options,
        ]  # fmt: skip
        return list(map(str, words))

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert subprocess.run([sys.executable, "-c", DIES, *command(cut)], timeout=300).returncode == -signal.SIGKILL
    assert read_checkpoint(cut / "run" / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert len(losses(cut)) == 7
    assert main([*command(cut), "--resume", "auto"]) == 0
    assert main(command(whole)) == 0
    assert [step for step, _ in losses(cut)] == list(range(8))
    assert losses(cut) == losses(whole)
    one, other = (read_checkpoint(folder / "run" / "checkpoints" / "last.ckpt") for folder in (cut, whole))
    assert all(torch.equal(one["state_dict"][key], tensor) for key, tensor in other["state_dict"].items())
    if name == "film":
        assert all(torch.equal(one["ema"]["weights"][key], mean) for key, mean in other["ema"]["weights"].items())


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_all_and_the_run_goes_on(tmp_path):
    run = start(tmp_path)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.02)
        os.kill(ranks(tmp_path)[1], signal.SIGKILL)
        assert run.wait(timeout=90) != 0
    finally:
        run.kill()
    assert not ranks(tmp_path)
    assert not (tmp_path / "run" / "results.json").exists()
    assert start(tmp_path, "--resume", "auto").wait(timeout=300) == 0, (tmp_path / "output").read_text()
    assert "going on from" in (tmp_path / "output").read_text()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == STEPS
    whole = tmp_path / "whole"
    whole.mkdir()
    assert start(whole).wait(timeout=300) == 0, (whole / "output").read_text()
    found, wanted = losses(tmp_path), losses(whole)
    assert [step for step, _ in wanted] == list(range(STEPS))
    # Each step once, but for the one after whose checkpoint it may have died before its row was written.
    assert set(found) <= set(wanted) and STEPS - 1 <= len(set(found)) == len(found)
    one, other = (read_checkpoint(folder / "run" / "checkpoints" / "last.ckpt") for folder in (tmp_path, whole))
    assert all(torch.equal(one["state_dict"][name], tensor) for name, tensor in other["state_dict"].items())
