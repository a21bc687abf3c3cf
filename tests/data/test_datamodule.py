from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from data_makers import epoch_of, noise_jpeg
from jsonargparse import ArgumentParser

from wlsup.batch import CaptionBatch, ImageBatch, ImageSpec
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.image_datamodule import ImageDataModule
from wlsup.errors import WlsupError


def same(a, b):
    return (
        len(a) == len(b)
        and all(torch.equal(x.images, y.images) for x, y in zip(a, b, strict=True))
        and [x.captions for x in a] == [y.captions for y in b]
        and [x.keys for x in a] == [y.keys for y in b]
    )


def keys_of(batches):
    return [key for batch in batches for key in batch.keys]


def test_training_batches_hold_pictures_captions_and_keys(make_module):
    module = make_module()
    batches = epoch_of(module)
    assert len(batches) == 5 and module.pairs == 20
    for batch in batches:
        assert isinstance(batch, CaptionBatch) and batch.images.shape == (4, 3, 16, 16)
        assert batch.images.dtype == torch.float32 and len(batch.keys) == 4 and batch.skipped == []
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            assert caption.startswith(f"picture {int(key[:3])}, caption ")


def test_an_epoch_shows_each_image_once_with_one_caption_and_epochs_draw_others(make_module):
    module = make_module()
    epochs = [epoch_of(module, number) for number in range(6)]
    drawn = {}
    for batches in epochs:
        assert sorted(keys_of(batches)) == module.manifest
        for batch in batches:
            for key, caption in zip(batch.keys, batch.captions, strict=True):
                drawn.setdefault(key, set()).add(caption)
    assert sum(len(captions) == 2 for captions in drawn.values()) > 15
    views = [{key: view for b in batches for key, view in zip(b.keys, b.images, strict=True)} for batches in epochs[:2]]
    assert all(not torch.equal(view, views[1][key]) for key, view in views[0].items())
    assert keys_of(epochs[0]) != keys_of(epochs[1])


@pytest.mark.multiprocess
def test_workers_persistent_over_epochs_change_nothing(make_module, make_set):
    files = make_set(bad={3: b"", 9: noise_jpeg(9)[:100]})
    runs = []
    for workers in (0, 1, 2):
        module = make_module(files, num_workers=workers, max_bad_fraction=0.5)
        loader = module.train_dataloader()
        runs.append([epoch_of(module, number, loader) for number in (0, 1, 5)])
    for other in runs[1:]:
        assert all(same(a, b) for a, b in zip(runs[0], other, strict=True))
    assert not same(runs[0][0], runs[0][1])


def test_epochs_can_be_visited_in_any_order(make_module):
    module = make_module()
    last = epoch_of(module, 7)
    torch.manual_seed(123)
    random.seed(123)
    epoch_of(module, 2)
    assert same(epoch_of(module, 7), last)


def test_a_view_depends_on_the_key_and_not_on_the_neighbours(make_module, make_set):
    files = make_set()
    views = []
    for batch_size in (4, 5, 20):
        module = make_module(files, batch_size=batch_size)
        views.append(
            {k: (x, c) for b in epoch_of(module, 3) for k, x, c in zip(b.keys, b.images, b.captions, strict=True)}
        )
    for key, (view, caption) in views[0].items():
        for other in views[1:]:
            assert torch.equal(view, other[key][0]) and caption == other[key][1]


def test_the_seed_changes_order_and_views_but_not_the_choice_of_pairs(make_module, make_set):
    files = make_set()
    one, two = make_module(files, pairs=12), make_module(files, pairs=12, seed=1)
    assert not same(epoch_of(one), epoch_of(two))
    assert one.manifest == two.manifest and one.manifest_sha256 == two.manifest_sha256


@pytest.mark.multiprocess
def test_two_ranks_with_two_workers_see_every_key_once_also_after_a_resume(make_module, make_set, spec):
    files = make_set(50)

    def loader_of(rank):
        module = make_module(files, num_workers=2, validation_pairs=2)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2, lightning_module=None)
        return module, module.train_dataloader()

    whole = []
    for rank in range(2):
        module, loader = loader_of(rank)
        whole.append(epoch_of(module, 1, loader))
    keys = keys_of(whole[0]) + keys_of(whole[1])
    assert sorted(keys) == module.manifest and [len(part) for part in whole] == [6, 6]

    for rank in range(2):
        _, killed = loader_of(rank)
        killed.sampler.set_epoch(1)
        first = [batch for _, batch in zip(range(4), killed, strict=False)]
        module, resumed = loader_of(rank)
        resumed.load_state_dict(killed.state_dict())
        assert same(first + epoch_of(module, 1, resumed), whole[rank])
        assert same(epoch_of(module, 1, resumed), whole[rank])  # the state is used once


def test_the_loader_leaves_the_global_random_state_alone(make_module):
    module = make_module()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch_of(module)
    assert torch.equal(before, torch.get_rng_state())


def test_held_out_pairs_are_never_trained_on_and_come_plain(make_module):
    module = make_module()
    batches = list(module.val_dataloader())
    assert len(keys_of(batches)) == 4 and not set(keys_of(batches)) & set(module.manifest)
    assert all(caption.endswith("caption 0") for batch in batches for caption in batch.captions)
    assert same(batches, list(module.val_dataloader()))
    everything = make_module({"captions": module.request.captions, "images": module.request.images}, validation_pairs=0)
    assert everything.val_dataloader() == [] and len(everything.manifest) == 24


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("tar", [False, True])
def test_unreadable_pictures_are_replaced_counted_once_and_named(make_module, make_set, workers, tar):
    files = make_set(40, bad={5: b"", 11: noise_jpeg(11)[:200], 17: b"<html>"}, tar=tar)
    module = make_module(files, num_workers=workers, validation_pairs=0, max_bad_fraction=0.2)
    loader = module.train_dataloader()
    for number in range(3):
        batches = epoch_of(module, number, loader)
        assert [len(batch) for batch in batches] == [4] * 10
        assert not {"005.jpg", "011.jpg", "017.jpg"} & set(keys_of(batches))
        for batch in batches:
            assert len(set(batch.keys)) == 4  # the replacement is not in the batch already
            assert batch.images.abs().sum((1, 2, 3)).min() > 0
            assert [c.split(",")[0] for c in batch.captions] == [f"picture {int(k[:3])}" for k in batch.keys]
    assert set(module.skipped) == {"005.jpg", "011.jpg", "017.jpg"}
    assert module.skipped["005.jpg"] == "zero bytes" and "known format" in module.skipped["017.jpg"]


def test_a_held_out_picture_that_cannot_be_read_is_left_out_and_named(make_module, make_set):
    files = make_set()
    held_out = keys_of(make_module(files).val_dataloader())
    (Path(files["images"]) / held_out[0]).write_bytes(b"")
    module = make_module(files, max_bad_fraction=0.2)
    assert keys_of(module.val_dataloader()) == held_out[1:]
    assert module.skipped == {held_out[0]: "zero bytes"}


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 2])
def test_a_rotten_run_stops_with_one_clean_message(make_module, make_set, workers):
    bad = dict.fromkeys(range(0, 40, 4), b"rot")
    module = make_module(make_set(40, bad=bad), num_workers=workers, validation_pairs=0, max_bad_fraction=0.1)
    with pytest.raises(WlsupError, match=r"5 of 40 samples .* max_bad_fraction=0.1 .*jpg \(not a picture") as caught:
        epoch_of(module)
    assert "Traceback" not in str(caught.value) and len(module.skipped) == 5


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 1])
def test_a_wholly_unreadable_source_stops_with_one_clean_message(make_module, make_set, workers):
    files = make_set(8, bad=dict.fromkeys(range(8), b"rot"))
    module = make_module(files, num_workers=workers, validation_pairs=0, max_bad_fraction=0.99)
    with pytest.raises(WlsupError, match="No readable picture was found in place of") as caught:
        epoch_of(module)
    assert "Traceback" not in str(caught.value)


def test_a_batch_as_large_as_the_set_still_finds_replacements(make_module, make_set):
    module = make_module(make_set(4, bad={0: b""}), batch_size=4, validation_pairs=0, max_bad_fraction=0.5)
    (batch,) = epoch_of(module)
    assert len(batch) == 4 and "000.jpg" not in batch.keys


def test_missing_pictures_count_as_bad_from_the_start(make_module, make_set):
    module = make_module(make_set(40, bad={1: None, 2: None}), max_bad_fraction=0.05)
    module.setup()
    assert set(module.skipped) == {"001.jpg", "002.jpg"} and module.pairs == 34
    with pytest.raises(WlsupError, match=r"2 of 20 samples cannot be used.*001.jpg \(not in "):
        make_module(make_set(20, bad={1: None, 2: None}, name="more"), max_bad_fraction=0.05).setup()


def test_missing_pictures_change_no_subset_they_are_not_in(make_module, make_set):
    whole = make_module(make_set(60), pairs=20)
    whole.setup()
    held_out = keys_of(whole.val_dataloader())
    outside = [i for i in range(60) if f"{i:03d}.jpg" not in {*whole.manifest, *held_out}]
    lossy = make_module(
        make_set(60, bad=dict.fromkeys(random.Random(0).sample(outside, 7)), name="lossy"),
        pairs=20,
        max_bad_fraction=0.5,
    )
    assert lossy.manifest_sha256 == whole.manifest_sha256
    assert keys_of(lossy.val_dataloader()) == held_out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_bad_fraction": 1.5}, r"max_bad_fraction=1.5: give a number in \[0, 1\)"),
        ({"crop_scale": (0.9, 0.1)}, "crop_scale"),
        ({"batch_size": 64}, r"batch_size=64 on 1 process\(es\) needs 64 training samples .* there are 20"),
        ({"pairs": 100}, "pairs=100, but the source has 24"),
        ({"source_options": {"colour": 1}}, "Unknown option .*'colour'"),
    ],
)
def test_impossible_settings_are_refused_with_the_possible_ones(make_module, settings, message):
    with pytest.raises(WlsupError, match=message):
        make_module(**settings).train_dataloader()


def test_without_an_image_spec_the_message_says_where_it_comes_from(make_module):
    module = make_module()
    module.image_spec = None
    with pytest.raises(WlsupError, match="no image_spec"):
        module.train_dataloader()


def test_the_mini_source_needs_nothing_and_refuses_paths(spec):
    module = CaptionDataModule(pairs=24, validation_pairs=4, batch_size=8)
    module.image_spec = spec
    (first, *_) = epoch_of(module)
    assert first.images.shape == (8, 3, 16, 16) and module.pairs == 24
    assert not set(keys_of(module.val_dataloader())) & set(module.manifest)
    smaller = CaptionDataModule(pairs=12, validation_pairs=4)
    smaller.setup()
    assert set(smaller.manifest) < set(module.manifest)
    with pytest.raises(WlsupError, match="captions='x.csv' was given with source 'mini'"):
        CaptionDataModule(captions="x.csv").setup()


def test_flickr8k_trains_from_its_published_files(shared_data):
    folder = shared_data / "flickr8k_1k"
    module = CaptionDataModule(
        source="table",
        captions=str(folder / "captions.txt"),
        images=str(folder / "flickr8k_1k_160px.tar"),
        pairs=64,
        validation_pairs=16,
        batch_size=32,
    )
    module.image_spec = ImageSpec(size=32, resize=36)
    batches = epoch_of(module)
    assert len(keys_of(batches)) == len(set(keys_of(batches))) == 64 and not module.skipped
    assert len(keys_of(module.val_dataloader())) == 16


class Recorder(lightning.LightningModule):
    """A model with dropout that writes down what it sees."""

    def __init__(self, spec, fail_at=None):
        super().__init__()
        self.image_spec = spec
        self.fail_at = fail_at
        self.layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * 16 * 16, 2))
        self.seen = []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise KeyboardInterrupt
        loss = self.layer(batch.images).square().mean()
        self.seen.append((self.global_step, self.current_epoch, tuple(batch.keys), tuple(batch.captions), loss.item()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.layer(batch.images)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(module, recorder, folder, ckpt_path=None, **settings):
    callbacks = settings.pop("callbacks", [])
    trainer = lightning.Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": bool(callbacks),
            "default_root_dir": folder,
            "callbacks": callbacks,
            **settings,
        }
    )
    trainer.fit(recorder, module, ckpt_path=ckpt_path)
    return trainer


def test_lightning_takes_the_spec_from_the_model_and_sets_the_epochs(make_module, spec, tmp_path):
    module = make_module()
    module.image_spec = None
    recorder = Recorder(spec)
    fit(module, recorder, tmp_path)
    assert module.image_spec == spec
    by_epoch = [[seen[2] for seen in recorder.seen if seen[1] == number] for number in range(3)]
    expected = [[tuple(batch.keys) for batch in epoch_of(module, number)] for number in range(3)]
    assert by_epoch == expected


class SaveRandomState(lightning.Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.state = checkpoint["random"]

    def on_train_start(self, trainer, pl_module):
        if hasattr(self, "state"):
            torch.set_rng_state(self.state)


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("saved_every", [3, 5])  # in mid-epoch, and at an epoch's end
def test_a_run_killed_in_mid_epoch_resumes_on_the_very_next_batch(
    make_module, make_set, spec, tmp_path, workers, saved_every
):
    files = make_set()

    def run(fail_at=None, ckpt_path=None):
        saver = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path / "saved", every_n_train_steps=saved_every, save_top_k=-1, filename="{step}"
        )
        torch.manual_seed(0)
        recorder = Recorder(spec, fail_at)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            fit(
                make_module(files, num_workers=workers),
                recorder,
                tmp_path,
                ckpt_path,
                callbacks=[saver, SaveRandomState()],
                num_sanity_val_steps=0,
            )
        return recorder.seen

    whole = run()
    assert len(whole) == 15
    shutil.rmtree(tmp_path / "saved")
    run(fail_at=8)
    step = 8 // saved_every * saved_every
    resumed = run(ckpt_path=tmp_path / "saved" / f"step={step}.ckpt")
    assert resumed == whole[step:]


def test_lightning_s_overfit_batches_still_works(make_module, spec, tmp_path):
    recorder = Recorder(spec)
    fit(make_module(), recorder, tmp_path, overfit_batches=2, limit_val_batches=0)
    assert len(recorder.seen) == 6


def test_the_command_line_can_show_and_check_the_settings(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CaptionDataModule, "data")
    (tmp_path / "c.yaml").write_text(
        "source: table\ncrop_scale: [0.5, 1.0]\nsource_options: {header: false}\n"
        "eval_sets: [mini_shapes, {name: mine, images: x.tar, labels: l.csv, domain: in}]\n"
    )
    config = parser.instantiate_classes(
        parser.parse_args(["--data", str(tmp_path / "c.yaml"), "--data.pairs", "20"])
    ).data
    assert config.request.pairs == 20 and config.crop_scale == (0.5, 1.0) and config.eval_sets[1].domain == "in"
    with pytest.raises(Exception, match="batch_size"):
        parser.parse_args(["--data.batch_size", "many"])


def test_pictures_alone_come_augmented_labelled_minus_one(make_set, spec):
    module = ImageDataModule(make_set(tar=True)["images"], batch_size=6, validation_pictures=6)
    module.image_spec = spec
    batches = epoch_of(module)
    assert len(batches) == 3
    seen = torch.cat([batch.indices for batch in batches])
    assert sorted(seen.tolist()) == list(range(18))
    for batch in batches:
        assert isinstance(batch, ImageBatch) and batch.images.shape == (6, 3, 16, 16)
        assert (batch.labels == -1).all() and batch.valid.all()
    (held_out,) = module.val_dataloader()
    assert len(held_out) == 6 and len(module.manifest) == 18


def test_several_tars_of_pictures_are_one_set(make_set, spec):
    tars = [make_set(tar=True, name=name)["images"] for name in ("one", "two")]
    with pytest.raises(WlsupError, match="same name"):
        ImageDataModule(tars).setup()
    renamed = shutil.copy(tars[1], tars[1].replace("images.tar", "other.tar"))
    module = ImageDataModule([tars[0], renamed], pictures=30, batch_size=10)
    module.image_spec = spec
    assert len(module.manifest) == 30 and len(epoch_of(module)) == 3


def test_unreadable_pictures_without_captions_are_replaced_too(make_set, spec):
    module = ImageDataModule(make_set(bad={2: b"", 7: b"x"})["images"], batch_size=8, max_bad_fraction=0.2)
    module.image_spec = spec
    assert [len(batch) for batch in epoch_of(module)] == [8, 8, 8]
    assert set(module.skipped) == {"002.jpg", "007.jpg"}


def test_the_mini_pretraining_scenes_need_nothing(spec):
    module = ImageDataModule(pictures=16, validation_pictures=4, batch_size=8)
    module.image_spec = spec
    assert len(epoch_of(module)) == 2
    assert sum(len(batch) for batch in module.val_dataloader()) == 4


def test_a_folder_without_pictures_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(WlsupError, match="holds no pictures"):
        ImageDataModule(str(tmp_path)).setup()
