from __future__ import annotations

import pytest
import torch

from wlsup.data import sources
from wlsup.data.badness import BadSampleCounter
from wlsup.data.sources import CaptionSource, MemoryPictures, SourceRequest, load_source, register
from wlsup.errors import WlsupError


def test_a_new_source_joins_by_one_decorator_and_its_keywords_are_its_options(monkeypatch):
    sources.source_names()  # the others register first: what they register now would be undone
    monkeypatch.setattr(sources, "_BUILDERS", dict(sources._BUILDERS))

    @register("mine")
    def mine(request, *, shade=0):
        return CaptionSource("mine", ["a"], [["x"]], MemoryPictures(torch.full((1, 3, 2, 2), shade, dtype=torch.uint8)))

    assert load_source("mine", SourceRequest(), {"shade": 7}).pictures.read(0).max() == 7
    with pytest.raises(WlsupError, match="'shadow'. Did you mean 'shade'"):
        load_source("mine", SourceRequest(), {"shadow": 7})


def test_a_source_must_be_consistent():
    with pytest.raises(ValueError, match="2 keys, 1 caption lists"):
        CaptionSource("x", ["a", "b"], [["c"]], MemoryPictures(torch.zeros(2, 3, 1, 1)))


def test_a_selection_keeps_pictures_and_captions_together():
    pixels = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    whole = CaptionSource("x", list("abcd"), [["A"], ["B"], ["C"], ["D"]], MemoryPictures(pixels))
    part = whole.select(["d", "b"])
    assert part.keys == ["d", "b"] and part.captions == [["D"], ["B"]]
    assert [part.pictures.read(index).max().item() for index in range(len(part.pictures))] == [3, 1]


def test_bad_samples_count_once_and_against_what_a_rank_meets():
    counter = BadSampleCounter(0.1)
    counter.expect("train", share=50, total=100)
    for _ in range(3):  # epochs
        counter.note(["a: x", "b: y", "a: x", "c: z: w"], 50)
    assert counter.skipped == {"a": "x", "b": "y", "c": "z: w"}
    # In later epochs a rank meets other ranks' bad samples: 7 of 100 are within bounds, though not of 50.
    counter.note([f"{i}: x" for i in range(4)], 50)
    with pytest.raises(WlsupError, match=r"11 of 100 .* max_bad_fraction=0.1 allows: a \(x\); .* and 6 more\. Repair"):
        counter.note([f"{i}: x" for i in range(9)], 50)
    first_epoch = BadSampleCounter(0.1)
    first_epoch.expect("train", share=50, total=100)
    with pytest.raises(WlsupError, match="6 of 50"):
        first_epoch.note([f"{i}: x" for i in range(6)], 8)
