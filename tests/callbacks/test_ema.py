"""The average: its value, who sees it, and that a resumed run goes on as the unbroken one."""

import json

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from wlsup.approaches import approach_class
from wlsup.batch import CaptionBatch
from wlsup.callbacks.ema import EMA
from wlsup.callbacks.keyed_randomness import KeyedRandomness
from wlsup.errors import WlsupError
from wlsup.objectives.regularizers import RegularizerSpec

NAME = "head.image.weight"


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    captions = ["a red square", "a blue star", "two rings", "a green circle"]
    return [
        CaptionBatch(torch.randn(4, 3, 64, 64, generator=generator), captions, [f"{n}/{i}" for i in range(4)])
        for n in range(count)
    ]


class Watch(Callback):
    """Records the weights after each step, and what validation and the end of an epoch see."""

    def __init__(self):
        self.steps, self.validation, self.epochs = [], [], []

    def on_train_batch_end(self, trainer, module, *rest):
        self.steps.append(module.state_dict()[NAME].clone())

    def on_validation_batch_start(self, trainer, module, *rest):
        self.validation.append(module.state_dict()[NAME].clone())

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append(module.state_dict()[NAME].clone())


def fit(folder, ema, epochs=2, resume=None, callbacks=None):
    torch.manual_seed(0)
    module, watch = approach_class("lit")(regularizer=RegularizerSpec(ema=ema), lr=1e-2), Watch()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        callbacks=[EMA(), KeyedRandomness(0), watch] if callbacks is None else callbacks,
    )  # fmt: skip
    module.optimizer_spec = module.optimizer_spec.__class__(schedule="constant", warmup_fraction=0.0)
    loader = DataLoader(batches(), batch_size=None)
    trainer.fit(module, loader, DataLoader(batches(1), batch_size=None), ckpt_path=resume, weights_only=True)
    return trainer, module, watch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("ema"), 0.6)


def test_it_is_the_exponential_average_with_a_growing_decay(run, tmp_path):
    _, module, watch = run
    start = fit(tmp_path, 0.6, epochs=0)[1].state_dict()[NAME]
    average = start.clone()
    for t, weights in enumerate(watch.steps):
        decay = min(0.6, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * weights
    assert torch.allclose(module.state_dict()[NAME], average, atol=1e-6)
    assert not torch.allclose(module.state_dict()[NAME], watch.steps[-1], atol=1e-4)


def test_validation_and_epoch_end_see_the_average_and_training_goes_on_from_the_weights(run, tmp_path):
    _, module, watch = run
    plain = fit(tmp_path, 0.0)[2]
    assert all(torch.equal(one, other) for one, other in zip(watch.steps, plain.steps, strict=True))
    assert torch.equal(watch.epochs[-1], module.state_dict()[NAME])
    assert torch.equal(watch.validation[-1], watch.epochs[-1])
    assert torch.equal(plain.validation[-1], plain.steps[-1])


def test_a_checkpoint_holds_the_average_and_the_weights_and_resumes_exactly(run, tmp_path):
    _, module, watch = run
    trainer, half, _ = fit(tmp_path, 0.6, epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"][NAME], half.state_dict()[NAME])
    assert torch.equal(saved["ema"]["weights"][NAME], watch.steps[3])
    _, resumed, rest = fit(tmp_path, 0.6, resume=tmp_path / "half.ckpt")
    assert torch.equal(rest.steps[-1], watch.steps[-1])
    assert torch.equal(resumed.state_dict()[NAME], module.state_dict()[NAME])
    with pytest.raises(WlsupError, match="average"):
        fit(tmp_path, 0.0, resume=tmp_path / "half.ckpt")


def test_without_the_callback_the_option_is_refused(tmp_path):
    with pytest.raises(WlsupError, match="EMA"):
        fit(tmp_path, 0.5, epochs=1, callbacks=[])


def test_the_command_averages_by_one_option(tmp_path):
    from wlsup.cli import main

    assert main([
        "fit", "-c", "experiments/base.yaml", "-c", "experiments/lit.yaml", "--run_dir", str(tmp_path / "run"),
        "--data.pairs", "128", "--data.validation_pairs", "16", "--data.eval_sets", "[mini_digits]",
        "--trainer.max_epochs", "1", "--model.regularizer.ema", "0.9",
    ]) == 0  # fmt: skip
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert not torch.equal(checkpoint["state_dict"][NAME], checkpoint["ema"]["weights"][NAME])
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    assert cost["peak_memory_mib"]["resident"] > 0
    assert 0 < cost["processor_seconds"] < 64 * cost["seconds"]
