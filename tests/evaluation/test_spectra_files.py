"""Pictures and files of spectra: what is drawn, what an earlier analysis left, nothing half."""

import json

import numpy as np
import pytest
from scipy.integrate import trapezoid

from wlsup.errors import WlsupError
from wlsup.evaluation.figures.spectra import alpha_figure, esd_figure, short_names
from wlsup.evaluation.spectra import LayerSpectrum
from wlsup.evaluation.spectra_files import earlier_along, write_spectra
from wlsup.evaluation.spectra_table import summary_lines

NONE = dict.fromkeys(("alpha", "sigma", "D", "tail", "xmin", "alpha_weighted", "log_norm", "rand_distance"))
NONE |= {"power_law": False, "why": "the matrix is zero", "num_spikes": None}
GOOD = NONE | {"power_law": True, "why": None, "alpha": 3.0, "sigma": 0.3, "D": 0.05, "tail": 30, "xmin": 1.5}
VALUES = np.sort(np.random.default_rng(0).pareto(2.0, 60) + 1)


def report_of(*names):
    layers = [{"name": name, "shape": [60, 60], "before": GOOD, "after": NONE} for name in names]
    column = {"layers": 1, "power_law": 1, "alpha": {"mean": 3.0, "ci95": [2.5, 3.5]}, "alpha_median": 3.0}
    column |= {"over_trained": 0, "under_trained": 0}
    summary = {"before": column, "after": None, "change": {"layers": 0, "alpha": None}}
    return {"protocol": "p; random: x", "layers": layers, "summary": summary, "skipped": []}


def columns_of(*names):
    return {
        "before": {name: LayerSpectrum(VALUES, GOOD) for name in names},
        "after": {name: LayerSpectrum(np.zeros(60), NONE) for name in names},
    }


def test_the_fitted_tail_is_drawn_through_the_eigenvalues_and_only_where_there_is_one():
    figure = esd_figure("fc1", {"before": LayerSpectrum(VALUES, GOOD), "after": LayerSpectrum(VALUES, NONE)})
    density, survival = figure.axes
    fits = [line for line in survival.lines if line.get_linestyle() == "--"]
    assert len(fits) == 1
    x, y = fits[0].get_data()
    assert x[0] == GOOD["xmin"]
    assert y[0] == pytest.approx(30 / 60)  # the share of eigenvalues in the tail
    assert np.diff(np.log(y)) / np.diff(np.log(x)) == pytest.approx(1 - 3.0)  # the survival function of a power law
    fit = next(line for line in density.lines if line.get_linestyle() == "--")
    assert trapezoid(*reversed(fit.get_data())) < 30 / 60
    assert survival.get_xscale() == survival.get_yscale() == density.get_xscale() == "log"
    assert [text.get_text().split(":")[0] for text in survival.get_legend().get_texts()] == ["before", "after"]


def test_layers_without_a_power_law_have_no_alpha_in_the_picture():
    figure = alpha_figure(report_of("blocks.0.mlp.fc1", "blocks.1.mlp.fc1")["layers"])
    upper, lower = figure.axes
    labels = [text.get_text() for text in upper.get_legend().get_texts()]
    assert labels == ["before (pretrained)", "after (trained): none has a power law"]
    assert len(lower.lines[1].get_xdata()) == 2
    assert len(lower.lines[0].get_xdata()) == 0


def test_names_lose_what_stands_before_the_encoders_own():
    assert short_names(["mae.encoder.backbone.blocks.0.attn.qkv.q", "adapter.0.update"]) == [
        "blocks.0.attn.qkv.q",
        "adapter.0.update",
    ]


def test_a_second_analysis_leaves_no_picture_of_the_first(tmp_path):
    (tmp_path / "spectra").mkdir()
    (tmp_path / "spectra" / "mine.png").write_text("a picture of somebody else's")
    write_spectra(tmp_path, report_of("a.x", "a.y"), columns_of("a.x", "a.y"))
    assert {path.name for path in (tmp_path / "spectra").iterdir()} == {"a.x.png", "a.y.png", "mine.png"}
    assert (tmp_path / "spectra.svg").stat().st_size > 1000
    write_spectra(tmp_path, report_of("a.y"), columns_of("a.y"))
    assert {path.name for path in (tmp_path / "spectra").iterdir()} == {"a.y.png", "mine.png"}
    assert len(json.loads((tmp_path / "spectra.json").read_text())["layers"]) == 1
    write_spectra(tmp_path, report_of("a.y"), columns_of("a.y"), figures=False)
    assert not (tmp_path / "spectra.png").exists()


def test_what_was_measured_along_training_is_kept_where_it_was_measured_alike(tmp_path):
    assert earlier_along(tmp_path, "p") == []
    write_spectra(tmp_path, report_of("a") | {"along": [{"step": 1}]}, columns_of("a"), figures=False)
    assert earlier_along(tmp_path, "p; random: another seed") == [{"step": 1}]
    assert earlier_along(tmp_path, "q") == []
    (tmp_path / "spectra.json").write_text("[1")
    assert earlier_along(tmp_path, "p") == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WlsupError, match="Cannot write"):
        write_spectra(tmp_path / "file", report_of("a"), columns_of("a"), figures=False)


def test_no_mean_stands_without_its_interval_and_protocol():
    lines = summary_lines(report_of("a"))
    assert "mean alpha 3.00 [2.50, 3.50]" in lines[0]
    assert lines[-1] == "p; random: x"
