from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import pytest
from data_makers import noise_jpeg
from native import (
    coco_json,
    imagenet_entries,
    img2dataset_shard,
    write_cc3m,
    write_coco,
    write_imagenet_captions,
    write_tree,
)

from wlsup.data.conceptual_captions import cc3m_image_name
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.subset import hash_order, manifest_sha256, split_by_hash, write_manifest
from wlsup.errors import WlsupError

KEYS = [f"{i:05d}.jpg" for i in range(3000)]


def test_a_smaller_subset_lies_inside_a_larger_one_and_never_meets_the_held_out():
    small, held_out = split_by_hash(KEYS, 1000, 200)
    large, same = split_by_hash(KEYS, 2000, 200)
    everything, _ = split_by_hash(KEYS, None, 200)
    assert held_out == same and len(held_out) == 200
    assert len(small) == 1000 and set(small) < set(large) < set(everything)
    assert not set(everything) & set(held_out) and len(everything) == 2800


def test_neither_choice_follows_the_names():
    train, held_out = split_by_hash(KEYS, 1000, 200)
    for chosen in (train, held_out):
        assert 0.4 < sum(key < KEYS[1500] for key in chosen) / len(chosen) < 0.6


def test_the_subset_does_not_depend_on_the_order_of_the_keys():
    shuffled = random.Random(0).sample(KEYS, len(KEYS))
    assert split_by_hash(shuffled, 1000, 200) == split_by_hash(KEYS, 1000, 200)


def test_the_subset_survives_the_loss_of_a_fifth_of_the_keys_outside_it():
    train, held_out = split_by_hash(KEYS, 1000, 200)
    outside = sorted(set(KEYS) - set(train) - set(held_out))
    lost = set(random.Random(0).sample(outside, len(outside) // 5))
    assert split_by_hash([key for key in KEYS if key not in lost], 1000, 200) == (train, held_out)


def test_a_lost_member_is_replaced_by_one_and_changes_nothing_else():
    train, held_out = split_by_hash(KEYS, 1000, 200)
    without, same = split_by_hash([key for key in KEYS if key != train[7]], 1000, 200)
    assert same == held_out
    assert set(train) - set(without) == {train[7]} and len(set(without) - set(train)) == 1


def test_the_choice_is_sha256_and_not_python_s_salted_hash():
    expected = sorted(["a", "b", "c"], key=lambda key: hashlib.sha256(b"salt\0" + key.encode()).digest())
    assert hash_order("abc", "salt") == expected
    code = "from wlsup.data.subset import *; print(manifest_sha256(split_by_hash(list(map(str, range(99))), 9, 9)[0]))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": seed, **_env()}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1 and len(runs.pop().strip()) == 64


def _env() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(path for path in sys.path if path)}


def test_the_manifest_s_hash_is_that_of_the_file(tmp_path):
    written = write_manifest(tmp_path / "manifest.txt", ["b", "a"])
    assert (tmp_path / "manifest.txt").read_text() == "a\nb\n"
    assert written == manifest_sha256(["a", "b"]) == hashlib.sha256(b"a\nb\n").hexdigest()


@pytest.mark.parametrize(
    ("pairs", "validation", "message"),
    [
        (4000, 200, r"pairs=4000, but the source has 3000 usable keys, of which 200 .* at most 2800"),
        (None, 3000, r"validation_pairs=3000, but .* only 3000 usable keys. Set validation_pairs below 3000"),
        (0, 10, r"pairs=0, validation_pairs=10: give pairs >= 1"),
        (5, -1, r"validation_pairs=-1: give"),
    ],
)
def test_impossible_sizes_are_refused_with_the_possible_ones(pairs, validation, message):
    with pytest.raises(WlsupError, match=message):
        split_by_hash(KEYS, pairs, validation)


def write_some_of_a_table(root, order):
    names = [f"{i:03d}.jpg" for i in order]
    files = {f"images/{name}": noise_jpeg(int(name[:3])) for name in names}
    table = "image,caption\n" + "".join(f"{name},picture {name}\n" for name in names)
    write_tree(root, {**files, "captions.csv": table.encode()})
    return {"captions": str(root / "captions.csv"), "images": str(root / "images")}


def write_some_of_coco(root, order):
    document, whole = coco_json(60), list(order)
    ids = [document["images"][i]["id"] for i in whole]
    document["images"] = [document["images"][i] for i in whole]
    document["annotations"] = [a for i in ids for a in document["annotations"] if a["image_id"] == i]
    return write_coco(root, document)


URLS = [f"http://host.example/{i}.jpg" for i in range(60)]


def write_some_of_cc3m(root, order):
    paths = write_cc3m(root, [(f"caption {i}", URLS[i]) for i in order], dead=range(30))
    write_tree(root / "images", {cc3m_image_name(URLS[i]): noise_jpeg(i) for i in order})
    return paths


def write_some_shards(root, order):
    root.mkdir()
    order = list(order)
    for shard in range(4):
        rows = [(URLS[i], f"caption {i}", noise_jpeg(i)) for i in order[shard::4]]
        img2dataset_shard(root / f"{shard}.tar", rows, stats=False)
    return {"images": str(root)}


def write_some_of_imagenet_captions(root, order):
    entries = imagenet_entries(30)
    return write_imagenet_captions(root, [entries[i] for i in order], each=30)


SOURCES = {
    "table": ("table", write_some_of_a_table, lambda i: f"{i:03d}.jpg"),
    "coco": ("coco", write_some_of_coco, lambda i: coco_json(60)["images"][i]["file_name"]),
    "CC-3M, folder": ("conceptual_captions", write_some_of_cc3m, lambda i: cc3m_image_name(URLS[i])),
    "CC-3M, shards": ("conceptual_captions", write_some_shards, lambda i: cc3m_image_name(URLS[i])),
    "shards": ("shards", write_some_shards, lambda i: cc3m_image_name(URLS[i])),
    "imagenet_captions": (
        "imagenet_captions",
        write_some_of_imagenet_captions,
        lambda i: "{wnid}/{filename}".format(**imagenet_entries(30)[i]),
    ),
}


def chosen_from(name, paths, pairs):
    """Return the training keys and the held-out ones."""
    module = CaptionDataModule(name, **paths, pairs=pairs, validation_pairs=8)
    module.setup()
    return module.manifest, list(module._validation.keys)


@pytest.mark.parametrize("case", SOURCES)
def test_each_source_gives_the_same_pairs_reordered_and_without_a_fifth_of_the_others(case, tmp_path):
    name, write, key = SOURCES[case]
    whole = write(tmp_path / "whole", range(60))
    train, held_out = chosen_from(name, whole, 20)
    fewer, same = chosen_from(name, whole, 10)
    assert (len(train), len(fewer), len(held_out)) == (20, 10, 8)
    assert set(fewer) < set(train) and same == held_out and not set(train) & set(held_out)
    outside = [i for i in range(60) if key(i) not in {*train, *held_out}]
    assert len(outside) == 60 - 28
    lost = random.Random(0).sample(outside, round(0.2 * len(outside)))
    order = random.Random(1).sample([i for i in range(60) if i not in lost], 60 - len(lost))
    lossy = write(tmp_path / "lossy", order)
    assert chosen_from(name, lossy, 20) == (train, held_out)
    assert chosen_from(name, lossy, 10) == (fewer, held_out)
