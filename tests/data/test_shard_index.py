from __future__ import annotations

import random

import numpy as np
import pytest

from wlsup.data.packed import PackedLists, PackedStrings, first_of_each
from wlsup.data.shard_index import ShardIndex, merge_indices


def part(name, samples):
    """An index of one shard out of (key, captions, offset) samples."""
    return ShardIndex(
        names=[name],
        sizes=np.array([1000], np.int64),
        keys=PackedStrings.of(key for key, _, _ in samples),
        captions=PackedLists.of(captions for _, captions, _ in samples),
        shard=np.zeros(len(samples), np.int32),
        offset=np.array([offset for _, _, offset in samples], np.int64),
        length=np.array([offset + 7 for _, _, offset in samples], np.int64),
        broken={"no caption": 1, name: 2},
    )


def read(index):
    places = zip(index.shard.tolist(), index.offset.tolist(), index.length.tolist(), strict=True)
    return [
        (key, captions, index.names[shard], offset, length)
        for key, captions, (shard, offset, length) in zip(index.keys, index.captions, places, strict=True)
    ]


@pytest.mark.parametrize("names", [4, 40, 100_000])
def test_merged_indices_are_those_of_a_plain_loop(names):
    chance = random.Random(names)
    parts, expected, offset = [], {}, 0
    for shard in range(6):
        samples = {}
        for _ in range(chance.randrange(20)):
            key = f"größe/{chance.randrange(names)}"
            samples.setdefault(key, ([f"text {chance.randrange(5)}" for _ in range(chance.randrange(3))], offset))
            offset += 1
        samples = [(key, list(dict.fromkeys(captions)), at) for key, (captions, at) in samples.items()]
        parts.append(part(f"{shard}.tar", samples))
        for key, captions, at in samples:
            if key in expected:
                expected[key][1].extend(text for text in captions if text not in expected[key][1])
            else:
                expected[key] = (key, list(captions), f"{shard}.tar", at, at + 7)
    merged = merge_indices(parts)
    assert read(merged) == list(expected.values())
    assert merged.broken == {"no caption": 6, **{f"{shard}.tar": 2 for shard in range(6)}}
    assert merged.names == [f"{shard}.tar" for shard in range(6)] and merged.sizes.tolist() == [1000] * 6
    assert (merged.shard.dtype, merged.offset.dtype, merged.length.dtype) == (np.int32, np.int64, np.int64)


def test_empty_shards_merge_too():
    assert read(merge_indices([part("a", []), part("b", [("x", ["y"], 3)]), part("c", [])])) == [
        ("x", ["y"], "b", 3, 10)
    ]
    assert len(merge_indices([part("a", [])])) == 0


def test_the_first_of_each_is_found():
    assert first_of_each(PackedStrings.of(["b", "a", "b", "", "a", "b", ""])).tolist() == [0, 1, 0, 3, 1, 0, 3]
