"""The curve over sets: read once, exact at its ends, and chosen on validation pictures alone."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from wlsup.batch import EvalSet
from wlsup.callbacks.knn import evaluate_knn
from wlsup.errors import WlsupError
from wlsup.evaluation import wise_ft_curve as module_under_test
from wlsup.evaluation.figures.saving import save_figure
from wlsup.evaluation.figures.wise_ft import draw_wise_ft
from wlsup.evaluation.knn import knn_accuracy
from wlsup.evaluation.statistics import wilson
from wlsup.evaluation.validation import picture_keys, take, validation_split
from wlsup.evaluation.wise_ft_curve import features_along, load_tensors, wise_ft_curve
from wlsup.evaluation.wise_ft_table import wise_ft_markdown, wise_ft_text

ALPHAS = (0.0, 0.3, 1.0)


class Encoder(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.map = nn.Linear(12, 5)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("steps", torch.tensor(seed))
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.map.weight, generator=generator)
        nn.init.normal_(self.map.bias, generator=generator)

    def features(self, images):
        return self.drop(self.map(images.flatten(1)))


class Pictures(Dataset):
    """Noise around a class's own picture; counts how often it is read, and cannot read what it is told not to."""

    def __init__(self, count, seed, unreadable=()):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 4
        centres = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(9))
        self.images = centres[self.labels] + 0.8 * torch.randn(count, 3, 2, 2, generator=generator)
        self.reads, self.unreadable = 0, unreadable

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.reads += 1
        if index in self.unreadable:
            return torch.zeros(3, 2, 2), 0, "torn"
        return self.images[index], int(self.labels[index])


def eval_set(name, domain, seed, **options):
    return EvalSet(name, domain, Pictures(80, seed, **options), Pictures(40, seed + 1), list("abcd"))


def ends():
    return ({k: v.clone() for k, v in Encoder(seed).state_dict().items()} for seed in (1, 2))


def curve(sets, **options):
    start, end = ends()
    encoder = Encoder(2)
    return wise_ft_curve(encoder, start, end, sets, alphas=ALPHAS, k=5, batch_size=32, resamples=200, **options)


@pytest.fixture(scope="module")
def found():
    return curve([eval_set("home", "in", 10), eval_set("away", "out", 20)])


def test_its_ends_are_the_two_encoders_own_scores(found):
    for position, seed in ((0, 1), (-1, 2)):
        for made, name in ((eval_set("home", "in", 10), "home"), (eval_set("away", "out", 20), "away")):
            own = evaluate_knn(Encoder(seed), made, k=5, ks=(), batch_size=32)
            assert found["sets"][name]["accuracy"][position] == own.top1


def test_features_at_the_ends_are_the_encoders_to_the_bit():
    start, end = ends()
    data = Pictures(50, 3)
    along = dict(features_along(Encoder(2).eval(), start, end, data, ALPHAS, batch_size=16))
    for alpha, seed in ((0.0, 1), (1.0, 2)):
        encoder = Encoder(seed).eval()
        with torch.no_grad():
            expected = torch.cat(
                [nn.functional.normalize(encoder.features(part), dim=1) for part in data.images.split(16)]
            )
        assert torch.equal(along[alpha].features, expected)
    assert not torch.equal(along[0.3].features, along[0.0].features)


def test_pictures_are_read_once_for_all_alphas():
    made = eval_set("home", "in", 10)
    curve([made])
    assert made.train.reads == 80 + 1  # one more for the width of a feature
    assert made.test.reads == 40 + 1


def test_a_set_too_large_to_hold_at_all_alphas_is_read_again_and_scores_alike(found, monkeypatch):
    monkeypatch.setattr(module_under_test, "_FEATURE_BYTES", 1)
    made = eval_set("home", "in", 10)
    seen = []

    class Show:
        def __init__(self, description):
            pass

        def __enter__(self):
            return lambda done, total: seen.append((done, total))

        def __exit__(self, *error):
            pass

    banks, most = [], []
    features_along = module_under_test.features_along

    def watched(module, start, end, dataset, *rest, **options):
        for alpha, found in features_along(module, start, end, dataset, *rest, **options):
            if dataset is made.train:
                banks.append(weakref.ref(found))
                most.append(sum(bank() is not None for bank in banks))
            yield alpha, found

    monkeypatch.setattr(module_under_test, "features_along", watched)
    again = curve([made, eval_set("away", "out", 20)], progress=Show)
    assert len(most) == 3
    assert max(most) <= 2  # the one at hand, and the one before it, which a loop still names
    assert made.train.reads == 3 * 80 + 1
    assert again["sets"] == found["sets"]
    assert (240, 240) in seen
    assert all(done <= total for done, total in seen)


def test_changes_are_against_the_pretrained_end_with_an_interval_beside_each(found):
    for entry in (*found["sets"].values(), *found["summary"].values(), found["validation"]):
        assert entry["delta"] == pytest.approx([at - entry["accuracy"][0] for at in entry["accuracy"]])
        assert entry["ci95"][0] == [0, 0]
        assert all(low <= d <= high for d, (low, high) in zip(entry["delta"], entry["ci95"], strict=True))
    assert found["summary"]["in_domain"]["accuracy"] == pytest.approx(found["sets"]["home"]["accuracy"])
    assert "k=5" in found["protocol"]


def test_the_mean_over_sets_has_the_interval_of_independent_sets():
    two = curve([eval_set("home", "in", 10), eval_set("home2", "in", 30)])
    means, sets = two["summary"]["in_domain"], list(two["sets"].values())
    assert means["delta"] == pytest.approx([sum(s["delta"][i] for s in sets) / 2 for i in range(3)])
    below = [s["delta"][2] - s["ci95"][2][0] for s in sets]
    assert means["delta"][2] - means["ci95"][2][0] == pytest.approx(math.hypot(*below) / 2)


def test_neither_queries_nor_sets_away_from_home_choose():
    made, away = eval_set("home", "in", 10), eval_set("away", "out", 20)
    first = curve([made, away])
    made.test.images.normal_()
    away.train.images.normal_()
    away.test.images.normal_()
    second = curve([made, away])
    assert second["sets"]["home"] != first["sets"]["home"]
    assert second["sets"]["away"] != first["sets"]["away"]
    assert (second["validation"], second["chosen_alpha"]) == (first["validation"], first["chosen_alpha"])
    assert first["validation"]["sets"] == ["home"]
    made.train.images.normal_()
    assert curve([made, away])["validation"] != first["validation"]


def test_validation_pictures_do_not_vote(found):
    # Of 80 pictures in 4 classes a fifth validates, and the rest is the bank.
    entry = found["validation"]["by_set"]["home"]
    assert (entry["train"], entry["validation"]) == (64, 16)
    made = eval_set("home", "in", 10).train
    split = validation_split(made.labels, picture_keys(made))
    start, end = ends()
    along = features_along(Encoder(2).eval(), start, end, made, ALPHAS, batch_size=32)
    own = [knn_accuracy(*(take(at, rows) for rows in split), k=5, ks=(), num_classes=4).top1 for _, at in along]
    assert entry["accuracy"] == found["validation"]["accuracy"] == own


def test_the_module_comes_back_as_it_was_even_after_an_error():
    start, end = ends()
    encoder = Encoder(2).train()
    encoder.map.eval()
    wise_ft_curve(encoder, start, end, [eval_set("home", "in", 10)], alphas=(0, 1), resamples=10)
    assert all(torch.equal(tensor, end[name]) for name, tensor in encoder.state_dict().items())
    assert (encoder.training, encoder.map.training, encoder.drop.training) == (True, False, True)

    class Failing(Encoder):
        calls = 0

        def features(self, images):
            self.calls += 1
            if self.calls == 3:
                raise WlsupError("in the middle of the line")
            return super().features(images)

    failing = Failing(2)
    with pytest.raises(WlsupError, match="in the middle"):
        wise_ft_curve(failing, start, end, [eval_set("home", "in", 10)])
    assert all(torch.equal(tensor, end[name]) for name, tensor in failing.state_dict().items())
    assert failing.training


def test_what_cannot_be_read_is_left_out_and_said_once():
    said = []
    found = curve([eval_set("home", "in", 10, unreadable=(3, 17))], warn=said.append)
    assert found["sets"]["home"]["train"] == 78
    assert said == ["home: left out 3: torn", "home: left out 17: torn"]


def test_a_probe_scores_along_where_asked():
    found = curve([eval_set("home", "in", 10)], probe=True)
    entry = found["sets"]["home"]
    assert len(entry["probe"]) == len(entry["probe_ci95"]) == 3
    assert entry["probe_ci95"][0] == [0, 0]
    assert 0.25 < entry["probe"][-1] <= 1
    assert "probe" in found["protocol"]
    (axes,) = draw_wise_ft(found).axes
    assert [line.get_label() for line in axes.lines if line.get_linestyle() == ":"][0] == "home, linear probe"


def test_a_state_of_another_model_is_refused():
    with pytest.raises(WlsupError, match="no tensor 'other'"):
        load_tensors(Encoder(1), {"other": torch.ones(1)})


def test_table_and_picture_show_every_alpha_set_and_the_choice(found, tmp_path):
    text, markdown = wise_ft_text(found, "WiSE-FT: toy"), wise_ft_markdown(found, "WiSE-FT: toy")
    rows = [line for line in text.splitlines() if line[:1].isdigit()]
    assert [row.split()[0] for row in rows] == ["0", "0.3", "1"]
    assert sum("*" in row for row in rows) == 1
    for name in ("home (in)", "away (out)", "Protocol: wise-ft:v1"):
        assert name in text
        assert name in markdown
    figure = draw_wise_ft(found, "WiSE-FT: toy")
    assert len(figure.axes) == 2
    first = [path.read_bytes() for path in save_figure(figure, tmp_path / "a" / "curve")]
    second = [path.read_bytes() for path in save_figure(draw_wise_ft(found, "WiSE-FT: toy"), tmp_path / "curve")]
    assert first == second
    assert first[0].startswith(b"\x89PNG")
    assert all(word in first[1].decode() for word in ("<svg", "home (in)", "away (out)", "pretrained"))
    assert len(draw_wise_ft(curve([eval_set("away", "out", 20)])).axes) == 1


def test_every_number_of_the_table_has_its_interval_the_first_one_wilsons(found):
    first, *rest = (line for line in wise_ft_markdown(found, "").splitlines() if line[2:3].isdigit())
    home = found["validation"]["by_set"]["home"]
    for share, pictures in (
        (home["accuracy"][0], 16),
        (found["sets"]["home"]["accuracy"][0], 40),
        (found["sets"]["away"]["accuracy"][0], 40),
    ):
        _, low, high = wilson(round(share * pictures), pictures)
        assert f" {100 * share:.1f} +-{100 * (high - low) / 2:.1f} |" in first
    assert [line.count("[") for line in (first, *rest)] == [0, 3, 3]
