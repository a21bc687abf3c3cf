"""The plan is the one place that says what trains."""

import pytest
import torch
from torch import nn

from wlsup.errors import WlsupError
from wlsup.plan import Freeze, Train, TrainPlan, plan_markdown


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))


def test_first_matching_rule_decides():
    model = Model()
    plan = TrainPlan([Freeze("body.0.*"), Train("*", 0.1)])
    plan.apply(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["body.0.weight", "body.0.bias"]


def test_a_parameter_no_rule_names_is_an_error_that_names_it():
    with pytest.raises(WlsupError, match=r"'body\.0\.weight'"):
        TrainPlan([Train("head.*", 0.1)]).resolve(Model())


def test_a_rule_that_decides_about_nothing_is_an_error_that_names_it():
    with pytest.raises(WlsupError, match=r"'adapter\.\*'"):
        TrainPlan([Train("adapter.*", 0.1), Freeze("*")]).resolve(Model())
    with pytest.raises(WlsupError, match=r"'head\.\*'"):
        TrainPlan([Freeze("*"), Train("head.*", 0.1)]).resolve(Model())
    TrainPlan([Train("adapter.*", 0.1, optional=True), Freeze("*")]).resolve(Model())


def test_frozen_modules_stay_in_eval_and_trained_ones_train():
    model = Model()
    plan = TrainPlan([Train("head.*", 0.1), Freeze("body.*")])
    for _ in range(2):
        model.train()
        plan.set_train_mode(model)
        assert not any(module.training for module in model.body.modules())
        assert all(module.training for module in model.head.modules())
    everything = TrainPlan([Train("*", 0.1)])
    model.eval()
    everything.set_train_mode(model)
    assert all(module.training for module in model.modules())


def test_frozen_batch_norm_statistics_do_not_move_beside_a_trained_layer():
    model = Model()
    plan = TrainPlan([Freeze("body.1.*"), Train("*", 0.1)])
    plan.set_train_mode(model)
    before = model.body[1].running_mean.clone()
    model.body(torch.randn(8, 4) + 5)
    assert torch.equal(before, model.body[1].running_mean)


def test_groups_cover_exactly_what_trains_and_spare_vectors_the_decay():
    model = Model()
    plan = TrainPlan([Freeze("body.0.*"), Train("body.*", 0.1, 0.3), Train("head.*", 0.2, 0.3)])
    plan.apply(model)
    groups = plan.parameter_groups(model)
    given = [p for group in groups for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(given) == len({id(p) for p in given})
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.ndim >= 2 else 0.0)
    assert {group["lr"] for group in groups} == {0.1, 0.2}


def test_negative_rates_are_refused():
    with pytest.raises(WlsupError, match=">= 0"):
        TrainPlan([Train("*", -1.0)])
    with pytest.raises(WlsupError, match="at least one rule"):
        TrainPlan([])


def test_description_counts_what_trains():
    model = Model()
    plan = TrainPlan([Train("head.*", 0.1), Freeze("body.*")])
    described = plan.describe(model)
    assert described["trained"] == 10
    assert described["total"] == 38
    assert "10 of 38" in plan.summary(model)
    assert "| `body.*` | frozen |" in plan_markdown(described)
