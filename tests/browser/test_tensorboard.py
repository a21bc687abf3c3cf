"""TensorBoard itself over two runs: its groups have their charts, the runs can be compared, nothing goes wrong."""

import io
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from wlsup.callbacks.dashboard import dashboard_layout, log_hyperparameters
from wlsup.callbacks.knn import KNN
from wlsup.callbacks.retrieval import Retrieval
from wlsup.callbacks.run_folder import FIRST_HYPERPARAMETERS
from wlsup.cli import main

pytestmark = [pytest.mark.browser, pytest.mark.slow]
SETS = {"mini_shapes": "in", "mini_digits": "out"}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two runs as a training logs them, without the training."""
    root = tmp_path_factory.mktemp("runs")
    module = torch.nn.Module()
    module.head = torch.nn.Linear(1, 1)
    module.objective = SimpleNamespace(reconstruction_weight=1.0, contrastive_weight=1.0)
    knn = KNN()
    knn.sets = [SimpleNamespace(name=name, domain=domain) for name, domain in SETS.items()]
    for approach, seed in (("film", 0), ("lora", 1)):
        board = TensorBoardLogger(root / approach, name="", version="", default_hp_metric=False)
        board.experiment.add_custom_scalars(dashboard_layout([knn, Retrieval()], module))
        hyperparameters = {
            "approach": approach,
            "seed": seed,
            "model.lr": 1e-3,
            "data.pairs": 64,
            "trainer.max_epochs": 2,
        }
        more = {"model.a": 0.05, "data.a": 1, "data.b": 2, "data.c": 3}
        log_hyperparameters(board, hyperparameters | more, ["summary/in_domain_delta"], FIRST_HYPERPARAMETERS)
        for step in range(0, 20, 5):
            metrics = {f"knn/{name}": 0.5 for name in SETS} | {f"knn_delta/{name}": step / 100 for name in SETS}
            metrics |= {f"{part}/{loss}": 3 - step / 10 for part in ("train", "val")
                        for loss in ("loss", "reconstruction", "contrastive")}  # fmt: skip
            metrics |= {
                f"retrieval/{way}_R@{k}": k / 20 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
            }
            metrics |= {"summary/in_domain_delta": -step / 100, "summary/out_of_domain_delta": step / 200}
            metrics |= {"lr-AdamW/head.*": 1e-3, "lr-AdamW/head.* (no decay)": 1e-3}
            board.log_metrics(metrics, step)
        board.finalize("success")
    return root


@contextmanager
def serving(folder, run):
    """TensorBoard over a folder, once it has read ``run``; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port),
               "--host", "127.0.0.1"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                if run in urllib.request.urlopen(f"{address}/data/runs", timeout=20).read().decode():
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture(scope="module")
def address(logs):
    with serving(logs, "lora") as address:
        yield address


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1500, "height": 1200})
    page.set_default_timeout(240_000)
    page.said = []
    page.on("console", lambda message: page.said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.said.append(str(error)))
    yield page
    page.close()


def test_custom_scalars_show_the_groups_of_both_runs(page, address, tmp_path):
    page.goto(f"{address}/#custom_scalars")
    for group in ("in domain", "out of domain", "losses", "held-out retrieval", "the run itself"):
        page.get_by_text(group, exact=True).first.wait_for()
    page.get_by_text("k-NN accuracy", exact=True).first.wait_for()
    page.get_by_text("contrastive", exact=True).first.wait_for()
    page.wait_for_timeout(3000)  # lines are drawn after their titles
    assert [text for text in page.said if "not in the domain" in text or "TypeError" in text] == []
    seen = page.screenshot(path=tmp_path / "dashboard.png")
    colours = Image.open(io.BytesIO(seen)).convert("RGB").getcolors(maxcolors=1500 * 1200)
    assert len(colours) > 200, "a blank page, or one of text alone"
    lines = sum(count for count, colour in colours if max(colour) - min(colour) > 60)
    assert lines > 500  # what is drawn in colour: curves and the bar above them


def test_hparams_compare_approaches_and_seeds_unasked(page, address):
    page.goto(f"{address}/#hparams")
    for word in ("approach", "seed", "model.lr", "data.pairs", "trainer.max_epochs"):
        page.locator("tf-hparams-table-view").get_by_text(word, exact=True).first.wait_for()
    for cell in ("film", "lora"):
        page.locator("tf-hparams-table-view").get_by_text(cell, exact=True).first.wait_for()
    page.locator("tf-hparams-table-view").get_by_text("summary/in_domain_delta").first.wait_for()
    assert [text for text in page.said if "Error:" in text] == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_mini_pictures):
    """A real run with everything on that has charts of its own: routing, captions, WiSE-FT, spectra, the projector."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["--data.pairs", "64", "--data.validation_pairs", "32", "--data.batch_size", "16"]
    options += ["--data.eval_sets", "[mini_shapes, mini_digits]", "--trainer.max_epochs", "2"]
    options += ["--trainer.log_every_n_steps", "1", "--captioning.pictures", "8", "--wise_ft.enabled", "true"]
    options += ["--spectra.enabled", "true", "--spectra.every_n_epochs", "1", "--spectra.randomize", "false"]
    options += ["--spectra.layers", "blocks.0.mlp.*", "--projector.pictures", "20"]
    recipes = ["-c", "experiments/base.yaml", "-c", "experiments/magma_moe.yaml"]
    assert main(["fit", *recipes, *options, "--run_dir", str(folder / "moe")]) == 0
    return folder


LINES = """cards => cards.map(card => {
    const roots = [card], paths = [];
    for (const root of roots)
        for (const element of [root, ...root.querySelectorAll('*')]) {
            if (element.shadowRoot && !roots.includes(element.shadowRoot)) roots.push(element.shadowRoot);
            if (element.tagName === 'path') paths.push(element);
        }
    const drawn = path => path.classList.contains('line') && /^M.*L/.test(path.getAttribute('d') || '');
    return [card.title, paths.filter(drawn).length];
})"""
POINTS = {  # one value a run
    "scores at the end", "alpha chosen on in-domain validation", "change at the chosen alpha",
    "skipped steps, loss spikes (none: no line)",
}  # fmt: skip


def test_of_a_real_run_every_chart_of_every_group_has_its_lines(page, trained):
    with serving(trained, "moe") as address:
        page.goto(f"{address}/#custom_scalars")
        for group in ("in domain", "out of domain", "losses", "captions", "routing", "WiSE-FT", "spectra"):
            page.get_by_text(group, exact=True).first.wait_for()
        page.wait_for_timeout(8000)  # lines are drawn after their titles
        cards = page.locator("tf-custom-scalar-multi-line-chart-card, tf-custom-scalar-margin-chart-card")
        drawn = cards.evaluate_all(LINES)
    assert len(drawn) > 25
    assert {title for title, lines in drawn if not lines} == POINTS
    assert [text for text in page.said if "not in the domain" in text or "TypeError" in text] == []


def test_the_projector_shows_the_pictures_of_each_set_before_and_after(page, trained):
    with serving(trained, "moe") as address:
        page.goto(f"{address}/#projector")
        plugin = page.frame_locator("iframe").frame_locator("iframe")
        plugin.get_by_text("4 tensors found").wait_for()  # two sets, before and after
        plugin.get_by_text("Total variance described").wait_for()  # of the axes that are drawn
        assert plugin.locator("span.numDataPoints").inner_text() == "20"
        page.wait_for_timeout(3000)
        drawn = page.screenshot(clip={"x": 400, "y": 200, "width": 700, "height": 700})
    assert len(Image.open(io.BytesIO(drawn)).convert("RGB").getcolors(maxcolors=700 * 700)) > 1000  # bare dots: 453
