"""Retrieval recall: known values, ties at chance, tiles that do not show."""

from __future__ import annotations

import math

import pytest
import torch

from wlsup.errors import WlsupError
from wlsup.evaluation.retrieval import retrieval_hits, retrieval_intervals, retrieval_recall


def test_perfect_pairs_are_all_found_and_chance_is_k_over_n():
    pairs = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    recall = retrieval_recall(pairs, 3 * pairs)
    assert recall["image_to_text"] == recall["text_to_image"] == {1: 1.0, 5: 1.0, 10: 1.0}
    assert recall["chance"] == {1: 1 / 40, 5: 5 / 40, 10: 10 / 40}


def test_known_ranks_give_known_recalls_in_each_direction():
    # Similarities of unit vectors in the plane, by angle in degrees.
    angles = {"image": [0.0, 40.0, 100.0], "text": [10.0, 15.0, 95.0]}
    image, text = (
        torch.stack([torch.tensor(angles[side]).deg2rad().cos(), torch.tensor(angles[side]).deg2rad().sin()], 1)
        for side in ("image", "text")
    )
    recall = retrieval_recall(image, text, ks=(1, 2, 3))
    # Image 1 at 40 has texts at distances 30, 25, 55: right. Text 1 at 15 has images at 15, 25, 85: second.
    assert recall["image_to_text"] == {1: 1.0, 2: 1.0, 3: 1.0}
    assert recall["text_to_image"] == {1: pytest.approx(2 / 3), 2: 1.0, 3: 1.0}


@pytest.mark.parametrize("n", [12, 300])
def test_a_constant_embedding_scores_chance(n):
    constant = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).repeat(n, 1)
    varied = torch.randn(n, 64, generator=torch.Generator().manual_seed(2))
    recall = retrieval_recall(constant, constant, tile=100)
    assert recall["image_to_text"] == recall["text_to_image"] == recall["chance"]
    one_sided = retrieval_recall(varied, constant, tile=100)  # every text at the same similarity to a given picture
    assert one_sided["image_to_text"] == one_sided["chance"]
    assert retrieval_recall(torch.zeros(n, 4), varied[:, :4])["image_to_text"] == recall["chance"]


def test_unrelated_embeddings_score_near_chance():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(2000, 32, generator=generator) for _ in range(2))
    recall = retrieval_recall(image, text, ks=(100,))
    for direction in ("image_to_text", "text_to_image"):
        assert recall[direction][100] == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 2000))


@pytest.mark.parametrize("tile", [3, 64, 130, 1000])
def test_tiles_do_not_change_the_answer(tile):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(130, 8, generator=generator)
    text = image + 1.5 * torch.randn(130, 8, generator=generator)
    unit_image, unit_text = (torch.nn.functional.normalize(part.double(), dim=1) for part in (image, text))
    similarity = unit_image @ unit_text.T
    recall = retrieval_recall(image, text, tile=tile)
    for direction, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        ranks = (scores > scores.diag()[:, None]).sum(1)
        assert 0.1 < recall[direction][1] < 0.9
        assert recall[direction] == {k: pytest.approx((ranks < k).double().mean().item()) for k in (1, 5, 10)}


def test_other_captions_of_the_same_picture_are_not_wrong():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(20, 16, generator=generator)
    image = pictures.repeat_interleave(5, 0)
    text = image + 0.01 * torch.randn(100, 16, generator=generator)
    keys = [f"photo{index // 5}.jpg" for index in range(100)]
    assert retrieval_recall(image, text)["image_to_text"][1] < 0.5
    recall = retrieval_recall(image, text, keys=keys)
    assert recall["image_to_text"][1] == recall["text_to_image"][1] == 1.0
    assert recall["chance"][1] == pytest.approx(1 / 96)


def test_one_pair_is_always_found():
    assert retrieval_recall(torch.ones(1, 3), torch.ones(1, 3))["image_to_text"] == {1: 1.0, 5: 1.0, 10: 1.0}


@pytest.mark.parametrize(
    ("image", "text", "options", "message"),
    [
        (torch.ones(3, 4), torch.ones(2, 4), {}, r"\(3, 4\) and \(2, 4\)"),
        (torch.ones(0, 4), torch.ones(0, 4), {}, "one or more"),
        (torch.ones(3, 4), torch.full((3, 4), math.nan), {}, "Row 0 of the text embeddings"),
        (torch.ones(3, 4), torch.ones(3, 4), {"ks": (0,)}, "at least 1"),
        (torch.ones(3, 4), torch.ones(3, 4), {"ks": ()}, "at least 1"),
        (torch.ones(3, 4), torch.ones(3, 4), {"keys": ["a"]}, "3 pairs and 1 keys"),
    ],
)
def test_a_mistake_is_refused(image, text, options, message):
    with pytest.raises(WlsupError, match=message):
        retrieval_recall(image, text, **options)


def test_recall_is_the_mean_of_the_pairs_hits_and_has_an_interval_over_them():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(60, 8, generator=generator)
    text = image + 1.5 * torch.randn(60, 8, generator=generator)
    hits, recall = retrieval_hits(image, text, (1, 5)), retrieval_recall(image, text, (1, 5))
    assert {k: float(each.mean()) for k, each in hits["image_to_text"].items()} == recall["image_to_text"]
    found = retrieval_intervals(hits)
    assert set(found) == {"image_to_text", "text_to_image"}
    low, high = found["image_to_text"][1]
    assert low < recall["image_to_text"][1] < high
    assert 0.15 < high - low < 0.30  # of 60 pairs: about +-1.96 sqrt(p (1 - p) / 60)
