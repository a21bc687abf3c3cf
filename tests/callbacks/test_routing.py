"""What the routing monitor promises: each layer's figures in TensorBoard, in a group of their own, and else nothing."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from wlsup.approaches.magma import Magma
from wlsup.approaches.magma_moe import MagmaMoE
from wlsup.callbacks.routing import RoutedLayer, routed_layers, routing_layout
from wlsup.cli import main
from wlsup.moe import MoE, MoESpec

FIGURES = ("load_entropy", "load_max", "load_min", "entropy", "dropped", "max_logit", "dead")
LAYERS = [f"mixtures.mlp.{block}" for block in range(4)]


def fit(folder, recipe, *options):
    assert main([
        "fit", "-c", "experiments/base.yaml", "-c", f"experiments/{recipe}.yaml", "--data.pairs", "64",
        "--data.batch_size", "16", "--data.validation_pairs", "0", "--data.eval_sets", "[]", "--trainer.max_epochs",
        "1", "--model.encoder_lr", "0", "--data.cache_features", "true", "--run_dir", str(folder), *options,
    ]) == 0  # fmt: skip
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    layout = layout_pb2.Layout()
    layout.ParseFromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    return board, {category.title: category for category in layout.category}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *fit(folder, "magma_moe", "--trainer.log_every_n_steps", "2")


def test_each_layers_figures_are_in_the_event_files_at_the_steps_of_the_others(run):
    _, board, _ = run
    tags = {tag for tag in board.Tags()["scalars"] if tag.startswith("routing/")}
    assert {f"routing/{figure}/{layer}" for figure in FIGURES for layer in LAYERS} <= tags
    for layer in LAYERS:
        loads = [board.Scalars(f"routing/load/{layer}/{expert}") for expert in range(4)]
        assert [event.step for event in loads[0]] == [2, 4]
        for events in zip(*loads, strict=True):
            assert sum(event.value for event in events) == pytest.approx(1.0)
        most = board.Scalars(f"routing/load_max/{layer}")
        assert most[-1].value == pytest.approx(max(events[-1].value for events in loads))
        assert board.Scalars(f"routing/dead/{layer}")[-1].value == sum(events[-1].value == 0 for events in loads)
        assert board.Scalars(f"routing/max_logit/{layer}")[-1].value > 0
        assert board.Scalars(f"routing/dropped/{layer}")[-1].value == 0.0


def test_the_auxiliary_losses_are_logged_too(run):
    _, board, _ = run
    assert {"train/balance", "train/router_z", "train/captioning"} <= set(board.Tags()["scalars"])


def test_the_layout_has_a_group_of_its_own_whose_charts_have_lines(run):
    import re

    _, board, layout = run
    tags = board.Tags()["scalars"]
    charts = {chart.title: list(chart.multiline.tag) for chart in layout["routing"].chart}
    assert len(charts) == len(FIGURES) + len(LAYERS)
    for title, patterns in charts.items():
        lines = [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]
        assert len(lines) == 4, title  # a line a layer, or an expert


def test_figures_are_in_the_table_of_metrics_too(run):
    folder, _, _ = run
    assert "routing/entropy/mixtures.mlp.0" in (folder / "metrics.csv").read_text().splitlines()[0]


def test_hash_routing_has_figures_and_no_losses(tmp_path):
    board, layout = fit(
        tmp_path,
        "magma_moe",
        "--model.moe.router",
        "hash",
        "--model.mixture",
        "ffn",
        "--trainer.log_every_n_steps",
        "1",
    )
    assert "routing" in layout
    assert not any(tag.endswith(("balance", "router_z")) for tag in board.Tags()["scalars"])
    assert len([tag for tag in board.Tags()["scalars"] if tag.startswith("routing/dead/")]) == 2


def test_nothing_where_there_are_no_such_layers(tmp_path):
    board, layout = fit(tmp_path, "magma", "--trainer.log_every_n_steps", "1")
    assert "routing" not in layout
    assert not [tag for tag in board.Tags()["scalars"] if "routing" in tag]
    assert json.loads((tmp_path / "results.json").read_text())["guards"] == {"skipped_steps": 0, "spikes": 0}


def test_layers_are_found_by_what_they_have():
    approach = MagmaMoE(moe=MoESpec(experts=2, k=1))
    assert list(routed_layers(approach)) == LAYERS
    assert all(isinstance(layer, MoE | RoutedLayer) for layer in routed_layers(approach).values())
    assert routing_layout(Magma()) == {}
