"""Matching: a caption among others, with no way to know it but to look."""

import math

import pytest
import torch

from wlsup.batch import Condition
from wlsup.errors import WlsupError
from wlsup.objectives.matching import MatchingSpec, matching_loss


def captions(count):
    tokens = torch.arange(count, dtype=torch.float)[:, None, None].expand(-1, 3, 2).clone()
    return Condition(tokens, torch.ones(count, 3, dtype=torch.bool), tokens[:, 0], torch.ones(count, dtype=torch.bool))


def test_candidates_are_the_pictures_own_caption_and_the_next_ones():
    seen = {}

    def score(candidates):
        seen["ids"] = candidates.pooled[:, 0].reshape(3, 5).T
        return torch.zeros(5, 3)

    loss = matching_loss(score, captions(5), 2)
    assert seen["ids"].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 0], [4, 0, 1]]
    assert loss.item() == pytest.approx(math.log(3))


def test_it_is_the_cross_entropy_of_the_right_caption():
    scores = torch.randn(5, 3)
    wanted = -scores.log_softmax(1)[:, 0].mean()
    assert matching_loss(lambda candidates: scores, captions(5), 2).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_captions_of_the_same_picture_are_no_negatives():
    keys = ["a", "a", "b", "c", "d"]
    loss = matching_loss(lambda candidates: torch.zeros(5, 3), captions(5), 2, keys)
    # picture 0 loses candidate 1; picture 4's second negative is caption 1, of another picture than its own
    assert loss.item() == pytest.approx((math.log(2) + 4 * math.log(3)) / 5)
    alone = matching_loss(lambda candidates: torch.randn(2, 2), captions(2), 1, ["a", "a"])
    assert alone.item() == 0.0


def test_a_small_batch_has_as_many_negatives_as_it_can():
    shapes = []
    matching_loss(lambda candidates: shapes.append(len(candidates.mask)) or torch.zeros(2, 2), captions(2), 7)
    assert shapes == [4]
    assert matching_loss(lambda candidates: torch.zeros(1, 1), captions(1), 3).item() == 0.0


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"negatives": 0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(WlsupError, match="matching.weight must be > 0"):
        MatchingSpec(**options)
