"""Runs on few pictures, shared by the tests of what is made of a run."""

import pytest

from wlsup.cli import main
from wlsup.data import mini_evalsets

BANK, QUERIES = 60, 40


@pytest.fixture(scope="module")
def few_pictures():
    """Generated evaluation sets of 60 and 40 pictures."""
    with few():
        yield


class few:  # noqa: N801
    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(mini_evalsets, "_TRAIN", BANK)
        self.patch.setattr(mini_evalsets, "_TEST", QUERIES)
        mini_evalsets._pictures.cache_clear()

    def __exit__(self, *error):
        self.patch.undo()
        mini_evalsets._pictures.cache_clear()


def fit(approach, folder, *options):
    arguments = ["fit", "-c", "experiments/base.yaml", "-c", f"experiments/{approach}.yaml", "--run_dir", str(folder)]
    arguments += ["--data.pairs", "64", "--data.validation_pairs", "16", "--data.batch_size", "32"]
    arguments += ["--data.eval_sets", "[mini_shapes, mini_digits]", "--trainer.max_epochs", "1", "--model.lr", "1e-2"]
    with few():
        assert main([*arguments, *options]) == 0
    return folder


@pytest.fixture(scope="session")
def curve_run(tmp_path_factory):
    """A run of film adapters that scored WiSE-FT's curve when it ended."""
    options = ["--wise_ft.enabled", "true", "--wise_ft.alphas", "[0, 0.5, 1]", "--wise_ft.bootstrap_resamples", "500"]
    return fit("film", tmp_path_factory.mktemp("runs") / "film", *options)


@pytest.fixture(scope="session")
def bottleneck_run(tmp_path_factory):
    """A run whose adapter no plain ViT can hold."""
    return fit("bottleneck", tmp_path_factory.mktemp("runs") / "bottleneck")
