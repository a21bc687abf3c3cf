"""What cross-modal reprogramming promises beside the contract: a frozen vision network reads, in either space."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Subset

from wlsup.approaches.cross_modal_reprogramming import CrossModalReprogramming
from wlsup.batch import CaptionBatch, EvalSet
from wlsup.cli import main
from wlsup.data.mini import mini_eval_set
from wlsup.errors import WlsupError
from wlsup.reprogramming.cross_modal import TextProgramSpec
from wlsup.reprogramming.label_map import LabelMapSpec

CAPTIONS = ["a star in the snow", "a ring on gravel", "two boxes in the desert", "a heart on the lawn", "a red heart"]
SPACES = {
    "input": TextProgramSpec(),
    "token": TextProgramSpec(space="token"),
    "token, as learned": TextProgramSpec(space="token", match="none"),
    "token, appended": TextProgramSpec(space="token", slots="append", max_length=12),
}


def small_sets(spec, number=60):
    whole = mini_eval_set("mini_shapes", spec)
    sets = [EvalSet("mini_shapes", "in", Subset(whole.train, range(number)), whole.test, whole.class_names)]
    captions = SimpleNamespace(captions=CAPTIONS)
    return SimpleNamespace(eval_datasets=lambda: sets, val_dataloader=lambda: [captions])


def batch(captions=CAPTIONS, images=None):
    images = torch.zeros(len(captions), 3, 64, 64) if images is None else images
    return CaptionBatch(images, list(captions), [str(i) for i in range(len(captions))])


def prepared(**options):
    approach = CrossModalReprogramming(**options)
    approach.setup("fit")
    data = small_sets(approach.image_spec)
    approach.prepare(data)
    return approach, data


@pytest.mark.parametrize("space", SPACES)
def test_a_frozen_vision_network_learns_to_read_in_each_space(space):
    approach, data = prepared(program=SPACES[space], compare=False)
    frozen = approach.encoder.state_dict()["backbone.patch_embed.proj.weight"].clone()
    optimizer = torch.optim.Adam([p for p in approach.parameters() if p.requires_grad], lr=3e-2)
    approach.train()
    for _ in range(25):
        optimizer.zero_grad()
        losses = approach.losses(batch())
        losses["loss"].backward()
        optimizer.step()
    assert losses["labelled"].item() == pytest.approx(4 / 5)
    (row,) = approach.eval().measure(data)["rows"]
    assert (row["value"], row["chance"]) == (100.0, 25.0)
    assert torch.equal(approach.encoder.state_dict()["backbone.patch_embed.proj.weight"], frozen)


def test_the_regulariser_is_the_norm_of_the_whole_batch_over_its_size():
    approach, _ = prepared(penalty=0.5, compare=False)
    losses = approach.losses(batch(CAPTIONS[:4]))  # all of them have a class
    ids = approach.tokenizer(CAPTIONS[:4], length=approach.slots).ids
    drawn = approach.net.program.draw(ids)
    assert torch.isclose(losses["penalty"], drawn.norm() / 4)
    assert not torch.isclose(losses["penalty"], drawn.flatten(1).norm(dim=1).mean())
    assert torch.isclose(losses["loss"], losses["classification"] + 0.5 * losses["penalty"])


def test_the_pictures_of_the_captions_are_not_looked_at():
    approach, _ = prepared()
    noise = torch.randn(5, 3, 64, 64)
    assert torch.equal(approach.losses(batch())["loss"], approach.losses(batch(images=noise))["loss"])


def test_captions_of_no_class_teach_nothing():
    approach, _ = prepared()
    alone = approach.losses(batch(CAPTIONS[:4]))["classification"]
    assert torch.allclose(approach.losses(batch())["classification"], alone)
    nothing = approach.losses(batch(["a red heart", "blue"]))
    assert nothing.keys() == approach.losses(batch()).keys()
    nothing["loss"].backward()
    assert nothing["loss"] == 0
    assert approach.net.program.weight.grad.abs().max() == 0
    data = SimpleNamespace(val_dataloader=lambda: [SimpleNamespace(captions=["a red heart"])])
    assert approach.measure(data) == {}


def test_classes_of_ones_own_and_more_of_them_than_labels():
    classes = {f"class{i}": [f"word{i}"] for i in range(12)}
    approach, _ = prepared(classes=classes)
    assert "net.label_map.linear.weight" in approach.plan.trained_names(approach)
    assert approach.losses(batch(["a word3", "a word11"]))["labelled"] == 1
    approach.zero_grad()
    approach.losses(batch(["a ring on gravel"]))["loss"].backward()  # of no class: other ranks may have some that are
    assert all(p.grad is not None for p in approach.parameters() if p.requires_grad)
    with pytest.raises(WlsupError, match="label_map.kind to linear"):
        CrossModalReprogramming(classes=classes, label_map=LabelMapSpec(kind="fixed"))


def test_a_penalty_of_patches_is_refused_where_there_are_none():
    with pytest.raises(WlsupError, match="penalty is of program.space: input"):
        CrossModalReprogramming(program=TextProgramSpec(space="token"), penalty=0.1)


def test_the_random_network_gets_the_same_captions_and_the_same_start(monkeypatch):
    torch.manual_seed(5)
    approach, data = prepared()
    start = approach.net.program.weight.detach().clone()
    approach.train()
    for captions in (CAPTIONS, CAPTIONS[:3]):
        approach.losses(batch(captions))
    with torch.no_grad():
        approach.net.program.weight.add_(1.0)
    seen = []

    def record(parts, plan, optimizer, trainer, ema, losses):
        assert torch.equal(parts["program"].weight, start)
        seen.extend(loss().item() for step in range(trainer.global_step) for loss in losses(step))

    monkeypatch.setattr("wlsup.approaches.cross_modal_reprogramming.train_alike", record)
    approach._trainer = SimpleNamespace(global_step=2, accumulate_grad_batches=1)
    with torch.inference_mode():
        rows = approach.eval().measure(data)["rows"]
    assert [row["what"] for row in rows] == ["this program, input space", "the same program, a random network"]
    assert len(seen) == 2
    assert seen[0] != seen[1]


def test_a_random_network_that_cannot_be_trained_costs_no_other_row(monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    approach, data = prepared()
    approach.train()
    approach.losses(batch())
    monkeypatch.setattr("wlsup.approaches.cross_modal_reprogramming.train_alike", fails)
    approach._trainer = SimpleNamespace(global_step=1, accumulate_grad_batches=1)
    task = approach.eval().measure(data)
    assert [row["what"] for row in task["rows"]] == ["this program, input space"]
    assert "left out (OutOfMemoryError: CUDA out of memory.)" in task["note"]


def test_where_steps_are_of_several_micro_batches_so_are_those_of_the_random_network(monkeypatch):
    approach, data = prepared()
    approach.train()
    for _ in range(2):
        for captions in (CAPTIONS[:2], CAPTIONS[2:4], CAPTIONS[:3]):  # three a epoch, and each epoch's end is a step's
            approach.losses(batch(captions))
        approach.on_train_epoch_end()
    seen = []

    def record(parts, plan, optimizer, trainer, ema, losses):
        monkeypatch.setattr(approach, "_losses", lambda net, captions: {"loss": captions})
        seen.extend([loss() for loss in losses(step)] for step in range(trainer.global_step))

    monkeypatch.setattr("wlsup.approaches.cross_modal_reprogramming.train_alike", record)
    approach._trainer = SimpleNamespace(global_step=4, accumulate_grad_batches=2)
    with torch.inference_mode():
        approach.eval().measure(data)
    assert seen == [[CAPTIONS[:2], CAPTIONS[2:4]], [CAPTIONS[:3]]] * 2


def test_the_random_network_gets_the_captions_of_all_processes(monkeypatch):
    def gather(everyones, own):
        everyones[:] = [own, [[f"{text} too" for text in part] for part in own]]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    monkeypatch.setattr("wlsup.approaches.cross_modal_reprogramming.processes", lambda: (2, 0))
    approach, _ = prepared()
    for epoch in range(2):
        approach._seen += [[f"{epoch} {step}"] for step in range(2)]
        approach.on_train_epoch_end()
    assert approach._seen == [[f"{epoch} {step}", f"{epoch} {step} too"] for epoch in range(2) for step in range(2)]


def test_a_checkpoint_brings_head_label_map_and_statistics_back():
    approach, data = prepared(program=SPACES["token"])
    checkpoint = {"state_dict": dict(approach.state_dict())}
    approach.on_save_checkpoint(checkpoint)
    fresh = CrossModalReprogramming(program=SPACES["token"])
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"], strict=False)
    ids = approach.tokenizer(CAPTIONS, length=64).ids
    assert torch.equal(fresh.eval().net(ids)[0], approach.eval().net(ids)[0])


def test_a_base_image_lies_under_the_patches(tmp_path):
    from PIL import Image

    Image.new("RGB", (70, 64), (250, 10, 10)).save(tmp_path / "red.png")
    approach, _ = prepared(program=TextProgramSpec(base_image=str(tmp_path / "red.png"), alpha=0.1))
    ids = approach.tokenizer(CAPTIONS, length=64).ids
    pixels = approach.net.program.pixels.of(approach.net.program(ids)[0])
    assert (pixels.mean((0, 2, 3)) - torch.tensor([250.0, 10.0, 10.0]) / 255).abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("few_mini_pictures")
@pytest.mark.parametrize("space", ["input", "token"])
def test_a_run_ends_in_both_tables_and_the_encoder_is_as_it_was(space, tmp_path, capsys):
    options = ["--data.pairs", "128", "--data.validation_pairs", "64", "--data.batch_size", "32"]
    options += ["--data.eval_sets", "[mini_shapes]", "--trainer.max_epochs", "1", "--model.program.space", space]
    recipes = ["-c", "experiments/base.yaml", "-c", "experiments/cross_modal_reprogramming.yaml"]
    assert main(["fit", *recipes, *options, "--run_dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["knn"]["mini_shapes"]["delta"] == 0.0
    assert [row["unit"] for row in results["task"]["rows"]] == ["%", "%"]
    assert f"{space} space" in capsys.readouterr().out
