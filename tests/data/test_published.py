from __future__ import annotations

import csv
import hashlib
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from data_makers import noise_jpeg
from native import eurosat_files, write_cifar, write_imagenet, write_published, write_tree, write_zip
from scipy.io import savemat

from wlsup.batch import ImageSpec
from wlsup.data.cifar import CIFAR10, read_cifar
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.evalsets import EvalSetSpec, build_eval_set, eval_set_names, locate_eval_set
from wlsup.data.imagenet import imagenet_wnids
from wlsup.data.published import PUBLISHED
from wlsup.data.published_folders import EUROSAT_COUNTS, eurosat_test_numbers
from wlsup.data.svhn import read_svhn
from wlsup.errors import WlsupError

PLAIN = ImageSpec(size=32, resize=32, mean=(0, 0, 0), std=(1, 1, 1))


def to_bytes(item):
    return (item[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("name", "domain", "train", "test", "classes"),
    [
        ("cifar10", "in", 100, 20, 10),
        ("cifar100", "in", 120, 120, 100),
        ("svhn", "out", 20, 20, 10),
        ("eurosat", "out", None, None, 10),
        ("dtd", "out", 12, 6, 2),
        ("imagenet", "in", 8, 4, 2),
        ("imagenet_v2", "in", 8, 6, 2),
        ("imagenet_a", "out", 4, 3, 1),
        ("imagenet_r", "out", 8, 6, 2),
        ("imagenet_sketch", "out", 8, 6, 2),
    ],
)
def test_each_published_set_is_read_from_its_native_files_by_name(tmp_path, name, domain, train, test, classes):
    write_published(tmp_path, name)
    built = build_eval_set(name, PLAIN, str(tmp_path))
    assert built.domain == domain and len(built.class_names) == classes and name in eval_set_names()
    if train is None:
        assert len(built.train) + len(built.test) == 150 and len(built.test) > 10
    else:
        assert (len(built.train), len(built.test)) == (train, test)
    for part in (built.train, built.test):
        picture, label = part[0]
        assert picture.shape == (3, 32, 32) and picture.dtype == torch.float32 and isinstance(label, int)
        assert set(part.labels) <= set(range(classes))
    overridden = build_eval_set(EvalSetSpec(name, domain="out" if domain == "in" else "in"), PLAIN, str(tmp_path))
    assert overridden.domain != domain
    bank = str(tmp_path / "imagenet") if PUBLISHED[name].bank else None
    elsewhere = build_eval_set(EvalSetSpec("mine", kind=name, images=str(tmp_path / name), bank=bank), PLAIN)
    assert elsewhere.name == "mine" and elsewhere.domain == domain and len(elsewhere.test) == len(built.test)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_missing_set_says_what_lacks_where_it_looked_and_how_to_get_it(tmp_path, name, monkeypatch):
    monkeypatch.setenv("WLSUP_DATA", str(tmp_path))
    with pytest.raises(
        WlsupError,
        match=rf"(?s)'{name}' is not here: .* missing\. Looked in {tmp_path}/{name} and .*wlsup data fetch {name}",
    ):
        build_eval_set(name, PLAIN)
    write_published(tmp_path, name)
    assert len(build_eval_set(name, PLAIN).test)  # by the environment variable


def test_a_set_with_one_file_missing_names_that_file(tmp_path):
    write_published(tmp_path, "cifar10")
    (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(WlsupError, match=r"not here: cifar-10-batches-py/data_batch_3 missing"):
        build_eval_set("cifar10", PLAIN, str(tmp_path))


def test_cifar_pixels_and_labels_are_torchvision_s(tmp_path, monkeypatch):
    write_published(tmp_path, "cifar10")
    folder = tmp_path / "cifar10"
    sums = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in (folder / "cifar-10-batches-py").iterdir()}
    theirs = torchvision.datasets.CIFAR10
    monkeypatch.setattr(theirs, "train_list", [[n, sums[n]] for n, _ in theirs.train_list])
    monkeypatch.setattr(theirs, "test_list", [[n, sums[n]] for n, _ in theirs.test_list])
    monkeypatch.setattr(theirs, "meta", {**theirs.meta, "md5": sums["batches.meta"]})
    built = build_eval_set("cifar10", PLAIN, str(tmp_path))
    for part, train in ((built.train, True), (built.test, False)):
        reference = theirs(folder, train=train)
        assert part.labels == reference.targets and reference.classes == list(built.class_names)
        assert all(np.array_equal(to_bytes(part[i]), reference.data[i]) for i in range(len(part)))


def test_svhn_pixels_and_labels_are_torchvision_s(tmp_path, monkeypatch):
    folder = write_published(tmp_path, "svhn") / "svhn"
    theirs = torchvision.datasets.SVHN
    monkeypatch.setattr(theirs, "_check_integrity", lambda self: True)
    built = build_eval_set("svhn", PLAIN, str(tmp_path))
    for split, part in (("train", built.train), ("test", built.test)):
        reference = theirs(folder, split=split)
        assert part.labels == reference.labels.tolist() and 0 in part.labels
        assert all(np.array_equal(to_bytes(part[i]), reference.data[i].transpose(1, 2, 0)) for i in range(len(part)))


@pytest.mark.parametrize("partition", [1, 2])
def test_dtd_s_partition_is_torchvision_s_train_and_val_against_test(tmp_path, partition):
    folder = write_published(tmp_path, "dtd") / "dtd"
    write_tree(tmp_path / "tv", {})
    (tmp_path / "tv").mkdir()
    os.symlink(folder, tmp_path / "tv" / "dtd")
    built = build_eval_set(EvalSetSpec("dtd", partition=partition), PLAIN, str(tmp_path))
    for part, splits in ((built.train, ("train", "val")), (built.test, ("test",))):
        files, labels = [], []
        for split in splits:
            reference = torchvision.datasets.DTD(tmp_path / "tv", split=split, partition=partition)
            files += ["/".join(path.parts[-2:]) for path in reference._image_files]
            labels += reference._labels
        assert part.names == files and part.labels == labels
    with pytest.raises(WlsupError, match="partition=11 .* DTD has 1 to 10"):
        build_eval_set(EvalSetSpec("dtd", partition=11), PLAIN, str(tmp_path))


def test_eurosat_s_classes_are_torchvision_s_from_folder_and_from_zip(tmp_path):
    files = eurosat_files(12)
    write_tree(tmp_path / "a" / "eurosat" / "2750", files)
    (tmp_path / "b").mkdir()
    write_zip(tmp_path / "b" / "EuroSAT.zip", {f"2750/{name}": data for name, data in files.items()})
    reference = torchvision.datasets.EuroSAT(tmp_path / "a")
    assert reference.classes == list(EUROSAT_COUNTS)
    labels = {os.path.basename(path): label for path, label in reference.samples}
    whole, zipped = (build_eval_set("eurosat", PLAIN, str(tmp_path / root)) for root in "ab")
    for a, b in ((whole.train, zipped.train), (whole.test, zipped.test)):
        assert [n.split("/")[-1] for n in a.names] == [n.split("/")[-1] for n in b.names] and a.labels == b.labels
        assert all(labels[name.split("/")[-1]] == label for name, label in zip(a.names, a.labels, strict=True))
        assert torch.equal(a[3][0], b[3][0])
    assert len(whole.train) + len(whole.test) == len(files)


def test_the_shipped_eurosat_split_is_stratified_and_is_what_the_rule_gives():
    import json
    from importlib.resources import files

    shipped = json.loads(files("wlsup").joinpath("assets/splits/eurosat.json").read_text())["test"]
    assert shipped == eurosat_test_numbers()
    assert sum(EUROSAT_COUNTS.values()) == 27_000 and sum(map(len, shipped.values())) == 5_400
    for name, numbers in shipped.items():
        assert len(set(numbers)) == EUROSAT_COUNTS[name] // 5
        assert 0.45 < sum(number <= EUROSAT_COUNTS[name] / 2 for number in numbers) / len(numbers) < 0.55


def test_a_flat_imagenet_validation_folder_needs_kaggle_s_file(tmp_path):
    root = tmp_path / "imagenet"
    write_imagenet(root)
    for path in list((root / "val").glob("*/*")):
        path.rename(root / "val" / path.name)
    for path in (root / "val").iterdir():
        if path.is_dir():
            path.rmdir()
    with pytest.raises(WlsupError, match="LOC_val_solution.csv"):
        build_eval_set("imagenet", PLAIN, str(tmp_path))
    rows = "".join(
        f"{p.stem},{'n01440764' if '_val_0' in p.name else 'n02123045'} 1 2 3 4 \n" for p in (root / "val").iterdir()
    )
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    built = build_eval_set("imagenet", PLAIN, str(tmp_path))
    assert sorted(built.test.labels) == [0, 0, 1, 1] and list(built.class_names) == ["tench", "tabby"]


def test_imagenet_v2s_folders_are_the_classes_by_number_in_the_order_of_wnids(tmp_path):
    from timm.data import ImageNetInfo

    assert list(imagenet_wnids()) == ImageNetInfo("imagenet-1k").label_names() and len(imagenet_wnids()) == 1000
    write_published(tmp_path, "imagenet_v2")
    folders = {p.name for p in (tmp_path / "imagenet_v2/imagenetv2-matched-frequency-format-val").iterdir()}
    assert folders == {"0", "281"}  # tench and tabby cat
    built = build_eval_set("imagenet_v2", PLAIN, str(tmp_path))
    assert list(built.class_names) == ["tench", "tabby"]
    for part in (built.train, built.test):
        for name, label in zip(part.names, part.labels, strict=True):
            assert name.split("/")[0] in (("n01440764", "0"), ("n02123045", "281"))[label]


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_the_bank_is_of_the_test_sets_classes_alone(tmp_path, name):
    write_published(tmp_path, name)
    built = build_eval_set(name, PLAIN, str(tmp_path))
    assert {n.split("/")[0] for n in built.train.names} == {n.split("/")[0] for n in built.test.names}
    assert set(built.train.labels) == set(built.test.labels) == set(range(len(built.class_names)))
    assert torch.equal(built.train[0][0], build_eval_set("imagenet", PLAIN, str(tmp_path)).train[
        4 * (name == "imagenet_a")
    ][0])  # fmt: skip


def test_a_bank_that_is_missing_or_lacks_a_class_is_named(tmp_path):
    import shutil

    write_published(tmp_path, "imagenet_r")
    shutil.rmtree(tmp_path / "imagenet" / "train" / "n02123045")
    with pytest.raises(WlsupError, match=r"lacks 1 of the 2 classes of eval set 'imagenet_r', such as n02123045"):
        build_eval_set("imagenet_r", PLAIN, str(tmp_path))
    shutil.rmtree(tmp_path / "imagenet")
    for call in (build_eval_set, lambda entry, spec, root: locate_eval_set(entry, root)):
        with pytest.raises(WlsupError, match=r"needs the training pictures of imagenet for its bank: train or"):
            call("imagenet_r", PLAIN, str(tmp_path))
    (tmp_path / "imagenet_r" / "imagenet-r" / "n01440764").rename(tmp_path / "x")
    (tmp_path / "imagenet_r" / "imagenet-r" / "n02123045").rename(tmp_path / "y")
    write_imagenet(tmp_path / "imagenet")
    with pytest.raises(WlsupError, match="no pictures in folders"):
        build_eval_set("imagenet_r", PLAIN, str(tmp_path))


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/wlsup-must-not-exist",)


def test_a_pickle_that_holds_code_is_refused_and_does_not_run(tmp_path):
    folder = write_cifar(tmp_path) / "cifar-10-batches-py"
    sound = (folder / "data_batch_2").read_bytes()
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": Payload(), "labels": []}, protocol=2))
    with pytest.raises(
        WlsupError, match=r"data_batch_2 is no batch .*wants to call (posix|nt)\.system.*fetch the set again"
    ):
        read_cifar(tmp_path, CIFAR10)
    assert not os.path.exists("/tmp/wlsup-must-not-exist")
    for cut in (0, 10, len(sound) // 2, len(sound) - 1):
        (folder / "data_batch_2").write_bytes(sound[:cut])
        with pytest.raises(WlsupError, match="data_batch_2 is no batch"):
            read_cifar(tmp_path, CIFAR10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0] * 19}, "20 pictures of 3072 values and 19 labels"),
        ({"labels": [10] * 20}, "labels outside 0 to 9"),
        ({"data": np.zeros((20, 3071), np.uint8)}, "20 pictures of 3071 values"),
        ({"data": np.zeros((20, 3072), np.float32)}, "no array 'data' of uint8"),
    ],
)
def test_wrong_counts_in_a_cifar_batch_are_refused(tmp_path, change, message):
    path = write_cifar(tmp_path) / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | change, protocol=2))
    with pytest.raises(WlsupError, match=message):
        read_cifar(tmp_path, CIFAR10)


def test_a_damaged_svhn_file_or_wrong_counts_are_refused(tmp_path):
    path = tmp_path / "x.mat"
    for content, message in (
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((3, 1))}, "4 pictures and 3 labels"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.full((4, 1), 11)}, "labels from 11 to 11"),
        ({"X": np.zeros((4, 32, 32, 3), np.uint8), "y": np.ones((4, 1))}, "not uint8"),
        ({"y": np.ones((4, 1))}, "no SVHN file"),
    ):
        savemat(path, content)
        with pytest.raises(WlsupError, match=message):
            read_svhn(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WlsupError, match="cut off or damaged"):
        read_svhn(path)


def test_dtd_lists_that_leak_or_name_absent_pictures_are_refused(tmp_path):
    root = write_published(tmp_path, "dtd") / "dtd" / "dtd"
    whole = (root / "labels" / "test1.txt").read_text()
    (root / "labels" / "test1.txt").write_text(whole + "banded/banded_0000.jpg\n")
    with pytest.raises(WlsupError, match="share pictures, such as 'banded/banded_0000.jpg'"):
        build_eval_set("dtd", PLAIN, str(tmp_path))
    (root / "labels" / "test1.txt").write_text("banded/banded_0099.jpg\n../../x/y.jpg\n")
    with pytest.raises(WlsupError, match="not a list|cannot be had"):
        build_eval_set("dtd", PLAIN, str(tmp_path))


def test_the_data_module_finds_published_sets_under_its_root(tmp_path):
    write_published(tmp_path, "svhn")
    module = CaptionDataModule(eval_sets=["svhn", EvalSetSpec("near", kind="svhn", domain="in")], root=str(tmp_path))
    module.image_spec = PLAIN
    assert [(built.name, built.domain) for built in module.eval_datasets()] == [("svhn", "out"), ("near", "in")]


def test_real_textures_in_dtd_s_own_layout(shared_data, tmp_path):
    rows = list(csv.DictReader((shared_data / "dtd10" / "labels.csv").read_text().splitlines()))
    with tarfile.open(shared_data / "dtd10" / "dtd10_128px.tar") as archive:
        contents = {m.name: archive.extractfile(m).read() for m in archive if m.isfile() and m.name.endswith(".jpg")}
    base = {name.split("/")[-1]: (name.split("/")[-2], data) for name, data in contents.items()}
    chosen = [r for i, r in enumerate(rows) if i % 6 == 0]
    lists = {"train": [], "val": [], "test": []}
    for i, row in enumerate(chosen):
        file = row["file"].split("/")[-1]
        folder, data = base[file]
        write_tree(tmp_path / "dtd" / "dtd" / "images", {f"{folder}/{file}": data})
        lists["test" if row["split"] == "test" else ("train", "val")[i % 2]].append(f"{folder}/{file}")
    for split, names in lists.items():
        write_tree(tmp_path / "dtd" / "dtd" / "labels", {f"{split}1.txt": "\n".join(names).encode()})
    built = build_eval_set("dtd", PLAIN, str(tmp_path))
    assert len(built.class_names) == 10 and len(built.train) + len(built.test) == len(chosen)
    assert all(len(built.test[i]) == 2 for i in range(len(built.test)))


def test_a_set_in_a_compressed_zip_skips_and_names_what_is_damaged(tmp_path):
    files = {f"2750/{name}": data for name, data in eurosat_files(10).items()}
    files["2750/Forest/Forest_1.jpg"] = noise_jpeg(1)[:50]
    write_zip(tmp_path / "EuroSAT.zip", files, zipfile.ZIP_DEFLATED)
    built = build_eval_set("eurosat", PLAIN, str(tmp_path))
    bad = [item[2] for part in (built.train, built.test) for item in part if len(item) == 3]
    assert len(bad) == 1 and bad[0].startswith("2750/Forest/Forest_1.jpg: ")
