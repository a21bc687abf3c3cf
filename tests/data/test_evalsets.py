from __future__ import annotations

import pytest
import torch
from data_makers import noise_jpeg, write_tar

from wlsup.batch import ImageSpec
from wlsup.data.datamodule import DEFAULT_EVAL_SETS, CaptionDataModule
from wlsup.data.evalsets import EvalSetSpec, build_eval_set, eval_set_names, register_eval_set
from wlsup.data.mini import MINI_EVAL_SETS
from wlsup.errors import WlsupError

HEADER = "file,split,label,class\n"


@pytest.fixture
def table_set(tmp_path):
    """A labelled set in a tar: files cat0, cat1, ... by class; ``rows`` overrides the labels file."""

    def make(rows=None, missing=(), **settings):
        files = {f"{kind}{i}.jpg": noise_jpeg(i) for kind in ("cat", "dog") for i in range(6)}
        files["cat1.jpg"] = b"rot"
        write_tar(tmp_path / "x.tar", {f"root/{name}": data for name, data in files.items() if name not in missing})
        if rows is None:
            rows = HEADER + "".join(
                f"{kind}{i}.jpg,{'test' if i > 3 else 'train'},{label},{kind}\n"
                for label, kind in enumerate(("dog", "cat"))
                for i in range(6)
            )
        (tmp_path / "labels.csv").write_text(rows)
        return EvalSetSpec("pets", str(tmp_path / "x.tar"), labels=str(tmp_path / "labels.csv"), **settings)

    return make


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("test", ["test", "val"])
def test_a_tree_of_class_folders_is_read_from_a_folder_or_a_tar(tmp_path, spec, archived, test):
    files = {
        f"{split}/{kind}/deep/{i}.jpg": noise_jpeg(i)
        for split, number in (("train", 3), (test, 2))
        for kind in ("dog", "cat")
        for i in range(number)
    } | {"train/readme.txt": b"x"}
    if archived:
        images = write_tar(tmp_path / "x.tar", {f"top/{name}": data for name, data in files.items()})
    else:
        images = tmp_path / "x"
        for name, data in files.items():
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            (images / name).write_bytes(data)
    built = build_eval_set(EvalSetSpec("pets", str(images), kind="imagefolder", domain="in"), spec)
    assert (built.name, built.domain, list(built.class_names)) == ("pets", "in", ["cat", "dog"])
    assert len(built.train) == 6 and len(built.test) == 4
    assert sorted(label for _, label in built.train) == [0, 0, 0, 1, 1, 1]
    picture, label = built.test[0]
    assert picture.shape == (3, 16, 16) and picture.dtype == torch.float32 and label == 0


def test_a_table_of_labels_keeps_its_numbers_and_names(table_set, spec):
    built = build_eval_set(table_set(), spec)
    assert list(built.class_names) == ["dog", "cat"] and built.domain == "out"
    assert len(built.train) == 8 and len(built.test) == 4
    assert [item[1] for item in built.test] == [1, 1, 0, 0]  # sorted by file name: cat4, cat5, dog4, dog5


def test_labels_may_be_names(table_set, spec):
    rows = "image,split,label\n" + "".join(
        f"{kind}{i}.jpg,{split},{kind}\n" for kind in ("dog", "cat") for i, split in ((0, "train"), (2, "validation"))
    )
    built = build_eval_set(table_set(rows), spec)
    assert list(built.class_names) == ["cat", "dog"] and [item[1] for item in built.test] == [0, 1]


def test_an_unreadable_picture_comes_as_zeros_with_its_reason(table_set, spec):
    built = build_eval_set(table_set(), spec)
    bad = [item for item in built.train if len(item) == 3]
    assert len(bad) == 1
    picture, label, reason = bad[0]
    assert picture.shape == (3, 16, 16) and not picture.any() and label == 1
    assert reason.startswith("root/cat1.jpg: not a picture of a known format")


def test_a_few_missing_pictures_are_reported_and_many_refused(table_set, spec):
    built = build_eval_set(table_set(missing=("dog0.jpg",), max_bad_fraction=0.2), spec)
    assert [item[2] for item in built.train if len(item) == 3][-1].startswith("root/dog0.jpg: not in ")
    with pytest.raises(WlsupError, match=r"1 of 8 pictures cannot be had, such as 'root/dog0.jpg'.*max_bad_fraction"):
        build_eval_set(table_set(missing=("dog0.jpg",)), spec)


def test_queries_are_counted_by_themselves_and_no_class_may_lose_all_of_its_own(table_set, spec):
    with pytest.raises(WlsupError, match=r"1 of 4 pictures cannot be had, such as 'root/dog5.jpg'"):
        build_eval_set(table_set(missing=("dog5.jpg",), max_bad_fraction=0.2), spec)  # 1 of 12 in all
    with pytest.raises(WlsupError, match=r"of class 'dog' no picture of split 'test' is there"):
        build_eval_set(table_set(missing=("dog4.jpg", "dog5.jpg"), max_bad_fraction=0.6), spec)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (None, {"kind": "folders"}, r"Unknown kind of eval set 'folders'"),
        (None, {"domain": "near"}, r"Unknown domain 'near'"),
        (None, {"train": "training"}, r"no pictures in split 'training'\. Found: test, train"),
        (None, {"test": "eval"}, r"no pictures in split 'eval'"),
        ("file,split\ncat0.jpg,train\n", {}, r"none of the columns label.*Found: 'file', 'split'"),
        (HEADER + "cat0.jpg,train,0,cat\ncat2.jpg,test,0,dog\n", {}, r"line 3: label 0 is class 'dog' here and 'cat'"),
        (HEADER + "cat0.jpg,train,,cat\n", {}, r"line 2: no label"),
        (HEADER + "cat0.jpg,train,0,cat\ncat0.jpg,test,0,cat\n", {}, r"1 pictures more than once, such as 'root/cat0"),
        (
            HEADER + "cat0.jpg,train,0,cat\ndog0.jpg,test,1,dog\n",
            {},
            r"1 classes have test pictures and no training .*'dog'",
        ),
        (None, {"kind": "imagefolder"}, r"no pictures in split 'train'\. Found: none"),
    ],
)
def test_a_broken_set_ends_in_one_message_that_says_what_to_do(table_set, spec, rows, settings, message):
    with pytest.raises(WlsupError, match=message):
        build_eval_set(table_set(rows, **settings), spec)


def test_a_table_set_without_labels_says_what_it_needs(tmp_path, spec):
    with pytest.raises(WlsupError, match="kind 'table' and needs labels: a CSV with the columns file, split, label"):
        build_eval_set(EvalSetSpec("x", str(tmp_path)), spec)


def test_an_unknown_name_lists_the_known_ones(spec):
    with pytest.raises(
        WlsupError, match=r"Unknown eval set 'mini_shape'. Did you mean 'mini_shapes'\? Valid: .*mini_digits"
    ):
        build_eval_set("mini_shape", spec)


def test_the_mini_sets_are_the_default_and_are_built_once():
    assert tuple(MINI_EVAL_SETS) == DEFAULT_EVAL_SETS and set(DEFAULT_EVAL_SETS) <= set(eval_set_names())
    module = CaptionDataModule(eval_sets=["mini_digits"])
    module.image_spec = ImageSpec(size=64, resize=64)
    (built,) = module.eval_datasets()
    assert built.name == "mini_digits" and built.domain == "out" and built is module.eval_datasets()[0]
    picture, label = built.test[0][:2]
    assert picture.shape == (3, 64, 64) and 0 <= label < len(built.class_names)


def test_a_new_set_joins_by_one_decorator(spec, monkeypatch):
    from wlsup.data import evalsets

    monkeypatch.setattr(evalsets, "_BUILDERS", dict(evalsets._BUILDERS))
    register_eval_set("mine")(lambda name, spec: (name, spec))
    assert build_eval_set("mine", spec) == ("mine", spec)


@pytest.mark.parametrize(
    ("folder", "archive", "train", "test"),
    [("cifar10", "cifar10.tar", 5000, 1000), ("dtd10", "dtd10_128px.tar", 800, 400)],
)
def test_the_real_sets_are_read_as_they_lie(shared_data, folder, archive, train, test):
    entry = EvalSetSpec(folder, str(shared_data / folder / archive), labels=str(shared_data / folder / "labels.csv"))
    built = build_eval_set(entry, ImageSpec(size=32, resize=32))
    assert len(built.train) == train and len(built.test) == test and len(built.class_names) == 10
    counts = torch.bincount(torch.tensor(built.test.labels))
    assert (counts == test // 10).all()
    for index in (0, len(built.test) - 1):
        picture, label = built.test[index]
        assert picture.shape == (3, 32, 32)
        assert f"/{built.class_names[label]}/" in built.test.names[index]
