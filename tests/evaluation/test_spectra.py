"""Spectra against weightwatcher itself, against spectra that are known, and the traps on the way."""

import logging
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import timm
import torch
from torch import nn

from wlsup.errors import WlsupError
from wlsup.evaluation import watcher
from wlsup.evaluation.spectra import (
    LayerSpectrum,
    SpectraSpec,
    layer_spectrum,
    random_like,
    spectra,
    spectra_report,
    summarize,
)
from wlsup.evaluation.weight_views import LeftOut, WeightView, weight_views

PLAIN = SpectraSpec(randomize=False)


def with_eigenvalues(eigenvalues, rows=None, seed=0):
    """Return a matrix whose W^T W has these eigenvalues."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, n, dtype=torch.float64, generator=generator))[0] for size in (rows or n, n)
    )
    return left @ torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64).sqrt()) @ right.T


def pareto(alpha, count, seed=0):
    return (1 - np.random.default_rng(seed).random(count)) ** (-1 / (alpha - 1))


def metrics_of(matrix, spec=PLAIN, **options):
    return layer_spectrum(matrix, spec, **options).metrics


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=0
    )
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:  # heavy tails, so that there is something to fit
            parameter.data *= torch.from_numpy(pareto(3.0, parameter.shape[1])).float().sqrt()
    return model


def test_it_is_weightwatchers_own_figures_on_the_layers_that_both_see(vit):
    views = weight_views(vit, fused=True)[0]
    ours = {name: spectrum.metrics for name, spectrum in spectra(views, PLAIN).items()}
    theirs = watcher._weightwatcher().WeightWatcher(model=vit).analyze(min_evals=50, svd_method="accurate")
    rows = {row["longname"]: row for row in theirs.to_dict("records") if row["layer_type"] == "dense"}
    assert set(rows) == {
        f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    for name, row in rows.items():
        mine = ours[name]
        for key, their_key in (("fitted_alpha", "alpha"), ("D", "D"), ("log_norm", "log_norm"), ("sigma", "sigma")):
            assert mine[key] == pytest.approx(row[their_key], rel=1e-6), (name, key)
        assert mine["xmin"] == pytest.approx(row["xmin"], rel=1e-6)
        assert mine["tail"] == row["num_pl_spikes"]
        if mine["power_law"]:
            assert mine["alpha_weighted"] == pytest.approx(row["alpha_weighted"], rel=1e-6)
    assert any(ours[name]["power_law"] for name in rows)


def test_the_distance_to_the_shuffled_matrix_and_the_spikes_are_weightwatchers_own():
    weight = with_eigenvalues(pareto(3.0, 60), rows=90).float()
    linear = nn.Linear(60, 90, bias=False)
    linear.weight.data = weight
    state = np.random.get_state()
    np.random.seed(zlib.crc32(b"0/layer"))
    model = watcher._weightwatcher().WeightWatcher(model=nn.Sequential(linear))
    row = model.analyze(min_evals=50, randomize=True, mp_fit=True).iloc[0]
    np.random.set_state(state)
    mine = metrics_of(weight, SpectraSpec(spikes=True), name="layer")
    assert mine["rand_distance"] == pytest.approx(row["rand_distance"], rel=1e-6)
    assert mine["num_spikes"] == row["num_spikes"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pareto_eigenvalues_give_their_exponent(seed):
    found = metrics_of(with_eigenvalues(pareto(3.0, 400, seed)))
    assert found["power_law"]
    assert found["alpha"] == pytest.approx(3.0, abs=3.5 * found["sigma"])
    assert found["alpha"] == pytest.approx(3.0, rel=0.2)
    assert found["D"] < 0.06


@pytest.mark.parametrize("scale", [0.05, 7.0, 300.0])
def test_alpha_does_not_depend_on_scale(scale):
    weight = with_eigenvalues(pareto(2.5, 120))
    plain, scaled = metrics_of(weight), metrics_of(scale * weight)
    for key in ("alpha", "D", "tail"):
        assert scaled[key] == pytest.approx(plain[key], rel=1e-6)
    assert scaled["log_norm"] == pytest.approx(plain["log_norm"] + 2 * np.log10(scale), rel=1e-9)


@pytest.mark.parametrize("shape", [(96, 96), (384, 96), (96, 384), (192, 128)])
def test_a_gaussian_matrix_has_no_power_law(shape):
    for seed in range(3):
        torch.manual_seed(seed)
        found = metrics_of(torch.randn(shape) / shape[1] ** 0.5)
        assert not found["power_law"]
        assert found["alpha"] is None
        assert found["alpha_weighted"] is None
        assert found["fitted_alpha"] > 1  # what would have been averaged in
        assert "D = " in found["why"]


@pytest.mark.parametrize(
    ("matrix", "why"),
    [
        (torch.zeros(80, 80), "the matrix is zero"),
        (torch.full((80, 80), float("nan")), "the weights are not finite"),
        (torch.randn(80, 80).index_fill(0, torch.tensor([3]), float("inf")), "the weights are not finite"),
        (torch.randn(80, 30), "too few eigenvalues: 30 of 30 are above 1e-05, fewer than 50"),
        (torch.randn(80, 8) @ torch.randn(8, 80), "too few eigenvalues: 8 of 80 are above 1e-05, fewer than 50"),
        (torch.ones(80, 80), "too few eigenvalues: 1 of 80 are above 1e-05, fewer than 50"),
        (torch.randn(80, 80).half() * 1e-4, "too few eigenvalues: 0 of 80 are above 1e-05, fewer than 50"),
        (torch.eye(80), "weightwatcher found no fit"),
    ],
)
def test_what_has_no_spectrum_to_fit_is_said_to_have_none(matrix, why):
    found = metrics_of(matrix, SpectraSpec())
    assert found["why"] == why
    assert not found["power_law"]
    assert found["alpha"] is None
    assert all(value is None or isinstance(value, str) or np.isfinite(value) for value in found.values())


def test_the_summary_averages_power_laws_only():
    good = [metrics_of(with_eigenvalues(pareto(3.0, 100, seed))) for seed in range(3)]
    assert all(m["power_law"] for m in good)
    torch.manual_seed(0)
    none = [metrics_of(torch.zeros(60, 60)), metrics_of(torch.randn(60, 60)), metrics_of(torch.randn(60, 9))]
    layers = [{"name": str(i), "before": None, "after": m} for i, m in enumerate(good + none)]
    summary = summarize(layers)
    assert summary["before"] is None
    after = summary["after"]
    assert (after["layers"], after["power_law"]) == (6, 3)
    assert after["alpha"]["mean"] == pytest.approx(np.mean([m["alpha"] for m in good]))
    assert after["alpha"]["ci95"][0] <= after["alpha"]["mean"] <= after["alpha"]["ci95"][1]
    assert np.isfinite(after["log_norm"]["mean"])  # of the zero matrix it would be -inf
    assert summary["change"] == {"layers": 0, "alpha": None}


def test_the_change_is_of_layers_with_a_power_law_on_both_sides():
    a, b = (metrics_of(with_eigenvalues(pareto(alpha, 100))) for alpha in (3.0, 2.5))
    none = metrics_of(torch.zeros(60, 60))
    pairs = [(a, b), (none, b), (a, none), (b, a), (None, a)]
    layers = [{"name": str(i), "before": before, "after": after} for i, (before, after) in enumerate(pairs)]
    change = summarize(layers)["change"]
    assert change["layers"] == 2
    assert change["alpha"]["mean"] == pytest.approx(0.0, abs=1e-12)


def test_half_precision_is_analysed_in_full():
    weight = with_eigenvalues(pareto(3.0, 80)).half()
    assert metrics_of(weight) == metrics_of(weight.double())


def test_a_gpu_does_not_round_weights_to_half_precision(monkeypatch):
    weight = with_eigenvalues(pareto(3.0, 80))
    right = metrics_of(weight)
    inner = sys.modules["weightwatcher.weightwatcher"]  # imported by the line before
    rounding = lambda tensor: tensor.to("cpu").half().numpy()  # noqa: E731, what weightwatcher does where CUDA is
    monkeypatch.setattr(inner, "torch_T_to_np", rounding)
    assert metrics_of(weight) == right
    assert inner.torch_T_to_np is rounding


def test_a_table_of_more_rows_than_weightwatcher_takes_is_looked_at_too():
    weight = with_eigenvalues(pareto(3.0, 60), rows=50_100)
    plain = nn.Sequential(nn.Linear(1, 1, bias=False))
    plain[0].weight.data = weight.float()
    assert not len(watcher._weightwatcher().WeightWatcher(model=plain).analyze())  # it says nothing of it
    assert metrics_of(weight)["power_law"]


def test_low_rank_updates_are_not_compared_with_matrices_of_full_rank():
    update = torch.randn(90, 60) @ torch.randn(60, 90)
    assert metrics_of(update, SpectraSpec(), rank=60)["rand_distance"] is None
    assert metrics_of(update, SpectraSpec(), rank=90)["rand_distance"] > 0


def test_nothing_outside_is_disturbed(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.random.seed(5)
    expected = np.random.RandomState(5).rand(3)
    handlers, filters = list(logging.getLogger().handlers), list(warnings.filters)
    first = metrics_of(torch.randn(60, 12), SpectraSpec(spikes=True), name="a")  # few: weightwatcher prints
    again = metrics_of(with_eigenvalues(pareto(3.0, 60)), SpectraSpec(), name="a")
    assert first["rand_distance"] is not None
    assert np.random.rand(3) == pytest.approx(expected)
    assert list(logging.getLogger().handlers) == handlers
    assert list(warnings.filters) == filters
    assert tuple(capfd.readouterr()) == ("", "")
    assert not list(tmp_path.iterdir())
    assert metrics_of(with_eigenvalues(pareto(3.0, 60)), SpectraSpec(), name="a") == again  # whatever numpy drew since


def test_its_import_leaves_logging_and_warnings_alone():
    code = (
        "import logging, warnings\n"
        "from wlsup.evaluation.watcher import watcher_version; watcher_version()\n"
        "silenced = ('ignore', None, Warning, None, 0) in warnings.filters\n"
        "print(logging.getLogger().handlers, logging.getLogger().level, silenced)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[] 30 False", "")


def test_without_weightwatcher_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "weightwatcher", None)
    with pytest.raises(WlsupError, match=r"not installed.*wlsup\[spectra\]"):
        watcher.watcher_version()


def test_random_matrices_have_the_shape_and_scale_of_the_layer_and_are_the_same_again():
    weight = 3 * torch.randn(90, 60)
    view = WeightView("a.b", (90, 60), 60, ("a.b.weight",), False, lambda: weight)
    drawn = random_like(view).matrix()
    assert drawn.shape == (90, 60)
    assert float(drawn.square().mean()) == pytest.approx(float(weight.square().mean()), rel=0.1)
    assert torch.equal(drawn, random_like(view).matrix())
    assert not torch.equal(drawn, random_like(view, seed=1).matrix())
    assert not metrics_of(drawn)["power_law"]
    low = WeightView("a.b", (90, 60), 5, ("u", "d"), True, lambda: weight)
    assert torch.linalg.matrix_rank(random_like(low).matrix()) == 5


@pytest.mark.parametrize("options", [{"min_evals": 10}, {"max_distance": 0.0}, {"max_distance": 2.0}])
def test_limits_out_of_range_are_refused(options):
    with pytest.raises(WlsupError):
        SpectraSpec(**options)


def test_the_report_follows_the_contract():
    view = WeightView("blocks.0.mlp.fc1", (60, 60), 60, ("w",), False, lambda: None)
    added = WeightView("adapter.update", (60, 60), 4, ("u", "d"), True, lambda: None)
    good = LayerSpectrum(np.ones(60), metrics_of(with_eigenvalues(pareto(3.0, 60))))
    columns = {"before": {view.name: good}, "after": {view.name: good, added.name: good}}
    report = spectra_report([view, added], columns, [LeftOut("pos_embed", "positions")], SpectraSpec())
    assert [layer["name"] for layer in report["layers"]] == [view.name, added.name]
    assert report["layers"][1]["before"] is None
    wanted = {"alpha", "D", "tail", "alpha_weighted", "log_norm", "rand_distance", "num_spikes", "power_law", "why"}
    assert wanted <= set(report["layers"][0]["after"])
    assert report["layers"][0]["shape"] == [60, 60]
    assert report["skipped"] == [{"name": "pos_embed", "why": "positions"}]
    assert report["protocol"].startswith("weightwatcher ")
    assert report["summary"]["change"]["layers"] == 1
