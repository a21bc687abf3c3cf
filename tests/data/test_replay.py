"""Replay: as many other pictures beside each batch, the same ones whatever the workers, only where asked for."""

from types import SimpleNamespace

import pytest
import torch

from wlsup.batch import ImageSpec
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.replay import replay_pictures
from wlsup.errors import WlsupError
from wlsup.objectives.regularizers import Regularizer, RegularizerSpec

SPEC = ImageSpec(size=64, mean=(0.5,) * 3, std=(0.25,) * 3, resize=64)


def module_with(weight, **settings):
    data = CaptionDataModule(pairs=64, validation_pairs=16, batch_size=16, **settings)
    data.image_spec = SPEC
    model = SimpleNamespace(regularizer=Regularizer(RegularizerSpec(replay=weight)))
    data.trainer = SimpleNamespace(lightning_module=model, global_rank=0, world_size=1)
    data.setup()
    return data


def test_each_batch_brings_as_many_pictures_and_other_ones_each_epoch():
    loader = module_with(0.5).train_dataloader()
    first = list(loader)
    assert all(batch.replay.shape == batch.images.shape == (16, 3, 64, 64) for batch in first)
    loader.sampler.set_epoch(1)
    assert not torch.equal(first[0].replay, next(iter(loader)).replay)


def test_the_pairs_are_the_same_as_without_and_the_replayed_ones_do_not_depend_on_workers():
    plain, with_replay = (next(iter(module_with(weight).train_dataloader())) for weight in (0.0, 0.5))
    assert plain.replay is None
    assert torch.equal(plain.images, with_replay.images)
    assert plain.captions == with_replay.captions
    assert torch.equal(next(iter(module_with(0.5, num_workers=1).train_dataloader())).replay, with_replay.replay)


def test_the_generated_ones_are_of_the_pretraining_kind_and_not_of_the_captioned():
    from wlsup.data.mini import mini_captions

    _, pictures = replay_pictures("mini")
    scenes = {image.numpy().tobytes() for image in mini_captions("train", 64, 0).images}
    assert not scenes & {pictures.images[i].numpy().tobytes() for i in range(64)}


def test_folders_and_tars_are_read_and_paths_that_lead_nowhere_refused(tmp_path):
    from PIL import Image

    for index in range(3):
        Image.new("RGB", (80, 70), (80 * index, 0, 0)).save(tmp_path / f"{index}.png")
    data = module_with(0.5, replay=str(tmp_path))
    data.check_files()
    colours = {round(float(picture[0, 0, 0]), 3) for batch in data.train_dataloader() for picture in batch.replay}
    assert len(colours) == 3
    with pytest.raises(WlsupError, match=r"data\.replay"):
        module_with(0.5, replay=str(tmp_path / "nowhere")).check_files()
    (tmp_path / "empty").mkdir()
    with pytest.raises(WlsupError, match="no pictures"):
        replay_pictures(str(tmp_path / "empty"))


def test_real_pictures_without_a_place_to_replay_from_are_asked_for(tmp_path):
    data = module_with(0.5)
    data.replay = None
    with pytest.raises(WlsupError, match=r"set data\.replay"):
        data.train_dataloader()
