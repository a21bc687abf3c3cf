"""What every approach has from its base: what no loss reaches, and losses of held-out pairs."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from wlsup.approaches import approach_class
from wlsup.approaches.checkpoint import saved_names
from wlsup.batch import CaptionBatch
from wlsup.callbacks.dashboard import dashboard_layout
from wlsup.callbacks.evaluation import score_retrieval, sentence_embedder
from wlsup.callbacks.guards import Guards
from wlsup.callbacks.retrieval import Retrieval
from wlsup.errors import WlsupError
from wlsup.models.mae import DecoderSpec
from wlsup.objectives.captioning import CaptioningSpec
from wlsup.objectives.two_branch import ObjectiveSpec


@pytest.mark.parametrize(("name", "weight", "frozen"), [
    ("film", "reconstruction_weight", "mae.decoder."), ("film", "contrastive_weight", "head."),
    ("mae_cl", "reconstruction_weight", "mae.decoder."), ("mae_cl", "contrastive_weight", "head."),
])  # fmt: skip
def test_what_no_loss_reaches_does_not_train(name, weight, frozen):
    approach = approach_class(name)(objective=ObjectiveSpec(**{weight: 0.0}))
    approach.setup("fit")
    names = approach.plan.trained_names(approach)
    assert names and not any(one.startswith(frozen) for one in names)


CONTRASTIVE = [
    *("asymmetric_attention", "bottleneck", "co_attention", "film", "full", "lora", "lst", "mae_cl"),
    *("merged_attention", "selective_k", "token_replay"),
]


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_projections_that_nothing_teaches_are_not_evaluated(name):
    approach = approach_class(name)(objective=ObjectiveSpec(contrastive_weight=0.0))
    batch = CaptionBatch(torch.randn(2, 3, 64, 64), ["red", "green"], list("ab"))
    assert approach.embed(batch) is None
    assert score_retrieval(approach, [batch]) is None
    assert sentence_embedder(approach) is None
    assert "held-out retrieval" not in dashboard_layout([Retrieval()], approach)


@pytest.mark.parametrize("name", ["mae_cl", "mae_lm", "full", "selective_k"])
def test_a_fresh_decoder_learns_at_the_rate_of_what_is_fresh(name):
    spec = {"captioning_weight" if name == "mae_lm" else "contrastive_weight": 1.0, "reconstruction_weight": 1.0}
    objective = CaptioningSpec(**spec) if name == "mae_lm" else ObjectiveSpec(**spec)
    own = {"k": 1, "criterion": "last"} if name == "selective_k" else {}
    for decoder, rate in ((DecoderSpec(), 1e-4), (DecoderSpec(64, 1, 4, pretrained=False), 1e-3)):
        approach = approach_class(name)(objective=objective, decoder=decoder, lr=1e-3, encoder_lr=1e-4, **own)
        rates = {one.rule.lr for one in approach.plan.resolve(approach) if one.name.startswith("mae.decoder.blocks")}
        assert rates == {rate}


def test_under_a_plan_a_fresh_decoder_warms_up_and_the_checkpoint_counts():
    decoder = DecoderSpec(64, 1, 4, pretrained=False, warmup_batches=2)
    approach = approach_class("mae_cl")(decoder=decoder, objective=ObjectiveSpec(contrastive_weight=0.0, micro_batch=2))
    approach.setup("fit")
    batch = CaptionBatch(torch.randn(4, 3, 64, 64), ["red", "green", "blue", "grey"], list("abcd"))
    moved = []
    for _ in range(3):
        approach.zero_grad()
        approach.train().losses(batch)["loss"].backward()
        moved.append(bool(approach.encoder.backbone.patch_embed.proj.weight.grad.any()))
        with torch.no_grad():
            approach.eval().losses(batch)
    assert moved == [False, False, True]
    assert approach.mae.decoder.warmed == 3
    assert "mae.decoder.warmed" in saved_names(approach)


def test_a_null_condition_that_nothing_trains_is_refused():
    with pytest.raises(WlsupError, match="the null condition"):
        ObjectiveSpec(contrastive_weight=0.0, caption_dropout=0.0)


@pytest.mark.parametrize("strategy", ["one", "ddp", "ddp_find_unused_parameters_true"])
def test_a_tensor_that_no_loss_reached_is_told_before_processes_wait_for_it(strategy, monkeypatch, caplog):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    approach = approach_class("full")()
    approach.setup("fit")
    found = {"one": None, "ddp": DDPStrategy(), "ddp_find_unused_parameters_true":
             DDPStrategy(find_unused_parameters=True)}[strategy]  # fmt: skip
    guards, trainer = Guards(), SimpleNamespace(strategy=found)
    if strategy == "ddp":
        with pytest.raises(WlsupError, match=r"No loss reached .* ddp_find_unused_parameters_true"):
            guards.on_after_backward(trainer, approach)
    else:
        guards.on_after_backward(trainer, approach)
        assert "No loss reached" in caplog.text
        guards.on_after_backward(trainer, approach)  # once


def test_held_out_losses_do_not_depend_on_the_number_of_processes(monkeypatch):
    """Each process has all held-out pairs, so nothing is gathered."""
    torch.manual_seed(0)
    approach = approach_class("mae_cl")(objective=ObjectiveSpec(reconstruction_weight=0.0)).eval()
    batch = CaptionBatch(torch.randn(4, 3, 64, 64), ["red", "blue", "a star", "a ring"], ["a", "b", "c", "d"])
    logged = []
    monkeypatch.setattr(approach, "log_dict", lambda values, **options: logged.append(values))
    with torch.no_grad():
        approach.validation_step(batch, 0)
        for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 0)):
            monkeypatch.setattr(torch.distributed, name, lambda *args, value=value: value)
        with pytest.raises(ValueError, match="Default process group"):  # what training would gather
            approach.losses(batch)
        approach.validation_step(batch, 0)
    assert {name: float(value) for name, value in logged[0].items()} == pytest.approx(
        {name: float(value) for name, value in logged[1].items()}
    )
