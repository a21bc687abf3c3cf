from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_makers import encode, epoch_of, noise_jpeg, write_tar
from native import img2dataset_shard
from PIL import Image

from wlsup.batch import ImageSpec
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.images import UnreadableImage
from wlsup.data.sampler import EpochSampler
from wlsup.data.shard_index import INDEX_NAME, load_index, save_index, verify_shards
from wlsup.data.shards import ShardPictures, ShardSample, build_index, write_shards
from wlsup.data.shards_source import open_shards
from wlsup.data.sources import SourceRequest, load_source
from wlsup.errors import WlsupError

SPEC = ImageSpec(size=16, resize=18)


def samples(number, first=0):
    return [
        ShardSample(f"set/{i:03d}.jpg", noise_jpeg(i), ".jpg", [f"picture {i}, caption {j}" for j in range(2)])
        for i in range(first, first + number)
    ]


@pytest.fixture
def seven(tmp_path):
    """Seven shards of 61 samples, which neither ranks, workers nor batches divide."""
    folder = tmp_path / "seven"
    write_shards(samples(61), folder, samples_per_shard=9)
    assert len(list(folder.glob("*.tar"))) == 7
    return folder


def module_of(folder, rank=0, world=1, **settings):
    settings = {"validation_pairs": 1, "batch_size": 5, **settings}
    module = CaptionDataModule("shards", images=str(folder), **settings)
    module.image_spec = SPEC
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world, lightning_module=None)
    return module


def keys_of(batches):
    return [key for batch in batches for key in batch.keys]


def test_what_is_written_is_read_back_and_webdataset_s_layout_is_kept(seven):
    source = load_source("shards", SourceRequest(images=str(seven)))
    assert list(source.keys) == [sample.key for sample in samples(61)]
    assert list(source.captions) == [list(sample.captions) for sample in samples(61)]
    assert [source.pictures.bytes_of(i) for i in range(61)] == [sample.data for sample in samples(61)]
    with tarfile.open(seven / "00001.tar") as archive:
        assert archive.getnames()[:3] == ["000000009.jpg", "000000009.json", "000000010.jpg"]
    assert sorted(load_index(seven).counts.tolist()) == [7, 9, 9, 9, 9, 9, 9]


def test_the_same_samples_give_the_same_bytes_and_a_full_folder_is_not_written_into(seven, tmp_path):
    write_shards(samples(61), tmp_path / "again", samples_per_shard=9)
    for path in seven.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(WlsupError, match="holds tar files already"):
        write_shards(samples(3), seven)
    with pytest.raises(WlsupError, match="No samples"):
        write_shards([], tmp_path / "none")


def test_a_failed_write_leaves_no_half_shard(tmp_path):
    def failing():
        yield from samples(12)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(failing(), tmp_path / "x", samples_per_shard=9)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["00000.tar"]


@pytest.mark.multiprocess
@pytest.mark.parametrize("window", [None, 2])
def test_two_ranks_with_two_workers_and_seven_shards_see_every_key_once_also_after_a_kill_and_resume(seven, window):
    def run(rank, skip_to=None, stop=None):
        module = module_of(seven, rank, 2, num_workers=2, shuffle_window=window)
        loader = module.train_dataloader()
        if skip_to is not None:
            loader.load_state_dict(skip_to)
        loader.sampler.set_epoch(1)
        seen = []
        for batch in loader:
            seen.append(batch.keys)
            if len(seen) == stop:
                return seen, loader.state_dict(), module
        return seen, None, module

    whole = [run(rank) for rank in range(2)]
    keys = [key for seen, _, _ in whole for batch in seen for key in batch]
    assert sorted(keys) == whole[0][2].manifest and len(set(keys)) == 60
    for rank in range(2):
        begun, state, _ = run(rank, stop=4)
        rest, _, _ = run(rank, skip_to=state)
        assert begun + rest == whole[rank][0] and len(rest) == 2


TRAINING = """
import sys, time
sys.path[:0] = {path!r}
import lightning, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from wlsup.batch import ImageSpec
from wlsup.data.datamodule import CaptionDataModule

torch.set_num_threads(1)
out, stop, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None


class Recorder(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.image_spec = ImageSpec(size=16, resize=18)
        self.layer = torch.nn.Linear(3 * 16 * 16, 2)

    def training_step(self, batch, batch_idx):
        if self.global_step == stop:
            open(f"{{out}}.stopped.{{self.global_rank}}", "w").close()
            time.sleep(600)  # until it is killed
        with open(f"{{out}}.{{self.global_rank}}", "a") as file:
            print(self.global_step, self.current_epoch, *batch.keys, file=file, flush=True)
        return self.layer(batch.images.flatten(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


data = CaptionDataModule("shards", images={folder!r}, validation_pairs=1, batch_size=5, num_workers=2)
lightning.Trainer(
    max_epochs=2, accelerator="cpu", strategy="ddp", devices=2, logger=False, enable_progress_bar=False,
    enable_model_summary=False, limit_val_batches=0, default_root_dir={saved!r},
    callbacks=[ModelCheckpoint({saved!r}, every_n_train_steps=4, save_top_k=-1, filename="{{step}}")],
).fit(Recorder(), data, ckpt_path=resume)
"""


def steps_of(out: Path, rank: int) -> list[tuple[int, int, list[str]]]:
    lines = [line.split() for line in Path(f"{out}.{rank}").read_text().splitlines()]
    return [(int(step), int(epoch), keys) for step, epoch, *keys in lines]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_training_on_two_ranks_killed_in_mid_epoch_and_resumed_visits_every_key_once(seven, tmp_path):
    saved, script = tmp_path / "saved", tmp_path / "train.py"
    path = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    script.write_text(TRAINING.format(path=path, folder=str(seven), saved=str(saved)))
    killed, resumed = tmp_path / "killed", tmp_path / "resumed"
    process = subprocess.Popen([sys.executable, str(script), str(killed), "10"], start_new_session=True)
    try:  # epochs have six steps: a checkpoint at the eighth, death in the eleventh, both in the second epoch
        deadline = time.monotonic() + 300
        while len(list(tmp_path.glob("killed.stopped.*"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline, "the first run did not come so far"
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    checkpoint = str(saved / "step=8.ckpt")
    subprocess.run([sys.executable, str(script), str(resumed), "-1", checkpoint], check=True, timeout=300)

    manifest = module_of(seven).manifest
    seen: dict[int, list[str]] = {0: [], 1: []}
    for rank in range(2):
        before, after = steps_of(killed, rank), steps_of(resumed, rank)
        assert [step for step, _, _ in before] == list(range(10)) and [step for step, _, _ in after] == [8, 9, 10, 11]
        assert before[8:] == after[:2]  # what the dead run had gone on to see
        loader = module_of(seven, rank, 2).train_dataloader()
        for epoch in range(2):
            visited = [keys for _, number, keys in [*before[:8], *after] if number == epoch]
            assert visited == [batch.keys for batch in epoch_of(None, epoch, loader)]
            seen[epoch] += [key for keys in visited for key in keys]
    assert len(manifest) == 60 and all(sorted(keys) == manifest for keys in seen.values())


def test_a_shard_cut_in_half_missing_or_added_is_noticed_before_training(seven):
    path = seven / "00003.tar"
    whole = path.read_bytes()
    size = len(whole)
    for cut in (size // 2 // 512 * 512, size // 2 + 7, 0, size - 512):
        path.write_bytes(whole[:cut])
        with pytest.raises(
            WlsupError,
            match=rf"00003.tar has {cut:,} bytes, and the index expects {size:,} bytes with 9 samples \(cut short",
        ):
            module_of(seven).setup()
        with pytest.raises(WlsupError, match="cut short"):
            open_shards(path)
    path.unlink()
    with pytest.raises(WlsupError, match="00003.tar is missing"):
        module_of(seven).setup()
    path.write_bytes(whole)
    write_tar(seven / "00009.tar", {"a.jpg": b"x"})
    with pytest.raises(WlsupError, match="1 shards that its index does not list, such as '00009.tar'"):
        module_of(seven).setup()


def test_without_an_index_a_cut_shard_is_noticed_by_its_end_or_by_img2dataset_s_count(tmp_path):
    rows = [(f"http://x/{i}", f"caption {i}", noise_jpeg(i)) for i in range(8)]
    path = img2dataset_shard(tmp_path / "00000.tar", rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WlsupError, match="truncated or damaged"):
        build_index([path])
    img2dataset_shard(tmp_path / "00000.tar", rows[:5], stats=False)  # whole as a tar, and three samples short
    with pytest.raises(WlsupError, match=r"holds 5 pictures, and 00000_stats.json says 8"):
        build_index([path])


def test_a_shard_that_shrinks_under_a_run_gives_unreadable_pictures(seven):
    pictures = ShardPictures(seven, load_index(seven))
    with open(seven / "00000.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(UnreadableImage, match="become shorter"):
        pictures.bytes_of(5)
    os.unlink(seven / "00002.tar")
    with pytest.raises(UnreadableImage, match="No such file"):
        pictures.bytes_of(20)


def test_a_file_of_a_gigantic_stated_length_is_refused_before_it_is_read(seven):
    index = load_index(seven)
    index.length[3] = 1 << 40
    with pytest.raises(UnreadableImage, match="1,099,511,627,776 bytes, more than 268,435,456"):
        ShardPictures(seven, index).bytes_of(3)


def test_foreign_shards_are_indexed_once_and_their_faults_counted(tmp_path, caplog):
    files = {
        "a/x.y/0.jpg": noise_jpeg(0),
        "a/x.y/0.txt": b"caf\xe9  one\n",
        "1.JPG": noise_jpeg(1),
        "1.json": b'{"caption": "from json"}',
        "1.txt": b"from txt",
        "2.png": encode(Image.new("RGB", (8, 8)), "PNG"),
        "2.cls": b"3",
        "3.txt": b"orphan",
        "4.jpg": noise_jpeg(4),
        "4.json": b"{broken",
        "5.jpg": noise_jpeg(5),
        "5.json": json.dumps({"text": ["one", " ", "two"], "key": "000"}).encode(),
        "../up.jpg": b"x",
    }
    write_tar(tmp_path / "s.tar", files)
    source = load_source("shards", SourceRequest(images=str(tmp_path)))
    assert dict(zip(source.keys, source.captions, strict=True)) == {
        "s/a/x.y/0": ["caf\ufffd one"],
        "s/1": ["from json"],
        "s/5": ["one", "two"],
    }
    assert sorted(source.notes) == [
        "1 samples: refused member",
        "1 samples: text without a picture",
        "2 samples: no caption",
    ]
    assert (tmp_path / INDEX_NAME).exists()
    again = load_source("shards", SourceRequest(images=str(tmp_path)))
    assert list(again.captions) == list(source.captions) and again.notes == source.notes


def test_samples_of_one_key_are_one_picture_with_all_captions(tmp_path):
    for shard in range(2):
        img2dataset_shard(
            tmp_path / f"{shard}.tar", [("http://x/1", f"caption {shard}", noise_jpeg(shard))], stats=False
        )
    index = build_index(list(tmp_path.glob("*.tar")))
    assert len(index) == 1 and list(index.captions) == [["caption 0", "caption 1"]]


def test_a_damaged_index_is_refused_and_never_runs_code(seven):
    path = seven / INDEX_NAME
    whole = path.read_bytes()
    for content in (b"", b"x" * 100, whole[: len(whole) // 2], pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(WlsupError, match=f"{INDEX_NAME} is damaged .*wlsup data prepare"):
            load_index(seven)
    buffer = io.BytesIO()
    np.savez(buffer, version=np.array(99))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(WlsupError, match="version 99, not 1"):
        load_index(seven)
    path.write_bytes(whole)
    index = load_index(seven)
    index.names[0] = "../../etc/passwd"
    save_index(index, seven)
    with pytest.raises(WlsupError, match="do not fit together"):
        load_index(seven)


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    write_shards(samples(12), tmp_path / "x", samples_per_shard=1)
    monkeypatch.setattr("wlsup.data.shards._OPEN_FILES", 3)
    pictures = ShardPictures(tmp_path / "x", load_index(tmp_path / "x"))
    assert [pictures.bytes_of(i) for i in range(12)] * 2 == [pictures.bytes_of(i) for i in [*range(12), *range(12)]]
    assert len(pictures._files) == 3
    copy = pickle.loads(pickle.dumps(pictures))
    assert not copy._files and copy.bytes_of(3) == samples(12)[3].data


def test_a_bad_picture_in_a_shard_is_replaced_and_named(tmp_path):
    chosen = samples(20)
    chosen[4] = ShardSample("set/004.jpg", b"", ".jpg", ["x"])
    chosen[9] = ShardSample("set/009.jpg", noise_jpeg(9)[:90], ".jpg", ["x"])
    write_shards(chosen, tmp_path / "x", samples_per_shard=6)
    module = module_of(tmp_path / "x", validation_pairs=0, max_bad_fraction=0.2)
    batches = epoch_of(module)
    assert [len(batch) for batch in batches] == [5] * 4 and set(module.skipped) == {"set/004.jpg", "set/009.jpg"}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_windows_of_shards_visit_each_sample_once_and_stay_within_their_shards(ranks, window):
    groups = torch.arange(210) // 30 * 5  # seven shards, whose numbers have gaps
    samplers = [
        EpochSampler(210, batch_size=5, rank=r, world_size=ranks, groups=groups, shuffle_window=window)
        for r in range(ranks)
    ]
    orders = []
    for epoch in (0, 1):
        parts = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            parts.append([index for _, index in sampler])
        order = [index for step in zip(*parts, strict=True) for index in step]
        assert sorted(order) == list(range(210))
        for begin in range(0, 210, 30 * window):
            inside = {int(groups[index]) for index in order[begin : begin + 30 * window]}
            assert len(inside) <= window
        assert order[:30] != sorted(order[:30])
        orders.append(order)
    assert orders[0] != orders[1]


def test_a_window_needs_shards(make_module, make_set):
    files = make_set()
    with pytest.raises(WlsupError, match="shuffle_window=2 shuffles by shards"):
        make_module(files, shuffle_window=2).train_dataloader()
    with pytest.raises(WlsupError, match="shuffle_window=0"):
        make_module(files, shuffle_window=0)


def test_an_index_of_many_samples_is_verified_without_reading_them(seven):
    index = load_index(seven)
    begin = time.perf_counter()
    verify_shards(index, seven)
    assert time.perf_counter() - begin < 1
