"""The no-regret study's promises: what validates, what is chosen and confirmed, and that nothing stale is used."""

import csv
import json
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from tests.conftest import ROOT
from wlsup.approaches import approach_class
from wlsup.batch import EvalSet
from wlsup.callbacks.checkpoints import STOPPED
from wlsup.checkpoint_file import read_checkpoint
from wlsup.cli import main as wlsup
from wlsup.cli.configuration import configure
from wlsup.data.datamodule import CaptionDataModule
from wlsup.errors import WlsupError
from wlsup.evaluation.features import Features
from wlsup.evaluation.knn import PROTOCOL
from wlsup.evaluation.statistics import crossed_interval, mean_of_intervals
from wlsup.evaluation.validation import picture_keys, validation_split
from wlsup.models.vision import VisionSpec, build_vision


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "experiments")
        import no_regret

        yield no_regret


@pytest.fixture(scope="module")
def runs(study):
    import no_regret_runs

    return no_regret_runs


def scores(inside, outside, n=1000):
    """What a run scores where accuracies are those given, at each alpha; pictures right are the first ones."""

    def right(shares):
        return torch.stack([torch.arange(n) < round(n * share) for share in shares])

    return {"home": {"domain": "in", "right": right(inside)}, "away": {"domain": "out", "right": right(outside)}}


def curve(start, end, steps=8):
    return [start + (end - start) * step / (steps - 1) for step in range(steps)]


FLAT = [0.5] * 8


class TestChoice:
    def test_the_best_gain_within_the_margin_is_chosen_not_the_best_gain(self, study):
        curves = {
            "greedy": [scores(curve(0.5, 0.2), curve(0.3, 0.6))] * 2,
            "careful": [scores(FLAT, curve(0.3, 0.36))] * 2,
        }
        assert study.choose(curves) == ("careful", 7, True)

    def test_to_keep_the_margin_takes_a_gain_out_of_domain_too(self, study):
        nothing = {"nothing": [scores(FLAT, [0.3] * 8)]}
        assert study.choose(nothing) == ("nothing", 1, False)
        least = {"least": [scores(FLAT, [0.3, 0.303, *[0.3] * 6])]}  # 3 pictures of 1,000: 1.7 standard errors
        assert study.choose(least) == ("least", 1, True)
        run = scores(FLAT, [0.3] * 8)
        run["away"]["right"][1, :4], run["away"]["right"][1, 300:305] = False, True  # four lost and five gained
        assert study.choose({"unsure": [run]})[2] is False

    def test_where_nothing_keeps_the_margin_the_least_short_is_taken_and_told(self, study):
        curves = {
            "loses at home": [scores([0.5, *[0.45] * 7], curve(0.3, 0.4))],
            "loses away": [scores(FLAT, [0.3, *[0.27] * 7])],
            "loses both": [scores([0.5, *[0.47] * 7], [0.3, *[0.26] * 7])],
        }
        assert study.choose(curves) == ("loses away", 1, False)
        assert [name for name, _ in study.ranked(curves)] == ["loses away", "loses both", "loses at home"]

    def test_changes_are_means_over_seeds_then_sets_with_an_error_over_pictures(self, study):
        found = [scores([0.5, 0.6], [0.3, 0.3]), scores([0.5, 0.5], [0.3, 0.4])]
        mean, error = study.changes(found, "in", 1)
        assert mean == pytest.approx(0.05)
        half = torch.tensor([0.5] * 100 + [0.0] * 900, dtype=torch.float64)  # 100 pictures change in one of 2 seeds
        assert error == pytest.approx(float(half.std()) / 1000**0.5)

    def test_a_choice_is_written_once_and_another_is_refused_in_one_sentence(self, study, tmp_path):
        path = tmp_path / "choice.json"
        choice = {"search": "a", "candidate": "film", "options": [], "alpha": 0.1, "confirm_seeds": [200]}
        study.freeze(path, choice)
        study.freeze(path, choice | {"command": "another way to say it"})
        assert json.loads(path.read_text()) == choice
        for other in ({"alpha": 0.2}, {"search": "b"}, {"confirm_seeds": [200, 201]}):
            with pytest.raises(WlsupError, match=rf"film at alpha 0.1.*another {next(iter(other))}:") as caught:
                study.freeze(path, choice | other)
            assert "\n" not in str(caught.value)
        assert json.loads(path.read_text()) == choice


class TestHalving:
    @staticmethod
    def search(study, gains, second=None):
        """Search among candidates whose gains out of domain at seed 100, and at 101, are given; None fails."""
        candidates = [study.Candidate("full", ("--model.lr", str(number))) for number in range(len(gains))]
        made = []

        def make(asked, alphas, part):
            assert part == "validation"
            made.append([(int(run.candidate.options[1]), run.seed) for run in asked])
            of = {100: gains, 101: second or gains}
            values = [of[run.seed][int(run.candidate.options[1])] for run in asked]
            return ["it broke" if gain is None else scores(FLAT, curve(0.3, 0.3 + gain)) for gain in values]

        return made, study.search(candidates, study.World("mini", None, (), ()), make)

    def test_all_have_the_first_seed_and_the_best_six_the_second(self, study):
        made, (curves, order, failed) = self.search(study, [0.01, 0.08, 0.02, 0.07, 0.03, 0.06, 0.04, 0.05])
        assert made[0] == [(number, 100) for number in range(8)]
        assert made[1] == [(number, 101) for number in (1, 3, 4, 5, 6, 7)]
        assert order == [f"full, lr {number}" for number in (1, 3, 5, 7, 6, 4, 2, 0)]
        assert [len(curves[name]) for name in order] == [2] * 6 + [1] * 2
        assert not failed

    def test_the_choice_is_over_both_seeds_and_among_those_that_have_both(self, study):
        _, (_, order, _) = self.search(study, [0.09, *[0.05] * 5, 0.04], [0.01, 0.05, 0.07, *[0.02] * 4])
        assert order[0] == "full, lr 2"  # 0.06 on average; the first seed's best has 0.05, as "lr 1" has
        assert order[-1] == "full, lr 6"

    def test_one_that_fails_is_left_out_with_its_reason_in_either_round(self, study):
        made, (curves, order, failed) = self.search(study, [0.05, None, 0.04], [None, None, 0.04])
        assert made == [[(0, 100), (1, 100), (2, 100)], [(0, 101), (2, 101)]]
        assert order == ["full, lr 2"] == list(curves)
        assert failed == {"full, lr 1": "it broke", "full, lr 0": "it broke"}

    def test_when_all_fail_so_does_the_study(self, study):
        with pytest.raises(WlsupError, match="No candidate is left.*full, lr 0: it broke"):
            self.search(study, [None, None])


class TestValidationPictures:
    def test_folds_are_a_function_of_keys_and_balanced(self, runs):
        labels = torch.arange(100) % 4
        keys = [f"picture {number}" for number in range(100)]
        fold = runs.folds(labels, keys)
        order = torch.randperm(100)
        again = runs.folds(labels[order], [keys[number] for number in order.tolist()])
        assert torch.equal(fold[order], again)
        counts = torch.zeros(4, runs.FOLDS)
        for label, number in zip(labels.tolist(), fold.tolist(), strict=True):
            counts[label, number] += 1
        assert (counts == 5).all()

    def test_no_picture_votes_for_itself(self, runs):
        """Each picture's twin of another class is nearest, and it itself is nearer: always wrong, never itself."""
        pairs = torch.nn.functional.normalize(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)), dim=1)
        bank = Features(pairs.repeat_interleave(2, 0), torch.arange(20) % 2, torch.arange(20), [])
        train = SimpleNamespace(names=[str(number) for number in range(20)], __len__=lambda: 20)
        eval_set = EvalSet(name="twins", domain="in", train=train, test=None, class_names=("a", "b"))
        right = runs.bank_right(bank, eval_set, whole=True)
        fold = runs.folds(bank.labels, train.names)
        apart = torch.tensor([fold[number] != fold[number ^ 1] for number in range(20)])
        assert apart.any()
        assert not right[apart].any()

    def test_no_real_picture_that_validates_or_tests_has_a_caption(self, runs, shared_data, tmp_path):
        for name in ("encoder", "text"):
            (tmp_path / name).mkdir()
        places = (tmp_path / "runs", str(tmp_path / "encoder"), str(tmp_path / "text"))
        world = runs.make_world("real", *places)
        table = tmp_path / "runs" / "captions.csv"
        written = table.stat().st_mtime_ns
        assert runs.make_world("real", *places) == world
        assert table.stat().st_mtime_ns == written
        data = CaptionDataModule(eval_sets=[one for one in world.sets if getattr(one, "name", "") == "dtd10"])
        data.image_spec = build_vision(VisionSpec()).image_spec
        (dtd,) = data.eval_datasets()
        bank = picture_keys(dtd.train)
        split = validation_split(torch.tensor(dtd.train.labels), bank)
        with table.open(encoding="utf-8") as file:
            names = [row["image"] for row in csv.DictReader(file)]
        captioned = {name.removeprefix("dtd/") for name in names if name.startswith("dtd/")}
        assert captioned and captioned <= {bank[row] for row in split.bank.tolist()}  # not all have descriptions
        assert not captioned & set(picture_keys(dtd.test))


class TestAnswer:
    def test_the_test_is_over_the_confirming_seeds_and_over_pictures_too(self, study):
        found = [scores([0.5, 0.5], [0.3, 0.3 + gain]) for gain in (0.01, 0.02, 0.03, 0.04, 0.05)]
        test = study.confirmed(found)
        assert test["out"]["mean"] == pytest.approx(0.03)
        assert test["out"]["ci95"][0] == pytest.approx(0.03 - 2.776 * 0.015811 / 5**0.5, abs=1e-4)
        assert test["in"]["mean"] == 0
        away = test["sets"]["away"]
        right = torch.stack([run["away"]["right"] for run in found]).double()
        both = crossed_interval(right[:, 1] - right[:, 0])
        assert away["crossed_ci95"] == pytest.approx(both[1:])
        assert test["out"]["crossed_ci95"] == pytest.approx(mean_of_intervals([both])[1:])
        assert (away["pretrained"], away["test"]) == (pytest.approx(0.3), 1000)
        assert away["pretrained_ci95"] == pytest.approx([0.2724, 0.3291], abs=1e-3)

    def test_seeds_that_agree_say_nothing_of_other_pictures(self, study):
        away = study.confirmed([scores([0.5, 0.5], [0.3, 0.33])] * 5)["sets"]["away"]
        assert away["ci95"] == pytest.approx([0.03, 0.03])
        assert away["crossed_ci95"] == pytest.approx([0.03 - 1.96 * 0.0054, 0.03 + 1.96 * 0.0054], abs=1e-3)

    @pytest.mark.parametrize(
        ("inside", "outside", "answer"),
        [
            ([-0.004, 0.01], [0.004, 0.02], "Yes"),
            ([-0.004, 0.01], [0.0005, 0.02], "Yes on these pictures only"),
            ([-0.0045, 0.01], [0.004, 0.02], "Yes on these pictures only"),
            ([-0.02, -0.006], [0.001, 0.02], "No"),
            ([-0.004, 0.01], [-0.02, 0.0], "No"),
            ([-0.006, 0.01], [0.001, 0.02], "Not shown"),
            ([-0.004, 0.01], [-0.001, 0.02], "Not shown"),
        ],
    )
    def test_yes_no_and_not_shown(self, study, inside, outside, answer):
        def told(limits):  # over pictures too the interval is wider by a fifth of a point in all
            return {"ci95": limits, "crossed_ci95": [limits[0] - 0.001, limits[1] + 0.001]}

        assert study.verdict({"in": told(inside), "out": told(outside)}) == answer


class TestDesign:
    def test_seeds_that_choose_do_not_confirm(self, study):
        assert not set(study.SEARCH) & set(study.CONFIRM)
        assert len(study.CONFIRM) == 10

    def test_the_text_has_the_numbers_of_what_it_speaks_of(self, study):
        names = [one.name for one in study.CANDIDATES]
        assert len(set(names)) == len(names)
        assert f"one of {len(names)} candidates" in study.__doc__
        assert f"one of {len(study.ALPHAS) - 1} places" in study.__doc__
        total = [first + study.FINALISTS + len(study.CONFIRM) for first in (len(names), study.OFFERED)]
        assert f"{total[0]} runs in the mini world, {total[1]} in the real one" in study.__doc__

    def test_every_candidate_is_one_that_wlsup_fit_takes(self, study, runs, tmp_path):
        world = runs.make_world("mini", tmp_path)
        for one in study.CANDIDATES:
            arguments = runs.Run(one, 100, world).arguments
            cli = configure(approach_class(one.approach), CaptionDataModule, arguments, "fit", build=False)
            assert (cli.config.approach, cli.config.trainer.logger) == (one.approach, False)
            assert cli.config.data.pairs == 4000

    def test_the_real_world_is_offered_what_the_mini_world_ranked_best(self, study, tmp_path):
        assert study.offered("mini", None, tmp_path) == (list(study.CANDIDATES), "all")
        everyone, told = study.offered("real", None, tmp_path)
        assert everyone == list(study.CANDIDATES) and "no choice of the mini world" in told
        ranking = [one.name for one in reversed(study.CANDIDATES)]
        (tmp_path / "no_regret_mini_choice.json").write_text(json.dumps({"ranking": ranking}))
        best, told = study.offered("real", None, tmp_path)
        assert [one.name for one in best] == ranking[:8] and told.startswith("the 8 that")


class Pictures(Dataset):
    """Twenty labelled pictures, each like its class."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = [number % 2 for number in range(20)]
        self.pictures = torch.randn(20, 3, 2, 2, generator=generator) + torch.tensor(self.labels).view(-1, 1, 1, 1)
        self.names = [f"{seed}/{number}" for number in range(20)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.pictures[index], self.labels[index]


class TestPictures(Pictures):
    """Not to be read before there is a choice."""

    __test__ = False
    choice, reads = None, 0

    def __getitem__(self, index):
        assert self.choice.is_file(), "a test picture was read before the choice was written"
        type(self).reads += 1
        return super().__getitem__(index)


class Encoder(nn.Module):
    """Scales each pixel by a weight that training has moved."""

    image_spec = None

    def __init__(self, moved=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12) if moved is None else moved)
        self.start = SimpleNamespace(tensors={"weight": torch.ones(12)}, held=(), check=lambda module: True)

    def features(self, images):
        return images.flatten(1) * self.weight


@pytest.fixture
def fake(study, runs, monkeypatch, tmp_path):
    """A mini world without training: `wlsup fit` writes small files, and what it trains is drawn by the run's name."""
    fake = SimpleNamespace(out=tmp_path / "results", fitted=[], codes={}, loaded=[])
    fake.choice = fake.out / "no_regret_mini_choice.json"
    monkeypatch.setattr(TestPictures, "choice", fake.choice)
    monkeypatch.setattr(TestPictures, "reads", 0)

    def fit(command, stdout, stderr, cwd):
        folder = runs.Path(command[command.index("--run_dir") + 1])
        fake.fitted.append(f"{folder.parent.name}/{folder.name}")
        if code := fake.codes.get(fake.fitted[-1]):
            stdout.write("step 3\nerror: a loss that is not finite | numbers\n")
            return SimpleNamespace(returncode=code)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").write_text(fake.fitted[-1])
        (folder / "results.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    def data():
        sets = [
            EvalSet(name, domain, Pictures(seed), TestPictures(seed + 10), ("a", "b"))
            for seed, (name, domain) in enumerate([("home", "in"), ("away", "out"), ("far", "out")])
        ]
        return SimpleNamespace(eval_datasets=lambda: sets)

    def load_run(folder):
        told = (folder / "checkpoints" / "last.ckpt").read_text()
        fake.loaded.append(told)
        generator = torch.Generator().manual_seed(zlib.crc32(told.encode()))
        return Encoder(1 + torch.randn(12, generator=generator)), data()

    monkeypatch.setattr(runs.subprocess, "run", fit)
    monkeypatch.setattr(runs, "MORE_TEST_PICTURES", 0)
    monkeypatch.setattr(runs, "load_run", load_run)
    monkeypatch.setattr(runs, "pretrained", lambda world: (Encoder(), data()))

    def make(asked, alphas, part):
        return [runs.outcome(run, alphas, part) for run in asked]

    fake.main = lambda *arguments: study.main([*arguments, "--out", str(fake.out)], make)
    fake.record = lambda: json.loads((fake.out / "no_regret_mini.json").read_text())
    return fake


def test_a_record_names_no_folder_of_weights(study):
    given = ["--world", "real", "--encoder", "/home/me/model", "--text=/tmp/text", "--jobs", "2"]
    assert study.without_folders(given) == ["--world", "real", "--encoder", "DIR", "--text=DIR", "--jobs", "2"]
    assert study.without_folders(["--encoder", "a", "--text", "b"]) == ["--encoder", "DIR", "--text", "DIR"]


class TestStudy:
    def test_no_test_picture_is_read_before_the_choice_is_written(self, fake, study, runs):
        assert fake.main() == 0
        record, choice = fake.record(), json.loads(fake.choice.read_text())
        assert TestPictures.reads
        assert len(fake.fitted) == len(study.CANDIDATES) + 6 + 10
        assert sum(name.endswith("seed101") for name in fake.fitted) == 6
        assert choice["candidate"] == record["candidates"][0]["name"] == choice["ranking"][0]
        assert record["chosen"] == choice
        assert record["answer"] in ("Yes", "Yes on these pictures only", "No", "Not shown")
        assert json.loads((fake.out / "no_regret_mini_search.json").read_text())["candidates"] == record["candidates"]
        assert len(record["test"]["sets"]["far"]["values"]) == 10
        told = (fake.out / "no_regret_mini.md").read_text()
        assert PROTOCOL in told and "Not blind" in told and f"--out {fake.out}" in told
        assert (fake.out / "no_regret_mini.png").is_file()
        weights = {"encoder": runs.MINI / "vision", "text": runs.MINI / "text"}
        assert record["sha256"] == {part: runs.files_sha256(folder) for part, folder in weights.items()}
        assert len(record["candidates"]) == len(study.CANDIDATES)

    @pytest.mark.slow
    def test_a_second_call_makes_nothing_again_and_with_other_seeds_is_refused_in_one_sentence(self, fake, capsys):
        fake.main()
        before, fitted, loaded = fake.record(), len(fake.fitted), len(fake.loaded)
        assert fake.main() == 0
        assert (fake.record(), len(fake.fitted), len(fake.loaded)) == (before, fitted, loaded)
        capsys.readouterr()
        assert fake.main("--confirm", "5") == 2
        said = capsys.readouterr().err
        assert said.startswith("no_regret: error: ") and "another confirm_seeds:" in said and said.count("\n") == 1
        assert fake.main("--confirm", "4") == 2

    def test_some_candidates_are_searched_and_no_test_is_made(self, fake, capsys):
        assert fake.main("--candidates", "film", "full, encoder_lr 1e-5") == 0
        assert sorted(set(fake.fitted)) == [
            "film/seed100", "film/seed101", "full-encoder_lr_1e-5/seed100", "full-encoder_lr_1e-5/seed101",
        ]  # fmt: skip
        assert not fake.choice.exists() and not TestPictures.reads
        assert not (fake.out / "no_regret_mini.md").exists()
        assert "| film | 2 |" in capsys.readouterr().out.replace("**", "")

    def test_a_wrong_name_is_answered_with_the_nearest(self, fake, capsys):
        assert fake.main("--candidates", "flim") == 2
        assert "Did you mean 'film'" in capsys.readouterr().err
        assert not fake.fitted

    def test_a_candidate_that_fails_is_told_and_does_not_end_the_study(self, fake, study):
        fake.codes["mae_cl/seed100"] = 2
        assert fake.main() == 0
        assert fake.record()["failed"] == {"mae_cl": "seed 100: error: a loss that is not finite | numbers"}
        told = (fake.out / "no_regret_mini.md").read_text()
        assert "| mae_cl | failed: seed 100: error: a loss that is not finite / numbers |" in told
        assert len(fake.record()["candidates"]) == len(study.CANDIDATES) - 1
        assert f"{len(study.CANDIDATES)} candidates" in told

    def test_a_confirming_seed_that_diverges_is_told_and_the_answer_is_no(self, fake):
        assert fake.main() == 0
        chosen = fake.record()["chosen"]["candidate"].replace(", ", "-").replace(" ", "_")
        for name in ("json", "md"):
            (fake.out / f"no_regret_mini.{name}").unlink()
        folder = fake.out / "runs" / "no_regret_mini" / chosen / "seed203"
        (folder / "results.json").unlink()
        fake.codes[f"{chosen}/seed203"] = 2
        assert fake.main() == 0
        assert fake.record()["answer"] == "No" and len(fake.record()["unconfirmed"]) == 1
        assert "Seeds that could not be trained: seed 203" in (fake.out / "no_regret_mini.md").read_text()

    def test_a_run_that_was_stopped_or_killed_is_no_failed_candidate(self, fake, capsys):
        for code in (STOPPED, -9, 143, 1):
            fake.codes["mae_cl/seed100"] = code
            assert fake.main() == 2
            assert "the same call goes on with it" in capsys.readouterr().err
            assert not fake.choice.exists()


class TestStale:
    @pytest.fixture
    def one(self, fake, runs, study):
        world = runs.make_world("mini", fake.out / "runs")
        run = runs.Run(runs.Candidate("film"), 100, world)
        runs.fit(run)
        return run

    def test_a_run_that_is_there_is_not_made_again(self, fake, runs, one):
        runs.fit(one)
        assert fake.fitted == ["film/seed100"]

    def test_one_that_lost_its_weights_is(self, fake, runs, one):
        (one.folder / "checkpoints" / "last.ckpt").unlink()
        runs.fit(one)
        assert fake.fitted == ["film/seed100"] * 2

    @pytest.mark.parametrize("what", ["options", "weights or captions", "unknown"])
    def test_one_of_other_options_weights_or_captions_is_made_again_and_said_so(self, fake, runs, one, what, capsys):
        kept = one.folder / "kept"
        kept.touch()
        other = one
        if what == "options":
            other = replace(one, world=replace(one.world, options=("--data.pairs", "64")))
        elif what == "weights or captions":
            other = replace(one, world=replace(one.world, identity=("of other files",)))
        else:
            (one.folder / "key.txt").unlink()
        runs.fit(other)
        assert fake.fitted == ["film/seed100"] * 2 and not kept.exists()
        assert "film, seed 100: not known to be of these options" in capsys.readouterr().out

    def test_what_a_recipe_says_counts_and_its_comments_do_not(self, runs, tmp_path):
        recipe, keys = tmp_path / "film.yaml", []
        for text in ("approach: film", "# more\napproach: film  # a comment", "approach: film\nmodel: {lr: 0.5}"):
            recipe.write_text(text)
            keys.append(runs._key(["-c", str(recipe)], ()))
        assert keys[0] == keys[1] != keys[2]

    def test_files_are_known_by_their_names_and_bytes(self, runs, tmp_path):
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "model").write_text("1")
        first = runs.files_sha256(tmp_path / "weights")
        (tmp_path / "weights" / "model").write_text("2")
        assert runs.files_sha256(tmp_path / "weights") != first
        with pytest.raises(WlsupError, match="No such file or folder"):
            runs.files_sha256(tmp_path / "none")

    def test_scores_are_of_their_checkpoint_grid_and_sets(self, fake, runs, one, capsys):
        grid = (0.0, 0.5, 1.0)
        found = runs.scored(one, grid, "validation")
        assert {name: tuple(entry["right"].shape) for name, entry in found.items()} == dict.fromkeys(
            ("home", "away", "far"), (3, 20)
        )
        again = runs.scored(one, grid, "validation")
        assert len(fake.loaded) == 1 and torch.equal(again["far"]["right"], found["far"]["right"])
        (one.folder / "checkpoints" / "last.ckpt").write_text("trained otherwise")
        other = runs.scored(one, grid, "validation")
        assert fake.loaded[1:] == ["trained otherwise"]
        assert not torch.equal(other["far"]["right"], found["far"]["right"])
        assert torch.equal(other["far"]["right"][0], found["far"]["right"][0])  # alpha 0 is the encoder's
        assert "scored again" in capsys.readouterr().out
        runs.scored(one, (0.0, 1.0), "validation")
        assert len(fake.loaded) == 3

    def test_a_model_that_is_not_the_encoder_at_alpha_0_has_no_line(self, fake, runs, one, monkeypatch):
        load_run = runs.load_run

        def elsewhere(folder):
            module, data = load_run(folder)
            module.start.tensors["weight"] = torch.arange(12.0)
            return module, data

        monkeypatch.setattr(runs, "load_run", elsewhere)
        assert "at alpha 0 it is not the pretrained encoder" in runs.outcome(one, (0.0, 1.0), "validation")


SHORT = (
    "--data.pairs", "64", "--data.validation_pairs", "16", "--data.batch_size", "16", "--trainer.max_epochs", "2",
)  # fmt: skip


@pytest.mark.slow
class TestTraining:
    """With real training of a few steps."""

    @pytest.fixture(scope="class")
    def trained(self, runs, tmp_path_factory):
        world = runs.make_world("mini", tmp_path_factory.mktemp("runs"))
        run = runs.Run(runs.Candidate("film", SHORT), 100, world)
        runs.write_text(run.folder / "key.txt", run.key)
        assert wlsup(["fit", *run.arguments, "--run_dir", str(run.folder), "--resume", "auto"]) == 0
        return run

    def test_what_is_switched_off_changes_nothing_that_is_trained(self, runs, trained, tmp_path):
        loud = [*runs._recipes("film"), "--seed_everything", "100", "--data.eval_sets", "[]", *SHORT]
        assert wlsup(["fit", *loud, "--run_dir", str(tmp_path / "run")]) == 0
        quiet, other = (
            read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
            for folder in (trained.folder, tmp_path / "run")
        )
        assert quiet.keys() == other.keys()
        assert all(torch.equal(quiet[name], other[name]) for name in quiet)
        assert list((tmp_path / "run").rglob("events.out.*")) and not list(trained.folder.rglob("events.out.*"))

    def test_a_run_is_scored_along_its_line_and_workers_use_what_is_there(self, runs, trained, few_mini_pictures):
        found = runs.outcome(trained, (0.0, 0.5, 1.0), "validation")
        assert {name: (entry["domain"], tuple(entry["right"].shape)) for name, entry in found.items()} == {
            "mini_shapes": ("in", (3, 200)),
            **dict.fromkeys(("mini_digits", "mini_landcover", "mini_textures"), ("out", (3, 200))),
        }
        (again,) = runs.in_workers([trained], (0.0, 0.5, 1.0), "validation")
        assert all(torch.equal(again[name]["right"], found[name]["right"]) for name in found)


@pytest.mark.parametrize("world", ["mini", "real"])
def test_page_and_table_tell_the_committed_record(study, world):
    results = ROOT / "experiments" / "results"
    record = json.loads((results / f"no_regret_{world}.json").read_text())
    assert study.markdown(record) == (results / f"no_regret_{world}.md").read_text()
    assert record["chosen"] == json.loads((results / f"no_regret_{world}_choice.json").read_text())
    assert record["answer"] == study.verdict(record["test"])
    page = (ROOT / "docs" / "no-regret.md").read_text()
    part = page.partition("## The real pictures")[0 if world == "mini" else 2]
    assert f"**{record['answer'].removesuffix(' only')}" in part
    rows = [(f"`{name}` ({one['domain']}) | {one['test']:,}", one) for name, one in record["test"]["sets"].items()]
    rows += [("in domain | ", record["test"]["in"]), ("out of domain | ", record["test"]["out"])]
    for name, one in rows:
        row = next(line for line in part.splitlines() if line.startswith(f"| {name}"))
        intervals = [f"[{100 * low:+.2f}, {100 * high:+.2f}]" for low, high in (one["ci95"], one["crossed_ci95"])]
        assert row.endswith(" | ".join(["", f"{100 * one['mean']:+.2f}", *intervals]) + " |"), row
