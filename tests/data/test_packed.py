from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pytest

from wlsup.data import json_stream
from wlsup.data.json_stream import stream_json
from wlsup.data.packed import PackedLists, PackedStrings
from wlsup.errors import WlsupError

TEXTS = ["a", "", "größe 猫", "x" * 5000, "\ud800 lone", "b\nc"]


def test_packed_strings_are_the_strings():
    packed = PackedStrings.of(TEXTS)
    assert list(packed) == TEXTS and len(packed) == 6 and packed[-1] == "b\nc" and packed[1:3] == TEXTS[1:3]
    assert list(pickle.loads(pickle.dumps(packed))) == TEXTS
    with pytest.raises(IndexError):
        packed[6]
    assert list(PackedStrings.of([])) == [] and list(PackedStrings.of([]).take([])) == []


def test_a_selection_of_packed_strings_and_lists_keeps_order_and_repeats():
    chance = random.Random(0)
    lists = [[chance.choice(TEXTS) for _ in range(chance.randrange(4))] for _ in range(50)]
    packed = PackedLists.of(lists)
    assert list(packed) == lists and packed[-1] == lists[-1] and packed[3:5] == lists[3:5]
    indices = [chance.randrange(50) for _ in range(80)]
    assert list(packed.take(indices)) == [lists[i] for i in indices]
    assert list(packed.take(np.array(indices)).take([5, 0])) == [lists[indices[5]], lists[indices[0]]]
    assert list(packed.take([])) == []


DOCUMENT = {"a": [1, {"b": [2, "]"]}, "ü\n"], "c": {"d": [1]}, "e": [], "f": 12345.5, "g": [[1], []]}


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_json_is_streamed_whatever_the_pieces_it_is_read_in(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    path = tmp_path / "x.json"
    expected = [
        ("a", 1),
        ("a", {"b": [2, "]"]}),
        ("a", "ü\n"),
        ("c", {"d": [1]}),
        ("f", 12345.5),
        ("g", [1]),
        ("g", []),
    ]
    for text in (
        json.dumps(DOCUMENT),
        json.dumps(DOCUMENT, indent=3, ensure_ascii=False),
        "\ufeff" + json.dumps(DOCUMENT),
    ):
        path.write_text(text, encoding="utf-8")
        assert list(stream_json(path)) == expected
    path.write_text(" [12, 345 ,\n{}]\n")
    assert list(stream_json(path)) == [("", 12), ("", 345), ("", {})]
    path.write_text("{}")
    assert list(stream_json(path)) == []


@pytest.mark.parametrize(
    "text",
    ["", "12", '{"a": [1, 2', '{"a": [1, 2]', '{"a": [1 2]}', "[1, 2]]", '{"a" [1]}', "{1: 2}", "[1, {]", "[" * 9],
)
def test_json_that_is_cut_off_or_wrong_says_where(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(WlsupError, match=r"x.json is not sound JSON: .*, near character \d+"):
        list(stream_json(path))


def test_a_missing_json_file_says_so(tmp_path):
    with pytest.raises(WlsupError, match="No such file: .*absent.json"):
        list(stream_json(tmp_path / "absent.json"))
