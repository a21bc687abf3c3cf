"""What labelled parts promise: a fixed split, nothing unreadable, sets that are what was said."""

from types import SimpleNamespace

import pytest
import torch

from wlsup.errors import WlsupError
from wlsup.reprogramming.pictures import LabelledPart, eval_set_of, paired_points, split_train


class Numbered(torch.utils.data.Dataset):
    """Item i is a picture full of i, of class i % 2; every seventh cannot be read."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        item = (torch.full((3, 2, 2), float(index)), index % 2)
        return (*item, "torn") if index % 7 == 0 else item


def test_the_split_is_the_same_everywhere_and_shares_nothing():
    learn, choose = split_train(Numbered())
    assert (len(learn), len(choose)) == (40, 10)
    assert sorted(learn.positions + choose.positions) == list(range(50))
    torch.rand(3)
    assert split_train(Numbered())[1].positions == choose.positions
    with pytest.raises(WlsupError, match="cannot be split"):
        split_train(torch.utils.data.TensorDataset(torch.zeros(1)))


def test_draws_follow_torchs_random_state_and_leave_out_what_cannot_be_read():
    part = LabelledPart(Numbered())
    images, labels = part.draw(64)
    assert images.shape == (64, 3, 2, 2)
    numbers = images[:, 0, 0, 0].long()
    assert torch.equal(labels, numbers % 2)
    assert not (numbers % 7 == 0).any()
    torch.manual_seed(5)
    first = part.draw(8)[0]
    torch.manual_seed(5)
    assert torch.equal(part.draw(8)[0], first)
    with pytest.raises(WlsupError, match="can be read"):
        LabelledPart(Numbered(), [0, 7, 14]).draw(4)


def test_all_readable_pictures_are_judged_once():
    right, labels = LabelledPart(Numbered()).right(lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2), "cpu")
    assert len(right) == 50 - 8
    assert torch.equal(right, labels == 0)


def test_a_set_that_is_not_there_or_not_as_said_is_refused():
    door = SimpleNamespace(eval_datasets=lambda: [SimpleNamespace(name="digits", class_names=list("0123456789"))])
    assert eval_set_of(door, "digits", 10, "model.labels").name == "digits"
    with pytest.raises(WlsupError, match=r"'shapes' is not among the run's eval sets \(digits\)"):
        eval_set_of(door, "shapes", 10, "model.labels")
    with pytest.raises(WlsupError, match="digits has 10 classes; model.labels says 3"):
        eval_set_of(door, "digits", 3, "model.labels")


def test_a_difference_is_paired_and_has_its_interval():
    ours = torch.tensor([True] * 60 + [False] * 40)
    theirs = torch.tensor([True] * 50 + [False] * 50)
    half = 1.96 * 100 * (0.1 * 0.9 * 100 / 99) ** 0.5 / 10  # ten samples of a hundred differ, all one way
    assert paired_points(ours, theirs).startswith(f"+10.0 [{10 - half:+.1f}, {10 + half:+.1f}] points")
    assert paired_points(ours, ours).startswith("+0.0 [+0.0, +0.0]")
