"""Rows: what is one, what its interval is over, and that no figure is bare."""

import math

import pytest
from run_maker import SETS, make_run
from scipy import stats

from wlsup.errors import WlsupError
from wlsup.evaluation.report.groups import comparable, group_runs, of_share
from wlsup.evaluation.report.runs import find_runs, read_run, read_runs


def groups_in(root, order=()):
    return group_runs(read_runs(find_runs([root])[0])[0], order)


def test_seeds_are_one_row_with_students_interval(tmp_path):
    for seed in range(3):
        make_run(tmp_path, "film", seed)
    (group,) = groups_in(tmp_path)
    values = [run.results["knn"]["mini_digits"]["delta"] for run in group.runs]
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    estimate = group.delta("mini_digits")
    assert (estimate.basis, estimate.count) == ("seeds", 3)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((sum(values) / 3, low, high))


def test_one_seed_has_the_bootstraps_interval_and_says_so(tmp_path):
    make_run(tmp_path, "film", 0)
    (group,) = groups_in(tmp_path)
    entry = group.runs[0].results["knn"]["mini_digits"]
    estimate = group.delta("mini_digits")
    assert (estimate.low, estimate.high, estimate.basis) == (*entry["ci95"], "pictures")
    mean = group.domain_delta("out")  # of two sets, each +- 0.03
    assert mean.high - mean.value == pytest.approx(math.sqrt(2 * 0.03**2) / 2)


def test_a_run_without_intervals_has_none_rather_than_a_made_up_one(tmp_path):
    entry = {"domain": "in", "pretrained": 0.4, "finetuned": 0.3, "delta": -0.1}
    make_run(tmp_path, "film", 0, whole=False, knn={"mini_shapes": entry})
    (group,) = groups_in(tmp_path)
    for estimate in (group.delta("mini_shapes"), group.domain_delta("in"), group.finetuned("mini_shapes")):
        assert (estimate.low, estimate.basis, estimate.verdict) == (None, "none", "unsure")
    assert group.domain_delta("out") is None


def test_another_configuration_is_another_row_that_says_what_differs(tmp_path):
    make_run(tmp_path / "a", "film", 0)
    make_run(tmp_path / "b", "film", 1)
    make_run(tmp_path / "c", "film", 0, options={"model.regularizer.distill": 1.0})
    groups = groups_in(tmp_path)
    assert [(group.name, [run.seed for run in group.runs]) for group in groups] == [
        ("film (regularizer.distill 0.0)", [0, 1]),
        ("film (regularizer.distill 1.0)", [0]),
    ]


def test_places_and_seeds_do_not_part_runs_and_of_a_seed_run_twice_the_newer_counts(tmp_path):
    import os

    old, new = make_run(tmp_path / "a", "film", 0, seconds=1.0), make_run(tmp_path / "b", "film", 0, seconds=2.0)
    os.utime(old / "results.json", (1, 1))
    (group,) = groups_in(tmp_path)
    assert [run.folder for run in group.runs] == [new]
    assert "1 older" in group.notes[0]


def test_a_run_without_a_configuration_joins_the_row_that_it_does_not_contradict(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "film", seed)
    make_run(tmp_path, "film", 2, whole=False)
    (group,) = groups_in(tmp_path)
    assert [run.seed for run in group.runs] == [0, 1, 2]
    make_run(tmp_path, "film", 3, whole=False, steps=61)
    assert [[run.seed for run in group.runs] for group in groups_in(tmp_path)] == [[0, 1, 2], [3]]


@pytest.mark.parametrize("whole", [True, False])
def test_seeds_that_chose_other_groups_of_layers_are_one_row(whole, tmp_path):
    for seed, trained in enumerate((270977, 159329)):
        make_run(tmp_path, "selective_k", seed, whole=whole, parameters={"total": 10**6, "trained": trained})
    (group,) = groups_in(tmp_path)
    assert len(group.runs) == 2


def test_no_two_rows_have_one_name(tmp_path):
    for number, last in enumerate((1, 2)):
        keys = ("model.a", "model.b", "model.c")
        make_run(tmp_path / str(number), "film", 0, options=dict.fromkeys(keys, 0) | {"model.d": last})
    make_run(tmp_path / "2", "film", 0, options=dict.fromkeys(("model.a", "model.b", "model.c"), 1) | {"model.d": 1})
    names = [group.name for group in groups_in(tmp_path)]
    assert len(set(names)) == 3 and names[1] == f"{names[0]} [2]"


def test_groups_come_in_the_order_of_the_approaches(tmp_path):
    for name in ("lit", "film", "zzz"):
        make_run(tmp_path, name, 0)
    assert [group.name for group in groups_in(tmp_path, ["film", "lit"])] == ["film", "lit", "zzz"]


def test_an_untrained_encoder_is_unchanged_and_neither_gain_nor_loss(tmp_path):
    make_run(tmp_path, "lit", 0)
    (group,) = groups_in(tmp_path)
    assert group.untouched
    assert group.delta("mini_digits").verdict == "untouched"


def test_wilsons_interval_is_scipys():
    for share, count in ((0.0, 20), (0.35, 20), (1.0, 20), (0.5, 500)):
        expected = stats.binomtest(round(share * count), count).proportion_ci(0.95, "wilson")
        estimate = of_share(share, count, "pictures")
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_runs_are_found_once_however_often_they_are_named(tmp_path):
    one = make_run(tmp_path, "film", 0)
    begun = tmp_path / "film" / "seed1"
    begun.mkdir()
    (begun / "config.yaml").write_text("{}")
    found, unfinished = find_runs([tmp_path, one, tmp_path / "film"])
    assert found == [one]
    assert unfinished == [begun]


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(WlsupError, match="No folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(WlsupError, match="No finished run"):
        find_runs([tmp_path])
    for text, said in (
        ("{", "not a run's results"),
        ('{"approach": "film"}', "lacks preset"),
        ("[]", "not a JSON object"),
    ):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(WlsupError, match=said):
            read_run(tmp_path)
    bad = make_run(tmp_path, "film", 0, knn={"mini_shapes": {"domain": "in", "delta": "much"}})
    with pytest.raises(WlsupError, match="knn.mini_shapes"):
        read_run(bad)


def test_a_damaged_piece_is_told_and_the_rest_is_read(tmp_path):
    folder = make_run(tmp_path, "film", 0)
    (folder / "wise_ft.json").write_text("{")
    (folder / "metrics.csv").write_text("step,val/loss\n1,much\n")
    (folder / "spectra.json").write_text('{"layers": [{"name": "a"}]}')
    (folder / "plan.json").write_text('{"rules": 3}')
    run = read_run(folder)
    told = {problem.split(":")[0] for problem in run.problems}
    assert told == {"wise_ft.json", "metrics.csv", "spectra.json", "plan.json"}
    assert run.evaluation
    assert not run.wise_ft


def test_means_over_other_sets_or_by_another_protocol_are_not_compared(tmp_path):
    from wlsup.evaluation.report.figures.changes import front
    from wlsup.evaluation.report.sections.changes import findings, in_against_out

    for approach in ("film", "bottleneck"):
        make_run(tmp_path, approach, 0)
    knn = {name: entry for name, entry in _entries().items() if name != "mini_textures"}
    make_run(tmp_path, "lora", 0, knn=knn)
    make_run(tmp_path, "full", 0, protocol="knn-dino:v1 cosine T=0.07 k=10 weighted")
    groups = groups_in(tmp_path)
    alike, others = comparable(groups)
    assert [group.name for group in alike] == ["bottleneck", "film"]
    assert sorted(group.name for group in others) == ["full", "lora"]
    candidates, _ = front(groups)
    assert [name for name, _, _ in candidates] == ["pretrained", "bottleneck", "film"]
    for section in (findings(groups), in_against_out(groups)):
        told = str(section.blocks[0])
        assert (
            "Over other sets or by another protocol than most, so that their means do not compare: full, lora." in told
        )
    assert "k=10" not in str(in_against_out(groups).blocks[0])


def _entries():
    return {
        name: {"domain": domain, "k": 20, "temperature": 0.07, "train": 9, "test": 9, "pretrained": 0.4,
               "finetuned": 0.9, "delta": 0.5, "ci95": [0.4, 0.6]}
        for name, domain in SETS.items()
    }  # fmt: skip


def test_settings_are_not_counted_as_approaches(tmp_path):
    from wlsup.evaluation.report.sections.changes import findings

    make_run(tmp_path / "a", "film", 0)
    make_run(tmp_path / "c", "film", 0, options={"model.regularizer.distill": 1.0})
    assert "2 runs of one approach in 2 settings, seed 0." in str(findings(groups_in(tmp_path)).blocks[0])


def test_an_exported_adapter_is_no_unfinished_run(tmp_path):
    folder = make_run(tmp_path, "film", 0)
    (folder / "export-adapter").mkdir()
    for name in ("config.yaml", "adapter_config.json"):
        (folder / "export-adapter" / name).write_text("{}")
    assert find_runs([tmp_path]) == ([folder], [])
