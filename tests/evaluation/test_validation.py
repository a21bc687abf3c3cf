"""Validation pictures come from the bank, of every class, by the pictures' identities alone."""

import hashlib
from types import SimpleNamespace

import pytest
import torch

from wlsup.errors import WlsupError
from wlsup.evaluation.validation import picture_keys, validation_split


def bank(count=100, classes=5):
    return torch.arange(count) % classes, [f"picture {row}" for row in range(count)]


def test_the_parts_are_disjoint_together_the_bank_and_stratified():
    labels, keys = bank()
    split = validation_split(labels, keys, 0.2)
    assert sorted(torch.cat(split).tolist()) == list(range(100))
    assert labels[split.validation].bincount().tolist() == [4] * 5
    assert labels[split.bank].bincount().tolist() == [16] * 5


def test_the_order_of_the_listing_changes_nothing():
    labels, keys = bank()
    order = torch.randperm(100).tolist()
    held = {keys[row] for row in validation_split(labels, keys).validation.tolist()}
    shuffled = validation_split(labels[order], [keys[row] for row in order]).validation.tolist()
    assert {keys[order[row]] for row in shuffled} == held


def test_the_first_of_each_class_by_hash_are_held_out():
    labels, keys = bank(20, 2)
    held = validation_split(labels, keys, 0.3).validation.tolist()
    for label in (0, 1):
        members = [row for row in range(20) if labels[row] == label]
        members.sort(key=lambda row: hashlib.sha256(f"wlsup validation\0{keys[row]}".encode()).hexdigest())
        assert sorted(members[:3]) == [row for row in held if labels[row] == label]


def test_small_classes_keep_a_picture_in_the_bank():
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    split = validation_split(labels, list("abcdef"), 0.9)
    assert labels[split.validation].bincount(minlength=3).tolist() == [0, 1, 2]
    assert labels[split.bank].bincount(minlength=3).tolist() == [1, 1, 1]


def test_names_are_identities_where_there_are_any():
    assert picture_keys(SimpleNamespace(names=["x.jpg", "y.jpg"])) == ["x.jpg", "y.jpg"]
    assert picture_keys([0, 0, 0]) == ["0", "1", "2"]


def test_mistakes_are_one_sentence():
    with pytest.raises(WlsupError, match="No class of the bank has two pictures"):
        validation_split(torch.tensor([0, 1]), ["a", "b"])
    with pytest.raises(WlsupError, match="one key a picture"):
        validation_split(torch.tensor([0, 0]), ["a"])
    with pytest.raises(WlsupError, match="in \\(0, 1\\)"):
        validation_split(torch.tensor([0, 0]), ["a", "b"], 1.0)
