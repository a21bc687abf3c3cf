from __future__ import annotations

import hashlib
import random

import pytest
from data_makers import epoch_of

from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.subset import read_manifest, split_positions
from wlsup.errors import WlsupError


def held_out(module):
    return [key for batch in module.val_dataloader() for key in batch.keys]


def test_a_saved_manifest_is_replayed_whatever_pairs_says(make_module, make_set, tmp_path):
    files = make_set(60)
    first = make_module(files, pairs=20)
    sha = first.write_manifest(tmp_path / "manifest.txt")
    assert sha == first.manifest_sha256 == hashlib.sha256((tmp_path / "manifest.txt").read_bytes()).hexdigest()
    for pairs in (None, 8, 40):
        again = make_module(files, pairs=pairs, manifest=str(tmp_path / "manifest.txt"))
        assert again.manifest == first.manifest and again.manifest_sha256 == sha and held_out(again) == held_out(first)
    keys = [key for batch in epoch_of(again) for key in batch.keys]
    assert sorted(keys) == first.manifest


def test_a_replay_survives_the_loss_of_a_fifth_of_the_other_rows_also_of_their_pictures(
    make_module, make_set, tmp_path
):
    first = make_module(make_set(60), pairs=20)
    first.write_manifest(tmp_path / "manifest.txt")
    outside = [i for i in range(60) if f"{i:03d}.jpg" not in {*first.manifest, *held_out(first)}]
    lost = random.Random(0).sample(outside, 8)
    lossy = make_module(
        make_set(60, bad=dict.fromkeys(lost), name="lossy"),
        manifest=str(tmp_path / "manifest.txt"),
        max_bad_fraction=0.05,
    )
    assert lossy.manifest_sha256 == first.manifest_sha256 and held_out(lossy) == held_out(first) and not lossy.skipped


def test_keys_that_are_gone_count_as_bad_and_are_named(make_module, make_set, tmp_path):
    first = make_module(make_set(60), pairs=20)
    first.write_manifest(tmp_path / "manifest.txt")
    gone = int(first.manifest[3][:3])
    files = make_set(60, bad={gone: None}, name="less")
    again = make_module(files, manifest=str(tmp_path / "manifest.txt"))
    assert set(first.manifest) - set(again.manifest) == {first.manifest[3]} and again.pairs == 19
    assert set(again.skipped) == {first.manifest[3]} and again.skipped[first.manifest[3]].startswith("not in")
    with pytest.raises(
        WlsupError, match=rf"1 of 20 keys .* such as '{first.manifest[3]}', more than max_bad_fraction=0.01"
    ):
        make_module(files, manifest=str(tmp_path / "manifest.txt"), max_bad_fraction=0.01).setup()


def test_no_key_of_a_manifest_is_held_out():
    keys = [f"{i:03d}" for i in range(100)]
    _, validation = split_positions(keys, None, 30)
    fixed = [keys[position] for position in validation[:10]]  # what would be held out otherwise
    train, held = split_positions(keys, None, 30, fixed=fixed)
    assert [keys[position] for position in train] == sorted(fixed) and len(held) == 30 and not set(train) & set(held)
    with pytest.raises(WlsupError, match="beside the manifest's keys the source has only 10. Set"):
        split_positions(keys, None, 30, fixed=keys[:90])


def test_the_mini_source_replays_its_manifest(tmp_path):
    first = CaptionDataModule(pairs=24, validation_pairs=4)
    first.write_manifest(tmp_path / "m.txt")
    again = CaptionDataModule(pairs=8, validation_pairs=4, manifest=str(tmp_path / "m.txt"))
    assert again.manifest_sha256 == first.manifest_sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"a\nb", "cut off"), (b"a\n\nb\n", "empty line"), (b"a\nb\na\n", "names 1 keys twice")],
)
def test_a_broken_manifest_is_refused(tmp_path, content, message):
    (tmp_path / "m.txt").write_bytes(content)
    with pytest.raises(WlsupError, match=message):
        read_manifest(tmp_path / "m.txt")
    with pytest.raises(WlsupError, match="absent.* cannot be read"):
        read_manifest(tmp_path / "absent")


def test_keys_with_any_text_survive(tmp_path):
    from wlsup.data.subset import write_manifest

    keys = ["größe/猫.jpg", "a b\tc", "lone \udce9"]
    write_manifest(tmp_path / "m.txt", keys)
    assert sorted(read_manifest(tmp_path / "m.txt")) == sorted(keys)
