"""What `wlsup evaluate` writes is on the page, figure by figure; and spectra compare the same layers."""

import json

import torch
from run_maker import make_run, write
from run_maker import spectra as made_spectra

from wlsup.batch import CaptionBatch
from wlsup.callbacks.evaluation import score_retrieval
from wlsup.evaluation.judgement import Judgement, MetricSpec, compare, protocols
from wlsup.evaluation.report.figures.spectra import spectra_chart
from wlsup.evaluation.report.groups import group_runs
from wlsup.evaluation.report.runs import find_runs, read_run, read_runs
from wlsup.evaluation.report.sections.classes import classes
from wlsup.evaluation.report.sections.curves import spectra
from wlsup.evaluation.report.sections.measured import beyond_knn, tasks
from wlsup.evaluation.statistics import wilson
from wlsup.evaluation.zero_shot import zero_shot


class Pairs(torch.nn.Linear):
    """A space that pictures share with captions, which are pictures of much noise here."""

    def embed(self, batch):
        image = batch.images.flatten(1)
        return image, image + 2 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))


def evaluated(right):
    """Return evaluation.json as the package's own functions make it, ``right`` of 40 pictures right by zero-shot."""
    spec = MetricSpec(("drift", "zero_shot", "retrieval"), resamples=100)
    labels, rows = torch.arange(40) % 4, torch.arange(40)
    random = torch.Generator().manual_seed(0)
    sample = torch.randn(40, 8, generator=random)
    sides = [
        Judgement(labels, rows, 20, 0.07, rows % 3 > 0, sample=features.half(), sampled=rows)
        for features in (sample, sample + 0.3 * torch.randn(40, 8, generator=random))
    ]
    entry = compare(*sides, spec, list("abcd"), "out")
    seen = torch.eye(4)[torch.where(rows < right, labels, (labels + 1) % 4)]
    entry["zero_shot"] = zero_shot(seen, labels, torch.eye(4)) | {"templates": 2, "prompts": "default.txt"}
    images = torch.randn(20, 3, 2, 2, generator=random)
    retrieval = score_retrieval(Pairs(1, 1), [CaptionBatch(images, ["a"] * 20, list(map(str, range(20))))])
    sets = {"mini_digits": entry}
    return {"protocol": protocols(spec, sets, True), "sets": sets, "retrieval": retrieval}


def tables_of(section):
    return {table.caption.split(".")[0]: table for table in section.blocks if hasattr(table, "rows")}


def groups_in(root):
    return group_runs(read_runs(find_runs([root])[0])[0])


def test_zero_shot_has_its_interval_and_chance_beside_it(tmp_path):
    write(make_run(tmp_path, "film", 0) / "evaluation.json", evaluated(30))
    table = tables_of(beyond_knn(groups_in(tmp_path)))["Zero-shot"]
    assert "zero-shot:v1" in table.caption
    assert table.headers == ("approach", "set", "accuracy, %", "chance, %")
    ((approach, name, accuracy, chance),) = table.rows
    _, low, high = wilson(30, 40)
    assert (approach.text, name.text) == ("film", "mini_digits")
    assert (accuracy.text, accuracy.detail) == ("75.0", f"[{100 * low:.1f}, {100 * high:.1f}]")
    assert (chance.text, chance.detail) == ("25.0", "computed")


def test_zero_shot_of_several_seeds_is_their_mean(tmp_path):
    for seed, right in enumerate((28, 30, 32)):
        write(make_run(tmp_path, "film", seed) / "evaluation.json", evaluated(right))
    ((_, _, accuracy, chance),) = tables_of(beyond_knn(groups_in(tmp_path)))["Zero-shot"].rows
    assert (accuracy.text, accuracy.detail) == ("75.0", "[62.6, 87.4]")  # 75 +- 4.303 * 5 / sqrt(3)
    assert chance.text == "25.0"


def test_the_chance_of_kept_neighbours_stands_beside_them(tmp_path):
    made = evaluated(30)
    write(make_run(tmp_path, "film", 0) / "evaluation.json", made)
    table = tables_of(beyond_knn(groups_in(tmp_path)))["Drift"]
    place = table.headers.index("chance")
    assert table.headers[place - 1] == "k-NN overlap"
    assert table.rows[0][place].text == f"{made['sets']['mini_digits']['drift']['chance']:.3f}"


def test_retrieval_of_the_evaluation_is_shown_beside_the_runs_own(tmp_path):
    made = json.loads(json.dumps(evaluated(30)))["retrieval"]
    write(make_run(tmp_path, "film", 0) / "evaluation.json", evaluated(30))
    make_run(tmp_path, "lora", 0)  # whose evaluation has none
    groups = groups_in(tmp_path)
    table = tables_of(beyond_knn(groups))["Held-out retrieval, in %: how often the right one is among the k nearest"]
    assert "retrieval:v1" in table.caption
    ((approach, pairs, *recalls, chance),) = table.rows
    assert (approach.text, pairs.text, chance.text) == ("film", "20", "5.0, 25.0, 50.0")
    columns = [(way, k) for way in ("image_to_text", "text_to_image") for k in ("1", "5", "10")]
    for cell, (way, k) in zip(recalls, columns, strict=True):
        low, high = made["ci95"][way][k]
        assert (cell.text, cell.detail) == (f"{100 * made[way][k]:.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]")
    own = next(table for caption, table in tables_of(tasks(groups)).items() if caption.startswith("Held-out"))
    assert [row[1].text for row in own.rows] == ["64", "64"]


def test_an_evaluation_whose_retrieval_is_damaged_is_told(tmp_path):
    folder = make_run(tmp_path, "film", 0)
    write(folder / "evaluation.json", {**evaluated(30), "retrieval": {"pairs": 20}})
    run = read_run(folder)
    assert not run.evaluation
    assert "evaluation.json" in run.problems[0]


def test_medians_of_alpha_are_of_the_layers_with_a_power_law_before_and_after(tmp_path):
    made = made_spectra()  # before 3, 4, 5; after 2.5, 3.5, 4.5; and one without any
    law = made["layers"][0]["after"]
    made["layers"] += [
        {"name": f"head.{i}", "shape": [60, 60], "before": None, "after": {**law, "alpha": 30.0}} for i in range(4)
    ]
    none = {**law, "alpha": None, "power_law": False, "why": "D above 0.1"}
    made["layers"][1]["after"] = none
    write(make_run(tmp_path, "film", 0) / "spectra.json", made)
    (group,) = groups_in(tmp_path)
    ((_, _, before, after, layers),) = spectra([group]).blocks[0].rows
    assert (before.text, after.text, layers.text) == ("4.00", "3.50", "2 of 8")
    assert "Median alpha of the 2 that do so before and after: 4.00 and 3.50." in spectra_chart(group).description


def test_figures_too_many_for_a_sheet_of_paper_are_rows(tmp_path):
    make_run(tmp_path, "film", 0)
    table = tables_of(beyond_knn(groups_in(tmp_path)))["Calibration"]
    assert table.headers == ("approach", "set", "figure", "pretrained", "fine-tuned", "change")
    assert len(table.rows) == 3 * 8  # sets, figures
    assert [cell.text for cell in table.rows[2]] == ["film", "mini_shapes", "k-NN NLL", "1.400", "1.400", "+0.000"]
    assert table.rows[2][3].detail == "[1.380, 1.420]"


def test_a_class_has_the_pictures_of_whichever_seed_kept_some(tmp_path):
    for seed in range(2):
        folder = make_run(tmp_path, "film", seed)
        lost = "star" if seed == 0 else "ring"  # seed 0 kept rings alone, seed 1 stars
        for file in folder.rglob(f"*{lost}*.png"):
            file.unlink()
    (table,) = (block for block in classes(groups_in(tmp_path)).blocks if hasattr(block, "rows"))
    changed = [row for row in table.rows if row[1].text != "disc"]
    assert len(changed) == 6
    assert all(row[2].pictures for row in changed)
    for file in tmp_path.rglob("*star*.png"):
        file.unlink()
    (table,) = (block for block in classes(groups_in(tmp_path)).blocks if hasattr(block, "rows"))
    assert [row[2].text for row in table.rows if row[1].text == "star"] == ["none kept"] * 3


def test_captions_and_tasks_say_by_which_protocol(tmp_path):
    folder = make_run(tmp_path, "film", 0)
    results = json.loads((folder / "results.json").read_text())
    results["captioning"]["protocol"], results["task"]["protocol"] = "captions:v9", "task:v9"
    write(folder / "results.json", results)
    captions = [block.caption for block in tasks(groups_in(tmp_path)).blocks]
    assert any("Protocol: captions:v9." in caption for caption in captions)
    assert any("Protocol: task:v9." in caption for caption in captions)
