"""Two encoders compared on one set: the same twice is no change, and a judgement survives a checkpoint."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from clusters import clusters  # noqa: E402

from wlsup.errors import WlsupError  # noqa: E402
from wlsup.evaluation.evaluation_table import evaluation_markdown, evaluation_text  # noqa: E402
from wlsup.evaluation.features import Features  # noqa: E402
from wlsup.evaluation.judgement import Judgement, MetricSpec, compare, judge, protocols  # noqa: E402
from wlsup.evaluation.knn import knn_accuracy  # noqa: E402

SPEC = MetricSpec(("probe", "few_shot", "calibration", "drift", "classes"), shots=(1, 3), draws=3, resamples=200)
NAMES = ["a", "b", "c", "d"]


def judgement(noise: float, seed: int = 0, spec: MetricSpec = SPEC) -> Judgement:
    bank, queries = clusters(120, noise=noise, seed=seed), clusters(100, noise=noise, seed=seed + 50)
    return judge(bank, queries, knn_accuracy(bank, queries, num_classes=4), spec, num_classes=4)


@pytest.fixture(scope="module")
def better():
    return compare(judgement(2.5), judgement(0.8), SPEC, NAMES, "out")


def test_an_encoder_compared_with_itself_has_no_change():
    one = judgement(1.5)
    entry = compare(one, one, SPEC, NAMES, "in")
    assert (entry["knn"]["delta"], entry["probe"]["delta"]) == (0.0, 0.0)
    assert entry["drift"]["cka"] == pytest.approx(1.0, abs=1e-6)
    assert (entry["drift"]["knn_overlap"], entry["drift"]["knn_overlap_ci95"]) == (1.0, [1.0, 1.0])
    assert all(row["verdict"] == "unsure" and row["ci95"] == [0.0, 0.0] for row in entry["classes"])
    assert all(one["ci95"] == [0.0, 0.0] for by in entry["few_shot"].values() for one in by.values())
    assert entry["calibration"]["knn"]["ece"]["ci95"] == [0.0, 0.0]


def test_a_better_encoder_is_better_by_every_accuracy(better):
    for one in (better["knn"], better["probe"], better["few_shot"]["centroid"]["3"]):
        assert one["ci95"][0] > 0
        assert one["delta"] == pytest.approx(one["finetuned"] - one["pretrained"])
    assert better["drift"]["cka"] < 0.9


def test_a_judgement_survives_a_checkpoint_that_may_hold_no_code(better):
    kept = io.BytesIO()
    torch.save({"x": judgement(2.5).state()}, kept)
    kept.seek(0)
    loaded = Judgement(**torch.load(kept, weights_only=True)["x"])
    assert compare(loaded, judgement(0.8), SPEC, NAMES, "out") == better


def test_other_queries_are_refused():
    one, other = judgement(1.0), judgement(1.0)
    other.indices = other.indices + 1
    with pytest.raises(WlsupError, match="judged by different pictures"):
        compare(one, other, SPEC, NAMES, "in")


def test_only_what_is_asked_for_is_measured():
    spec = MetricSpec(("drift",))
    one = judgement(1.0, spec=spec)
    assert one.probe_correct is None and one.shots is None and one.votes is None
    entry = compare(one, one, spec, NAMES, "in")
    assert set(entry) == {"domain", "n", "knn", "drift"}
    assert set(protocols(spec, {"s": entry})) == {"knn", "drift"}
    with pytest.raises(WlsupError, match="Did you mean 'drift'"):
        MetricSpec(("drif",))


def test_the_drift_sample_is_the_same_pictures_for_both_and_small():
    bank = Features(
        torch.nn.functional.normalize(torch.randn(3000, 4), dim=1), torch.arange(3000) % 4, torch.arange(3000)
    )
    queries = clusters(20, width=4)
    knn = knn_accuracy(bank, queries, num_classes=4)
    spec = MetricSpec(("drift",))
    first, second = (judge(bank, queries, knn, spec, num_classes=4).sample for _ in range(2))
    assert torch.equal(first, second) and first.shape == (1000, 4) and first.dtype == torch.float16


def test_drift_of_a_bank_that_has_changed_is_refused():
    bank, queries = clusters(200, width=4), clusters(20, width=4)
    knn, spec = knn_accuracy(bank, queries, num_classes=4), MetricSpec(("drift",))
    before = judge(bank, queries, knn, spec, num_classes=4)
    changed = Features(bank.features, bank.labels, bank.indices + 1)
    after = judge(changed, queries, knn, spec, num_classes=4)
    with pytest.raises(WlsupError, match="different pictures"):
        compare(before, after, spec, class_names=tuple("abcd"), domain="in")


def test_the_table_has_an_interval_on_every_line_and_the_protocols_below(better):
    results = {"protocol": protocols(SPEC, {"s": better}), "sets": {"s": better}}
    lines = evaluation_text(results, "title").splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("In brackets"))
    for line in lines[3:end]:
        assert line.count("[") == (1 if "with pretrained" in line else 3), line
    assert all(any(line.startswith(f"{name}: ") for line in lines) for name in SPEC.metrics)
    assert lines[3].split()[-1] == "better"
    rows = [line for line in evaluation_markdown(results).splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {8}


def test_alone_there_are_no_changes_in_the_table():
    entry = compare(judgement(1.0), None, SPEC, NAMES, "in")
    text = evaluation_text({"protocol": protocols(SPEC, {"s": entry}), "sets": {"s": entry}})
    assert "fine-tuned" not in text and "delta" not in entry["probe"] and "drift" not in entry
