from __future__ import annotations

import pytest

from wlsup.data.sampler import EpochSampler


def epoch(sampler, number):
    sampler.set_epoch(number)
    items = list(sampler)
    assert {item[0] for item in items} <= {number}
    return [index for _, index in items]


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own():
    sampler = EpochSampler(96, batch_size=8)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert sorted(first) == sorted(second) == list(range(96)) and first != second != list(range(96))
    assert epoch(sampler, 0) == first == epoch(EpochSampler(96, batch_size=8), 0)
    assert epoch(EpochSampler(96, batch_size=8, seed=1), 0) != first


@pytest.mark.parametrize(("size", "ranks", "batch"), [(96, 2, 8), (101, 3, 4), (50, 4, 5), (7, 2, 4)])
def test_ranks_share_an_epoch_without_overlap_in_equal_whole_batches(size, ranks, batch):
    samplers = [EpochSampler(size, batch_size=batch, rank=rank, world_size=ranks) for rank in range(ranks)]
    parts = [epoch(sampler, 3) for sampler in samplers]
    flat = [index for part in parts for index in part]
    assert len(set(flat)) == len(flat) == size // (ranks * batch) * ranks * batch
    assert {len(part) for part in parts} == {len(samplers[0])} and len(samplers[0]) % batch == 0


def test_a_global_batch_is_the_same_set_whatever_the_number_of_ranks():
    one = epoch(EpochSampler(103, batch_size=12), 2)
    for ranks in (2, 3, 4):
        parts = [epoch(EpochSampler(103, batch_size=12 // ranks, rank=r, world_size=ranks), 2) for r in range(ranks)]
        for step in range(len(one) // 12):
            batch = {index for part in parts for index in part[step * 12 // ranks : (step + 1) * 12 // ranks]}
            assert batch == set(one[step * 12 : (step + 1) * 12])


def test_what_is_left_out_of_one_epoch_comes_in_another():
    sampler = EpochSampler(10, batch_size=4)
    assert set().union(*(epoch(sampler, number) for number in range(10))) == set(range(10))


def test_a_start_is_taken_once():
    sampler = EpochSampler(20, batch_size=5)
    whole = epoch(sampler, 0)
    sampler.start = 10
    assert epoch(sampler, 0) == whole[10:] and epoch(sampler, 0) == whole and len(sampler) == 20


def test_without_shuffling_every_sample_comes_in_order():
    assert epoch(EpochSampler(7, batch_size=4, shuffle=False), 5) == list(range(7))
