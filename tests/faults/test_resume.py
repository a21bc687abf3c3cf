"""A run that was told to stop, and resumed, ends as the unbroken one, bit for bit: every approach."""

import csv
import json
import os
import signal

import pytest
import torch

from wlsup.approaches import APPROACHES
from wlsup.approaches.base import Approach
from wlsup.checkpoint_file import read_checkpoint
from wlsup.cli import main

FRAMES = ["--model.probe_pictures", "100", "--model.compare", "false"]
OPTIONS = {
    "reprogramming": ["--data.eval_sets", "[mini_shapes,mini_digits]", *FRAMES],
    "cross_modal_reprogramming": ["--data.eval_sets", "[mini_shapes]", *FRAMES],
    "film": ["--model.regularizer.l2sp", "0.1"],
}


def command(name, folder, *options):
    return [
        "fit", "-c", "experiments/base.yaml", "-c", f"experiments/{name}.yaml", "--run_dir", str(folder),
        "--data.pairs", "32", "--data.validation_pairs", "8", "--data.batch_size", "8", "--data.eval_sets", "[]",
        "--captioning.pictures", "0", "--captioning.samples", "0", "--reconstructions.pictures", "0",
        "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--model.regularizer.ema", "0.9",
        *OPTIONS.get(name, []), *options,
    ]  # fmt: skip


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.slow
@pytest.mark.usefixtures("few_mini_pictures")
@pytest.mark.parametrize("name", APPROACHES)
def test_stopped_within_an_epoch_and_resumed_every_loss_and_weight_is_the_unbroken_runs(name, tmp_path, monkeypatch):
    assert main(command(name, tmp_path / "whole")) == 0
    step = Approach.training_step

    def stop_at_5(self, batch, batch_idx):
        if self.trainer.global_step == 4:  # the fifth step, the first of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Approach, "training_step", stop_at_5)
        assert main(command(name, tmp_path / "cut")) == 75
    assert not (tmp_path / "cut" / "results.json").exists()
    assert read_checkpoint(tmp_path / "cut" / "checkpoints" / "last.ckpt")["global_step"] == 5
    assert main(command(name, tmp_path / "cut", "--resume", "auto")) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = (read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("cut", "whole"))
    assert one["global_step"] == other["global_step"] == 8
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for key, tensor in other["state_dict"].items():
        assert torch.equal(one["state_dict"][key], tensor), key
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("cut", "whole")]
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}
    assert main(command(name, tmp_path / "cut", "--resume", "auto")) == 0  # finished: nothing is done again
