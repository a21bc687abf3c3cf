"""What reprogramming promises beside the contract: it learns from training pictures only, and measures honestly."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch.utils.data import Dataset, Subset

from wlsup.approaches.reprogramming import ReprogrammingApproach
from wlsup.batch import CaptionBatch, EvalSet
from wlsup.cli import main
from wlsup.data.mini import mini_eval_set
from wlsup.errors import WlsupError
from wlsup.optim import OptimizerSpec
from wlsup.reprogramming.input import InputSpec
from wlsup.reprogramming.label_map import LabelMapSpec


class Closed(Dataset):
    """A set that counts who looks."""

    def __init__(self, dataset):
        self.dataset, self.looks = dataset, 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.looks += 1
        return self.dataset[index]


def small_sets(spec, number=60):
    sets = []
    for name in ("mini_shapes", "mini_digits"):
        whole = mini_eval_set(name, spec)
        train, test = Subset(whole.train, range(number)), Closed(Subset(whole.test, range(number)))
        sets.append(EvalSet(name, whole.domain, train, test, whole.class_names))
    return SimpleNamespace(eval_datasets=lambda: sets, batch_size=8)


def batch(count=8):
    return CaptionBatch(torch.zeros(count, 3, 64, 64), ["a"] * count, [str(i) for i in range(count)])


@pytest.fixture
def prepared():
    approach = ReprogrammingApproach(lr=0.1, program=InputSpec(40, "all"))
    approach.setup("fit")
    data = small_sets(approach.image_spec)
    approach.prepare(data)
    return approach, data


def taught(approach, steps):
    approach.train()
    optimizer = torch.optim.Adam(approach.net.program.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(approach.losses(batch())["loss"])
        losses[-1].backward()
        optimizer.step()
    return [float(loss.detach()) for loss in losses]


def attach(approach, steps, epochs=1):
    approach._trainer = SimpleNamespace(
        global_step=steps, current_epoch=epochs, estimated_stepping_batches=max(steps, 2), gradient_clip_val=1.0,
        gradient_clip_algorithm=None, precision_plugin=Precision(), world_size=1, accumulate_grad_batches=1,
        datamodule=SimpleNamespace(batch_size=8),
    )  # fmt: skip


def test_captions_and_their_pictures_have_no_part_in_it(prepared):
    approach, _ = prepared
    values = []
    for images in (torch.zeros(8, 3, 64, 64), torch.randn(8, 3, 64, 64)):
        torch.manual_seed(3)
        values.append(approach.losses(CaptionBatch(images, ["other words"] * 8, list("abcdefgh")))["loss"].item())
    assert values[0] == values[1]


def test_the_test_split_is_looked_at_by_the_measure_alone(prepared):
    approach, data = prepared
    taught(approach, 2)
    approach.log = lambda *args, **kwargs: None
    approach.on_train_epoch_end()
    assert [eval_set.test.looks for eval_set in data.eval_datasets()] == [0, 0]
    assert not set(approach._learn.positions) & set(approach._choose.positions)
    attach(approach, 2)
    approach.eval().measure(data)
    assert all(eval_set.test.looks for eval_set in data.eval_datasets())


def test_the_measure_compares_with_chance_no_program_and_a_random_network_of_the_same_budget(prepared, monkeypatch):
    approach, data = prepared
    taught(approach, 3)
    after, calls = approach.net.program.weight.detach().clone(), []
    monkeypatch.setattr(
        "wlsup.approaches.reprogramming.train_alike",
        lambda parts, plan, optimizer, trainer, ema, losses, after: calls.append(
            (parts[0].weight.clone(), trainer.global_step)
        ),
    )
    attach(approach, 3)
    with torch.inference_mode():
        task = approach.eval().measure(data)
    assert [row["what"].split(":")[0] for row in task["rows"]] == [
        "this program", "the same program, a random network", "no program, a grey frame", "the classifier itself",
    ]  # fmt: skip
    assert all(0 <= row["value"] <= 100 and row["chance"] == pytest.approx(10, abs=0.1) for row in task["rows"])
    assert "against the random network's" in task["note"]
    assert torch.equal(approach.net.program.weight, after)
    (start, steps), = calls  # fmt: skip
    assert (float(start.abs().max()), steps) == (0.0, 3)


def test_a_random_network_that_cannot_be_trained_costs_no_other_row(prepared, monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    approach, data = prepared
    monkeypatch.setattr("wlsup.approaches.reprogramming.train_alike", fails)
    attach(approach, 3)
    task = approach.eval().measure(data)
    assert [row["what"].split(":")[0] for row in task["rows"]] == [
        "this program", "no program, a grey frame", "the classifier itself",
    ]  # fmt: skip
    assert "left out (OutOfMemoryError: CUDA out of memory.)" in task["note"]


def test_with_a_linear_label_map_there_is_no_row_of_its_random_first_weights():
    approach = ReprogrammingApproach(label_map=LabelMapSpec(kind="linear"), compare=False)
    data = small_sets(approach.image_spec)
    approach.prepare(data)
    with torch.no_grad():
        approach.net.label_map.linear.weight.fill_(0.5)
    task = approach.eval().measure(data)
    assert [row["what"].split(":")[0] for row in task["rows"]] == ["this program", "the classifier itself"]
    assert (approach.net.label_map.linear.weight == 0.5).all()


def test_the_program_measured_is_the_one_chosen_on_held_out_training_pictures(prepared):
    approach, data = prepared
    approach.log, approach.compare = lambda *args, **kwargs: None, False
    scores = iter([0.2, 0.6, 0.3])
    approach._validate = lambda net: next(scores)
    kept = []
    for value in (0.1, 0.2, 0.3):
        with torch.no_grad():
            approach.net.program.weight.fill_(value)
        approach.on_train_epoch_end()
    right = approach._right

    def watched(net, part):
        kept.append(float(getattr(net, "program", net).weight.detach().flatten()[0]))
        return right(net, part)

    approach._right = watched
    approach.measure(data)
    assert kept[0] == pytest.approx(0.2)
    assert kept[1] == 0.0  # no program
    assert float(approach.net.program.weight.detach()[0, 0, 0]) == pytest.approx(0.3)


def test_a_checkpoint_brings_head_label_map_and_best_program_back(prepared, tmp_path):
    approach, data = prepared
    approach.log = lambda *args, **kwargs: None
    classifier = approach.net.classifier
    classifier.set_head(classifier.weight * 1.5, classifier.bias)  # not the one that would be fitted here
    taught(approach, 2)
    approach.on_train_epoch_end()
    checkpoint = {"state_dict": dict(approach.state_dict())}
    approach.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    read = torch.load(tmp_path / "last.ckpt", weights_only=True)
    fresh = ReprogrammingApproach(lr=0.1, program=InputSpec(40, "all"))
    fresh.setup("fit")
    fresh.on_load_checkpoint(read)
    fresh.load_state_dict(read["state_dict"], strict=False)
    fresh.prepare(data)
    assert torch.equal(fresh.net.classifier.weight, approach.net.classifier.weight)
    assert torch.equal(fresh.net.label_map.assigned, approach.net.label_map.assigned)
    assert fresh._best[0] == approach._best[0]
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(fresh.eval().net(images)[0], approach.eval().net(images)[0])


def test_a_program_is_learned(prepared):
    approach, _ = prepared
    losses = taught(approach, 30)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert approach.losses(batch())["clamped"] > 0


def test_a_linear_label_map_trains_and_a_fixed_one_has_nothing_to_train():
    linear = ReprogrammingApproach(label_map=LabelMapSpec(kind="linear"))
    assert set(linear.plan.trained_names(linear)) == {
        "net.program.weight", "net.label_map.linear.weight", "net.label_map.linear.bias",
    }  # fmt: skip
    fixed = ReprogrammingApproach()
    assert fixed.plan.trained_names(fixed) == ["net.program.weight"]
    with pytest.raises(WlsupError, match="label_map.kind to linear"):
        ReprogrammingApproach(classes=30, label_map=LabelMapSpec(kind="fixed"))


def test_without_a_labelled_set_it_says_what_it_needs():
    approach = ReprogrammingApproach()
    approach.setup("fit")
    with pytest.raises(WlsupError, match=r"learns from the labelled set 'mini_digits', not from pairs"):
        approach.losses(batch())
    data = small_sets(approach.image_spec)
    with pytest.raises(WlsupError, match="'cifar10' is not among the run's eval sets"):
        ReprogrammingApproach(task="cifar10").prepare(data)
    with pytest.raises(WlsupError, match="mini_digits has 10 classes; model.classes says 9"):
        ReprogrammingApproach(classes=9).prepare(data)


@pytest.mark.slow
@pytest.mark.usefixtures("few_mini_pictures")
def test_a_run_ends_in_both_tables_and_the_encoder_is_as_it_was(tmp_path, capsys):
    options = ["--data.pairs", "64", "--data.validation_pairs", "16", "--data.batch_size", "16"]
    options += ["--data.eval_sets", "[mini_shapes, mini_digits]", "--model.probe_pictures", "1500"]
    options += ["--trainer.max_epochs", "2"]
    recipes = ["-c", "experiments/base.yaml", "-c", "experiments/reprogramming.yaml"]
    assert main(["fit", *recipes, *options, "--run_dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {entry["delta"] for entry in results["knn"].values()} == {0.0}
    assert len(results["task"]["rows"]) == 4
    assert results["task"]["rows"][3]["value"] > 70  # the frozen classifier itself
    assert "reprogrammed for mini_digits" in capsys.readouterr().out
    resumed = [
        "--model.compare",
        "false",
        "--trainer.max_epochs",
        "3",
        "--resume",
        str(tmp_path / "checkpoints" / "last.ckpt"),
    ]
    assert main(["fit", *recipes, *options, "--run_dir", str(tmp_path / "on"), *resumed]) == 0
    again = json.loads((tmp_path / "on" / "results.json").read_text())
    assert again["steps"] == 12
    assert again["task"]["rows"][-1] == results["task"]["rows"][3]


def test_adam_without_decay_is_the_default():
    approach = ReprogrammingApproach()
    assert isinstance(approach.optimizer_spec, OptimizerSpec)
    assert {group["weight_decay"] for group in approach.plan.parameter_groups(approach)} == {0.0}
