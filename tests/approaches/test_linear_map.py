"""What linear_map promises beside the contract: one linear map, and a comparison that is given the same training."""

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from wlsup.approaches.linear_map import LinearMap, _Control
from wlsup.batch import CaptionBatch
from wlsup.callbacks.ema import EMA
from wlsup.callbacks.keyed_randomness import KeyedRandomness
from wlsup.data.datamodule import CaptionDataModule
from wlsup.models.language import LanguageSpec
from wlsup.models.prefix import PrefixSpec
from wlsup.objectives.regularizers import RegularizerSpec
from wlsup.optim import OptimizerSpec

PREFIX = PrefixSpec(layer_norm=False, pool=4, dropout=0.0)


def fit(epochs=2, prefix=PREFIX, validation_pairs=16, cache_features=False, ema=0.0, clip=0.1, **options):
    torch.manual_seed(0)
    approach = LinearMap(
        prefix=prefix, lr=1e-2, optimizer=OptimizerSpec(warmup_fraction=0.2), language=LanguageSpec(max_length=24),
        regularizer=RegularizerSpec(ema=ema),
    )  # fmt: skip
    data = CaptionDataModule(
        pairs=96, validation_pairs=validation_pairs, batch_size=16, eval_sets=[], cache_features=cache_features
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=clip,
        callbacks=[EMA(), KeyedRandomness(0)],
        **options,
    )
    trainer.fit(approach, data)
    return approach.eval(), data


@pytest.fixture(scope="module")
def run():
    return fit()


@pytest.fixture(scope="module")
def measured(run):
    return run[0].measure(run[1])


def test_what_trains_is_one_linear_map():
    approach = LinearMap()
    trained = approach.plan.describe(approach)["trained"]
    assert trained == 96 * 128 + 128
    assert approach.untouched


def test_the_comparison_takes_the_runs_own_steps_on_the_runs_own_batches(run):
    approach, data = run
    # Were a control given this encoder, it would have to arrive where the run arrived.
    control = _Control(approach, approach._see)
    approach._train_controls({"itself": control}, data)
    for name, tensor in approach.prefix.state_dict().items():
        assert torch.allclose(control.map.state_dict()[name], tensor, atol=1e-6), name
        assert not torch.allclose(approach._initial[name], tensor, atol=1e-3), name


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 4},
        {"accumulate_grad_batches": 4, "clip": None},  # the last step of an epoch is of two batches, at half weight
        {"limit_train_batches": 3},
        {"max_steps": 7},
        {"ema": 0.9},
        {"clip": 1e-3, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed", "epochs": 1, "limit_train_batches": 3},
        {"scaler": 2.0**16, "epochs": 1, "limit_train_batches": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_also_where_steps_are_of_several_batches_weights_averaged_and_precision_or_clipping_others(options):
    if scale := options.pop("scaler", None):
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale))]
    approach, data = fit(**options)
    control = _Control(approach, approach._see)
    approach._train_controls({"itself": control}, data)
    for name, tensor in approach.prefix.state_dict().items():
        assert torch.allclose(control.map.state_dict()[name], tensor, atol=1e-6), name


def test_measuring_leaves_the_run_as_it_was(run, measured):
    approach, data = run
    before = {name: tensor.clone() for name, tensor in approach.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    assert approach.measure(data) == measured  # and the same again gives the same
    assert torch.equal(torch.rand(2), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in approach.state_dict().items())
    assert data.batch_size == 16
    assert data.trainer is approach.trainer
    assert {name for name, _ in approach.named_parameters() if "prefix" not in name} == {
        name for name, p in approach.named_parameters() if not p.requires_grad
    }


def test_every_comparison_is_there_and_the_own_loss_is_the_validation_loss(run, measured):
    approach, data = run
    rows = {row["what"]: row for row in measured["rows"]}
    assert [row["unit"] for row in measured["rows"]] == ["nats"] * 6 + ["%"]
    assert rows["captions likelier with their own picture"]["chance"] == 50
    with torch.no_grad():
        [batch] = list(data.val_dataloader())
        assert rows["this encoder, this map"]["value"] == pytest.approx(float(approach.losses(batch)["loss"]), abs=1e-4)
    assert rows["this encoder, this map"]["value"] < rows["this encoder, an untrained map"]["value"]
    assert set(rows) >= {"a random encoder, its map", "no picture (grey), its map", "the language model alone"}
    assert rows["the language model alone"]["value"] < 4
    assert len(measured["captions"]) == 4
    assert {"key", "caption", "generated"} == set(measured["captions"][0])
    assert measured["note"].count("nats a token against this encoder") == 2


def test_the_grey_picture_says_nothing_and_the_random_encoder_something(run):
    approach, _ = run
    controls, batch = approach._controls(), CaptionBatch(torch.randn(3, 3, 64, 64), ["a"] * 3, list("abc"))
    grey = controls["no picture (grey), its map"].see(batch)
    assert grey.tokens.shape == (3, 65, 96)
    assert torch.equal(grey.tokens[0], grey.tokens[1])
    random = controls["a random encoder, its map"].see(batch)
    assert not torch.allclose(random.tokens[0], random.tokens[1], atol=1e-3)
    assert not torch.allclose(random.tokens, approach._see(batch).tokens, atol=1e-3)
    assert torch.equal(random.tokens, approach._controls()["a random encoder, its map"].see(batch).tokens)


def test_on_cached_features_it_trains_and_compares_what_needs_no_pictures():
    approach, data = fit(cache_features=True)
    control = _Control(approach, approach._see)
    approach._train_controls({"itself": control}, data)
    for name, tensor in approach.prefix.state_dict().items():
        assert torch.allclose(control.map.state_dict()[name], tensor, atol=1e-6), name
    measured = approach.measure(data)
    whats = [row["what"] for row in measured["rows"]]
    assert "no picture (grey), its map" in whats
    assert "a random encoder, its map" not in whats
    assert "needs pictures" in measured["note"]


def test_a_comparison_that_fails_leaves_its_rows_out_and_the_rest_stands(run, measured, monkeypatch):
    approach, data = run

    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(approach, "_train_controls", fails)
    task = approach.measure(data)
    compared = {"a random encoder, its map", "no picture (grey), its map"}
    assert task["rows"] == [row for row in measured["rows"] if row["what"] not in compared]
    assert "CUDA out of memory" in task["note"]
    assert task["captions"] == measured["captions"]


def test_nothing_held_out_is_nothing_measured():
    approach, data = fit(epochs=1, validation_pairs=0)
    assert approach.measure(data) == {}


def test_compare_can_be_left_out(run):
    approach, data = run
    approach.compare = False
    try:
        whats = [row["what"] for row in approach.measure(data)["rows"]]
    finally:
        approach.compare = True
    assert "a random encoder, its map" not in whats
    assert len(whats) == 5


def test_a_caption_behind_the_mapped_picture(run):
    approach, data = run
    [batch] = list(data.val_dataloader())
    said = approach.caption(batch.images)
    assert len(said) == 16
    assert all(said)
