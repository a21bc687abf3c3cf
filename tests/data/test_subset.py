from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import pytest

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
