from __future__ import annotations

import hashlib
import random
import tracemalloc

import pytest
from data_makers import epoch_of, noise_jpeg, write_tar
from native import CC3M_ROWS as ROWS
from native import write_cc3m, write_cc3m_shards

from wlsup.data.conceptual_captions import cc3m_image_name, read_tsv
from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.sources import SourceRequest, load_source
from wlsup.errors import WlsupError


def lay(tmp_path, *arguments, **options):
    return SourceRequest(**write_cc3m(tmp_path, *arguments, **options))


def test_the_rule_for_names_is_the_documented_one():
    url = "http://example.org/größe.jpg"
    digest = hashlib.sha256(url.encode()).hexdigest()
    assert cc3m_image_name(url) == f"{digest[:2]}/{digest[:24]}.jpg" == cc3m_image_name(f" {url}\n")


def test_the_published_tsv_is_read_over_a_folder_a_tar_and_a_prefixed_archive(tmp_path):
    request = lay(tmp_path)
    source = load_source("conceptual_captions", request)
    assert list(source.keys) == sorted(cc3m_image_name(url) for _, url in ROWS) and not source.dropped
    by_key = {cc3m_image_name(url): [caption] for caption, url in ROWS}
    assert [by_key[key] for key in source.keys] == list(source.captions)
    assert source.pictures.read(0).shape == (3, 32, 40)
    files = {f"top/{cc3m_image_name(url)}": noise_jpeg(i) for i, (_, url) in enumerate(ROWS)}
    tar = SourceRequest(request.captions, str(write_tar(tmp_path / "x.tar", files)))
    packed = load_source("conceptual_captions", tar)
    assert list(packed.keys) == list(source.keys) and packed.pictures.read(0).shape == (3, 32, 40)


def test_dead_links_do_not_stop_a_run_and_move_no_other_pair(tmp_path, spec):
    whole = load_source("conceptual_captions", lay(tmp_path))
    settings = {"pairs": 10, "validation_pairs": 4}
    request = lay(tmp_path)
    module = CaptionDataModule("conceptual_captions", request.captions, request.images, **settings, batch_size=5)
    module.image_spec = spec
    kept = {*module.manifest, *(key for batch in module.val_dataloader() for key in batch.keys)}
    outside = [i for i, (_, url) in enumerate(ROWS) if cc3m_image_name(url) not in kept]
    (tmp_path / "lossy").mkdir()
    dead = random.Random(0).sample(outside, 6)
    rows = random.Random(1).sample(ROWS, len(ROWS))
    lossy = lay(tmp_path / "lossy", rows, dead=dead)
    again = CaptionDataModule("conceptual_captions", lossy.captions, lossy.images, **settings, batch_size=5)
    assert again.manifest_sha256 == module.manifest_sha256 and len(whole.keys) == 30
    source = load_source("conceptual_captions", lossy)
    assert len(source.keys) == 24 and any("6 of 30 rows have no picture" in note for note in source.notes)
    assert [len(batch) for batch in epoch_of(module)] == [5, 5]


def test_odd_rows_are_mended_or_counted(tmp_path):
    rows = [*ROWS, ("another caption of 3", ROWS[3][1]), ("  spaced \t out ", ROWS[4][1])]
    tail = (
        b"caf\xe9 bad byte\t"
        + ROWS[5][1].encode()
        + b"\r\n"
        + b"x " * 10_000
        + b"\t"
        + ROWS[6][1].encode()
        + b"\nno url\n\n"
    )
    source = load_source("conceptual_captions", lay(tmp_path, rows, tail=tail))
    captions = dict(zip(source.keys, source.captions, strict=True))
    assert captions[cc3m_image_name(ROWS[3][1])] == ["caption of 3", "another caption of 3"]
    assert captions[cc3m_image_name(ROWS[4][1])] == ["caption of 4", "spaced out"]
    assert captions[cc3m_image_name(ROWS[5][1])][1] == "caf\ufffd bad byte"
    assert len(captions[cc3m_image_name(ROWS[6][1])][1].split()) == 10_000
    assert len(source.keys) == 30 and any("1 lines that are not" in note for note in source.notes)
    assert any("1 captions with bytes that are not utf-8" in note for note in source.notes)


def test_what_is_no_such_tsv_or_has_no_pictures_is_refused(tmp_path):
    request = lay(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WlsupError, match=r"Of 30 rows .* not one has its picture .*wlsup data fetch cc3m"):
        load_source("conceptual_captions", SourceRequest(request.captions, str(tmp_path / "empty")))
    (tmp_path / "x.csv").write_text("image,caption\na.jpg,x\n" * 20)
    with pytest.raises(WlsupError, match="40 of 40 lines are not"):
        load_source("conceptual_captions", SourceRequest(str(tmp_path / "x.csv"), request.images))
    with pytest.raises(WlsupError, match="needs images"):
        load_source("conceptual_captions", SourceRequest(request.captions))


def test_img2dataset_shards_give_the_same_keys_and_captions_as_the_folder(tmp_path):
    folder = load_source("conceptual_captions", lay(tmp_path))
    shards = load_source("conceptual_captions", SourceRequest(**write_cc3m_shards(tmp_path / "shards")))
    assert list(shards.keys) == list(folder.keys) and list(shards.captions) == list(folder.captions)
    for index in (0, 7, 29):
        assert (shards.pictures.read(index) == folder.pictures.read(index)).all()


def test_the_real_validation_tsv_is_read_row_by_row(shared_data):
    path = next((shared_data / "cc3m").glob("*.tsv"))
    lines = path.read_bytes().splitlines()
    texts, digests, malformed, _ = read_tsv(path)
    assert len(texts) + malformed == len(lines) and malformed == 0 and len(digests) == len(texts)
    assert texts[7] == " ".join(lines[7].split(b"\t")[0].decode().split())
    assert digests[7].decode() == hashlib.sha256(lines[7].split(b"\t")[1]).hexdigest()[:24]


def test_a_large_tsv_costs_its_text_and_a_few_bytes_a_row(tmp_path):
    path, rows = tmp_path / "x.tsv", 50_000
    with open(path, "w") as file:
        file.writelines(
            f"a caption of ordinary length about number {i}\thttp://x.example/{i}.jpg\n" for i in range(rows)
        )
    tracemalloc.start()
    texts, _, _, _ = read_tsv(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(texts) == rows and peak / rows < 160  # a list of str would take about 130 for the objects alone
