"""Feature extraction: in order, once each, without what cannot be read, and without disturbing training."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from wlsup.errors import WlsupError
from wlsup.evaluation.features import extract_features, merge_features


class Pictures(Dataset):
    """Picture i is filled with i; those in ``broken`` cannot be read."""

    def __init__(self, n: int, broken: tuple[int, ...] = ()) -> None:
        self.n, self.broken = n, broken

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        if index in self.broken:
            return torch.zeros(3, 4, 4), index % 5, f"picture{index}.jpg: truncated"
        picture = torch.full((3, 4, 4), float(index))
        return (picture, index % 5) if index % 2 else (picture, torch.tensor(index % 5), None)


class Listed(Dataset):
    def __init__(self, *items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        return self.items[index]


def corner(images: torch.Tensor) -> torch.Tensor:
    """A feature that names the picture: (B, 3, 4, 4) -> (B, 2)."""
    return torch.stack([images[:, 0, 0, 0], torch.ones(len(images))], 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_come_in_the_order_of_the_data_set_with_their_labels(num_workers):
    found = extract_features(corner, Pictures(23), batch_size=5, num_workers=num_workers, normalize=False)
    assert found.features[:, 0].tolist() == list(range(23))
    assert found.labels.tolist() == [index % 5 for index in range(23)]
    assert found.indices.tolist() == list(range(23))
    assert found.features.dtype == torch.float32
    assert found.labels.dtype == torch.int64
    assert found.skipped == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_pictures_are_left_out_and_named(num_workers):
    # 20 to 23 fill a whole batch.
    broken = (0, 7, 20, 21, 22, 23)
    found = extract_features(corner, Pictures(30, broken), batch_size=4, num_workers=num_workers, normalize=False)
    kept = [index for index in range(30) if index not in broken]
    assert found.indices.tolist() == kept
    assert found.features[:, 0].tolist() == kept
    assert found.labels.tolist() == [index % 5 for index in kept]
    assert found.skipped == [f"{index}: picture{index}.jpg: truncated" for index in broken]


def test_features_are_normalised_unless_asked_not_to_be():
    raw = extract_features(corner, Pictures(10), normalize=False).features
    unit = extract_features(corner, Pictures(10)).features
    assert torch.allclose(unit, torch.nn.functional.normalize(raw, dim=1))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_parts_of_a_padded_distributed_sampler_make_the_whole_once(world):
    data = Pictures(10, broken=(9,))
    parts = [
        extract_features(
            corner, data, batch_size=2, sampler=DistributedSampler(data, world, rank, shuffle=True), normalize=False
        )
        for rank in range(world)
    ]
    assert sum(len(part) + len(part.skipped) for part in parts) == -(-10 // world) * world
    whole, merged = extract_features(corner, data, normalize=False), merge_features(parts)
    assert torch.equal(whole.features, merged.features)
    assert torch.equal(whole.labels, merged.labels)
    assert torch.equal(whole.indices, merged.indices)
    assert whole.skipped == merged.skipped


def test_positions_visited_twice_in_one_batch_count_once():
    progress = []
    found = extract_features(
        corner, Pictures(6), sampler=[4, 4, 2, 4], normalize=False, progress=lambda *done: progress.append(done)
    )
    assert found.features[:, 0].tolist() == [2, 4]
    assert found.indices.tolist() == [2, 4]
    assert progress == [(4, 4)]


def test_progress_counts_every_picture():
    seen = []
    extract_features(corner, Pictures(11, broken=(3,)), batch_size=4, progress=lambda *done: seen.append(done))
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_features_are_fp32_even_under_autocast():
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 8)
    plain = extract_features(lambda images: linear(images.flatten(1)), Pictures(40))
    with torch.autocast("cpu", torch.bfloat16):
        under = extract_features(lambda images: linear(images.flatten(1)), Pictures(40))
        assert linear(torch.ones(1, 48)).dtype == torch.bfloat16
    assert under.features.dtype == torch.float32
    assert torch.equal(plain.features, under.features)
    half = extract_features(lambda images: linear(images.flatten(1)).bfloat16(), Pictures(40))
    assert half.features.dtype == torch.float32


def test_extraction_builds_no_graph_and_its_features_can_train_a_probe():
    linear = torch.nn.Linear(48, 8)
    modes = []

    def extractor(images: torch.Tensor) -> torch.Tensor:
        modes.append(torch.is_inference_mode_enabled())
        return linear(images.flatten(1))

    found = extract_features(extractor, Pictures(10))
    assert modes == [True]
    assert not found.features.requires_grad
    probe = torch.nn.Linear(8, 5)
    torch.nn.functional.cross_entropy(probe(found.features), found.labels).backward()  # refused of inference tensors
    assert probe.weight.grad is not None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_extraction_draws_nothing_from_the_random_state_of_training(num_workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    extract_features(corner, Pictures(5), num_workers=num_workers)
    assert torch.equal(before, torch.get_rng_state())


PICTURE = torch.zeros(3, 4, 4)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no pictures"),
        ([(PICTURE, 0, "gone"), (PICTURE, 0, "cut")], "None of the 2 pictures could be read, starting with 0: gone"),
        ([(PICTURE, 0), PICTURE], "Item 1 of the data set must be"),
        ([(PICTURE.to(torch.uint8), 0)], "picture of item 0 must be a normalised float tensor"),
        ([(PICTURE, "cat")], "label of item 0 must be an integer class id, not 'cat'"),
        ([(PICTURE, 1.5)], "not 1.5"),
        ([(PICTURE, 0), (torch.zeros(3, 5, 5), 0)], r"one shape, not \(3, 4, 4\), \(3, 5, 5\)"),
    ],
)
def test_a_data_set_of_another_form_is_refused_in_one_sentence(items, message, num_workers):
    with pytest.raises(WlsupError, match=message) as caught:
        extract_features(corner, Listed(*items), num_workers=num_workers)
    assert "Traceback" not in str(caught.value)


def test_an_extractor_that_does_not_pool_is_refused():
    with pytest.raises(WlsupError, match=r"shape \(3, D\), not \(3, 3, 4, 4\)"):
        extract_features(lambda images: images, Pictures(3))


def test_parts_of_different_widths_do_not_merge():
    narrow = extract_features(corner, Pictures(3))
    wide = extract_features(lambda images: images.flatten(1), Pictures(3))
    with pytest.raises(WlsupError, match=r"one width, not \[2, 48\]"):
        merge_features([narrow, wide])


class Stalled(Pictures):
    """From its third on, no picture comes."""

    def __getitem__(self, index: int):
        if index >= 2:
            read, _ = os.pipe()
            os.read(read, 1)  # nobody ever writes
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_never_come_end_in_a_sentence(workers):
    started = time.monotonic()
    with pytest.raises(WlsupError, match=r"No batch came in 1 s.*--resume auto"):
        extract_features(lambda x: x.flatten(1), Stalled(6), batch_size=3, num_workers=workers, patience=1)
    assert time.monotonic() - started < 30
