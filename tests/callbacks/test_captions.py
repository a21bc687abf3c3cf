"""What the captions callback promises: all references, the approach's own loss, and a run that never notices."""

import random
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from wlsup.approaches.linear_map import LinearMap
from wlsup.approaches.mae_lm import MaeLM
from wlsup.batch import CaptionBatch, EvalSet
from wlsup.callbacks.captions import Captions, evaluate_captions
from wlsup.callbacks.knn import KNN
from wlsup.callbacks.undisturbed import undisturbed
from wlsup.data.datamodule import CaptionDataModule
from wlsup.errors import WlsupError
from wlsup.evaluation.captions import score_captions
from wlsup.models.prefix import PrefixSpec
from wlsup.objectives.captioning import CaptioningSpec

PREFIX = PrefixSpec(pool=4, dropout=0.3)  # dropout: what a draw too many would change


def eval_set():
    """Ten noisy pictures of each of two colours, small enough to be scored at once."""
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.full((3, 64, 64), label - 0.5) + torch.randn(3, 64, 64, generator=generator), label)
             for label in (0, 1) * 20]  # fmt: skip
    return EvalSet("noise", "out", pairs[:20], pairs[20:], ["dark", "light"])


def fit(folder, captions, approach=MaeLM, validation_pairs=6, prefix=PREFIX, **options):
    torch.manual_seed(0)
    module = approach(prefix=prefix, **options)
    data = CaptionDataModule(pairs=32, validation_pairs=validation_pairs, batch_size=16, eval_sets=[])
    data.eval_datasets = lambda: [eval_set()]
    board = TensorBoardLogger(folder, name="", version="")
    board.shown = []
    board.experiment.add_image = lambda tag, grid, step: board.shown.append((tag, step, grid))
    board.experiment.add_text = lambda tag, text, step: board.shown.append((tag, step, text))
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=board,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*captions, KNN(bootstrap_resamples=50)],  # the captions before k-NN: it must not notice either
    )
    torch.manual_seed(1)
    trainer.fit(module, data)
    knn = next(callback for callback in trainer.callbacks if isinstance(callback, KNN))
    return SimpleNamespace(module=module, data=data, trainer=trainer, knn=knn.results, board=board)


@pytest.fixture(scope="module")
def with_captions(tmp_path_factory):
    callback = Captions(pictures=5, samples=2, bootstrap_resamples=20)
    run = fit(tmp_path_factory.mktemp("with"), [callback])
    run.captions = callback
    return run


def test_training_and_knn_are_the_same_to_the_bit_with_and_without(with_captions, tmp_path):
    without = fit(tmp_path, [])
    ours = with_captions.module.state_dict()
    for name, tensor in without.module.state_dict().items():
        assert torch.equal(tensor, ours[name]), name
    assert without.knn == with_captions.knn
    assert without.knn["noise"]["finetuned"] >= 0


def test_results_are_the_scores_of_the_captions_against_all_references(with_captions):
    run = with_captions
    loader, references = run.data.held_out(5)
    assert len(references) == 5
    assert all(len(group) == 5 for group in references.values())
    batch = next(iter(loader))
    said = run.module.eval().caption(batch.images)
    expected = score_captions(said, [references[key] for key in batch.keys], resamples=20)
    results = run.captions.results
    assert (results["pictures"], results["references"]) == (5, 25)
    for name, entry in expected["scores"].items():
        assert results["scores"][name] == entry
    assert results["generation"] == "greedy"
    assert results["samples"][0] == {
        "key": batch.keys[0],
        "generated": said[0],
        "references": references[batch.keys[0]],
    }


def test_the_loss_is_the_approachs_own_over_each_pictures_captions(with_captions):
    run = with_captions
    loader, references = run.data.held_out(5)
    losses = []
    for batch in loader:
        for image, key in zip(batch.images, batch.keys, strict=True):
            many = len(references[key])
            with torch.no_grad():
                part = run.module.eval().losses(
                    CaptionBatch(image.expand(many, -1, -1, -1), references[key], [key] * many)
                )
            losses.append(float(part["captioning"]))
    entry = run.captions.results["scores"]["loss"]
    assert entry["value"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]


def test_samples_are_shown_before_step_1_and_after_each_epoch(with_captions):
    board = with_captions.board
    pictures = [(step, grid) for tag, step, grid in board.shown if tag == "captions" and isinstance(grid, torch.Tensor)]
    assert [step for step, _ in pictures] == [0, 2, 4]
    texts = [text for tag, _, text in board.shown if tag == "captions" and isinstance(text, str)]
    _, references = with_captions.data.held_out(2)
    assert len(texts) == 3
    for key, group in references.items():
        assert key in texts[0]
        assert all(caption in texts[0] for caption in group)


@pytest.mark.parametrize(("every", "steps"), [(0, [0, 4]), (2, [0, 4])])
def test_samples_are_shown_as_often_as_asked(every, steps, tmp_path):
    run = fit(tmp_path, [Captions(pictures=0, samples=1, every_n_epochs=every)])
    assert [step for _, step, grid in run.board.shown if isinstance(grid, torch.Tensor)] == steps
    assert run.trainer.callbacks[0].results == {}


@pytest.mark.parametrize(
    "options",
    [
        {"approach": LinearMap, "compare": False},
        {"objective": CaptioningSpec(captioning="parallel")},
        {"objective": CaptioningSpec(caption_view="masked"), "prefix": PrefixSpec()},
    ],
)
def test_every_kind_of_captioner_is_scored(options, tmp_path):
    callback = Captions(pictures=3, samples=0, bootstrap_resamples=5)
    fit(tmp_path, [callback], **options)
    assert callback.results["pictures"] == 3
    assert {"bleu_4", "rouge_l", "cider_d", "loss"} <= set(callback.results["scores"])
    decoder = options.get("objective", CaptioningSpec()).captioning == "parallel"
    assert callback.results["generation"] == ("likeliest words" if decoder else "greedy")


def test_without_a_captioning_loss_it_says_so(tmp_path):
    callback = Captions(pictures=3, samples=0, bootstrap_resamples=5)
    fit(tmp_path, [callback], objective=CaptioningSpec(captioning_weight=0))
    assert "weight 0" in callback.results["absent"]["loss"]
    assert "loss" not in callback.results["scores"]


def test_where_nothing_is_held_out_or_nothing_captions_nothing_happens(tmp_path):
    callback = Captions(bootstrap_resamples=5)
    fit(tmp_path, [callback], validation_pairs=0)
    assert callback.results == {}
    asked = SimpleNamespace(is_global_zero=True, current_epoch=0, loggers=[], datamodule=None)
    for hook in (callback.on_fit_start, callback.on_train_epoch_end, callback.on_train_end):
        hook(asked, torch.nn.Linear(1, 1))
    assert callback.results == {}


def test_other_processes_leave_it_to_the_first(with_captions):
    callback = Captions()
    trainer = SimpleNamespace(
        is_global_zero=False, current_epoch=2, loggers=[with_captions.board], datamodule=with_captions.data
    )
    callback.on_fit_start(trainer, with_captions.module)
    callback.on_train_end(trainer, with_captions.module)
    assert callback.results == {}
    assert callback._shown is None


class Restless(torch.nn.Module):
    """Draws from every random state whenever it is asked."""

    def __init__(self):
        super().__init__()
        self.part = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5))
        self.part[0].eval()
        self.seen = []

    def caption(self, images):
        torch.rand(1), np.random.rand(), random.random()
        self.seen.append((self.training, self.part.training, torch.is_grad_enabled()))
        return ["a dog"] * len(images)

    def losses(self, batch):
        torch.rand(1), np.random.rand(), random.random()
        return {"captioning": self.part(torch.ones(1, 1)).sum()}


def test_evaluation_leaves_no_trace():
    module = Restless()
    modes = [child.training for child in module.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    batch = CaptionBatch(torch.zeros(2, 3, 4, 4), ["", ""], ["a", "b"])
    evaluate_captions(module, [batch], {"a": ["a dog"], "b": ["a cat"]}, resamples=5)
    assert module.seen == [(False, False, False)]
    assert [child.training for child in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    with pytest.raises(KeyError), undisturbed(module):
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), states[0])
    assert [child.training for child in module.modules()] == modes


@pytest.mark.parametrize(
    "wrong", [{"pictures": -1}, {"samples": -1}, {"every_n_epochs": -1}, {"bootstrap_resamples": 0}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(WlsupError, match="captioning"):
        Captions(**wrong)
