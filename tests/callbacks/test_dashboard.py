"""TensorBoard as a dashboard: every chart has its lines, and only its lines; HParams and projector say what was run."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from wlsup.callbacks.captions import Captions
from wlsup.callbacks.dashboard import dashboard_layout
from wlsup.callbacks.guards import Guards
from wlsup.callbacks.knn import KNN
from wlsup.callbacks.projector import Projector, spread, thumbnail
from wlsup.callbacks.retrieval import Retrieval
from wlsup.cli import main
from wlsup.errors import WlsupError

SETS = {"mini_shapes": "in", "mini_digits": "out"}
NEVER_IN_A_HEALTHY_RUN = "skipped steps, loss spikes (none: no line)"


class Module(torch.nn.Module):
    """An approach with a shared space."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(1, 1)
        self.objective = SimpleNamespace(reconstruction_weight=1.0, contrastive_weight=1.0)


def knn_of(**sets):
    knn = KNN()
    knn.sets = [SimpleNamespace(name=name, domain=domain) for name, domain in sets.items()]
    return knn


def drawn(layout, group, chart, tags):
    kind, patterns = layout[group][chart]
    assert kind == "Multiline"
    return [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]


def test_domains_have_groups_of_their_own_and_a_tag_is_not_taken_for_one_that_it_begins():
    layout = dashboard_layout([knn_of(a="in", b="out"), Retrieval()], Module())
    tags = ["knn/a", "knn/ab", "knn/b", "knn_delta/a", "retrieval/image_to_text_R@1", "retrieval/image_to_text_R@10"]
    assert list(layout)[:2] == ["in domain", "out of domain"]
    assert drawn(layout, "in domain", "k-NN accuracy", tags) == ["knn/a"]
    assert drawn(layout, "out of domain", "k-NN accuracy", tags) == ["knn/b"]
    assert drawn(layout, "held-out retrieval", "picture to text", tags) == tags[-2:]
    patterns = layout["held-out retrieval"]["picture to text"][1]
    assert sum(bool(re.match(pattern, tags[-1])) for pattern in patterns) == 1


def test_a_sets_name_is_no_pattern():
    layout = dashboard_layout([knn_of(**{"x+y (1)": "in"})], Module())
    assert drawn(layout, "in domain", "k-NN accuracy", ["knn/x+y (1)", "knn/xxy 1"]) == ["knn/x+y (1)"]


def test_what_a_run_does_not_log_has_no_chart():
    layout = dashboard_layout([Captions()], torch.nn.Linear(1, 1))
    assert set(layout) == {"losses", "the run itself"}
    assert list(layout["losses"]) == ["what is minimised: training, held out"]


def test_wise_ft_and_spectra_have_charts_where_they_are_on():
    wise_ft, spectra = (type(name, (), {"enabled": True})() for name in ("WiseFT", "Spectra"))
    layout = dashboard_layout([knn_of(a="in"), wise_ft, spectra], Module())
    assert {"WiSE-FT", "spectra"} <= set(layout)
    assert drawn(layout, "in domain", "WiSE-FT: accuracy over alpha, in %", ["wise_ft/a", "wise_ft/ab"]) == [
        "wise_ft/a"
    ]
    wise_ft.enabled = spectra.enabled = False
    layout = dashboard_layout([knn_of(a="in"), wise_ft, spectra], Module())
    assert not {"WiSE-FT", "spectra"} & set(layout)
    assert len(layout["in domain"]) == 4


def test_learning_rates_with_brackets_which_tensorboard_cannot_draw_are_left_out():
    layout = dashboard_layout([Guards()], Module())
    assert drawn(layout, "the run itself", "learning rates", ["lr-AdamW/a.*", "lr-AdamW/a.* (no decay)"]) == [
        "lr-AdamW/a.*"
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_mini_pictures):
    folder = tmp_path_factory.mktemp("run")
    assert main([
        "fit", "-c", "experiments/base.yaml", "-c", "experiments/film.yaml", "--data.pairs", "32",
        "--data.batch_size", "16",
        "--data.validation_pairs", "16", "--data.eval_sets", f"[{', '.join(SETS)}]", "--trainer.max_epochs", "1",
        "--trainer.log_every_n_steps", "1", "--projector.pictures", "40", "--run_dir", str(folder),
    ]) == 0  # fmt: skip
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    return folder, board


def test_every_chart_of_a_real_run_has_lines(run):
    _, board = run
    layout = layout_pb2.Layout()
    layout.ParseFromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    tags = board.Tags()["scalars"]
    groups = {category.title: category.chart for category in layout.category}
    assert {"in domain", "out of domain", "losses", "held-out retrieval"} <= set(groups)
    for group, charts in groups.items():
        for chart in charts:
            lines = [tag for tag in tags if any(re.match(pattern, tag) for pattern in chart.multiline.tag)]
            lines += [
                line for band in chart.margin.series for line in (band.value, band.lower, band.upper) if line in tags
            ]
            assert lines or chart.title == NEVER_IN_A_HEALTHY_RUN, (group, chart.title)


def test_hparams_begin_with_what_tells_runs_apart_and_with_the_changes(run):
    _, board = run
    data = plugin_data_pb2.HParamsPluginData()
    data.ParseFromString(board.summary_metadata["_hparams_/experiment"].plugin_data.content)
    names = [info.name for info in data.experiment.hparam_infos]
    metrics = [info.name.tag for info in data.experiment.metric_infos]
    told = [info.name for info in data.experiment.hparam_infos if info.differs]  # TensorBoard shows five, these first
    assert told == ["approach", "seed", "model.lr", "data.pairs", "trainer.max_epochs"]
    assert metrics[:2] == ["summary/in_domain_delta", "summary/out_of_domain_delta"]
    assert not [
        name for name in names if name.startswith(("captioning.", "reconstructions.", "guards.", "trainer.logger"))
    ]
    start = plugin_data_pb2.HParamsPluginData()
    start.ParseFromString(board.summary_metadata["_hparams_/session_start_info"].plugin_data.content)
    assert start.session_start_info.hparams["approach"].string_value == "film"
    assert start.session_start_info.hparams["seed"].number_value == 0


def test_the_projector_has_features_classes_and_thumbnails_before_and_after(run):
    folder, _ = run
    config = (folder / "projector_config.pbtxt").read_text()
    results = json.loads((folder / "results.json").read_text())
    for name in SETS:
        features = {}
        for step in (0, results["steps"]):
            place = folder / f"{step:05d}" / name
            assert f"{step:05d}/{name}" in config
            features[step] = np.loadtxt(place / "tensors.tsv", delimiter="\t")
            assert features[step].shape == (40, 96)
            assert np.linalg.norm(features[step], axis=1) == pytest.approx(1, abs=1e-3)
            assert len((place / "metadata.tsv").read_text().splitlines()) == 40
            assert Image.open(place / "sprite.png").size == (7 * 32, 7 * 32)
        assert not np.allclose(*features.values())


def test_the_projector_is_off_unless_asked_for_and_refuses_what_a_browser_cannot_draw(tmp_path):
    trainer = SimpleNamespace(ckpt_path=None, loggers=[], is_global_zero=True, datamodule=None)
    Projector().on_fit_start(trainer, Module())  # looks at no data
    with pytest.raises(WlsupError, match="0..2500"):
        Projector(pictures=5000)


def test_pictures_are_spread_over_the_set():
    assert list(spread(range(10), 4)) == [0, 2, 5, 7]
    assert list(spread(range(3), 9)) == [0, 1, 2]


def test_a_thumbnail_is_the_picture_itself_made_small():
    from wlsup.batch import ImageSpec

    spec = ImageSpec(size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    colour = torch.tensor([0.9, 0.1, 0.5]).view(3, 1, 1)
    normalised = (colour - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)
    small = thumbnail(normalised.expand(3, 64, 64), spec)
    assert small.shape == (3, 32, 32)
    assert torch.allclose(small, colour.expand(3, 32, 32), atol=1e-5)
