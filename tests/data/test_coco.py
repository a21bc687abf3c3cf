from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from data_makers import epoch_of, noise_jpeg
from native import coco_json, write_coco

from wlsup.data.datamodule import CaptionDataModule
from wlsup.data.sources import SourceRequest, load_source
from wlsup.errors import WlsupError


def lay(tmp_path, *arguments, **options):
    return SourceRequest(**write_coco(tmp_path, *arguments, **options))


@pytest.mark.parametrize("packed", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_coco_is_read_from_folder_or_zip_with_all_captions_of_a_picture(tmp_path, packed):
    source = load_source("coco", lay(tmp_path, packed=packed))
    assert len(source.keys) == 12 and source.keys[0] == "000000000001.jpg" and not source.dropped and not source.notes
    assert source.captions[0] == [f"picture 1 caption {j}" for j in range(5)]
    assert source.pictures.read(3).shape == (3, 32, 40)
    assert list(source.keys) == sorted(source.keys)


def test_the_folder_above_will_do_and_the_order_of_members_does_not_matter(tmp_path):
    document = coco_json()
    request = lay(tmp_path, dict(reversed(document.items())))
    above = SourceRequest(request.captions, str(tmp_path))
    assert list(load_source("coco", above).captions) == list(load_source("coco", request).captions)


def test_coco_trains_and_its_own_validation_set_can_be_held_out(tmp_path, spec):
    request = lay(tmp_path)
    (tmp_path / "val").mkdir()
    held = lay(tmp_path / "val", coco_json(first=1000))
    module = CaptionDataModule(
        "coco",
        request.captions,
        request.images,
        validation_pairs=5,
        batch_size=4,
        source_options={"validation_captions": held.captions, "validation_images": held.images},
    )
    module.image_spec = spec
    batches = epoch_of(module)
    assert sorted(key for b in batches for key in b.keys) == module.manifest and module.pairs == 12
    validation = [key for b in module.val_dataloader() for key in b.keys]
    assert len(validation) == 5 and all(int(key[:12]) >= 1000 for key in validation)
    module = CaptionDataModule(
        "coco", request.captions, request.images, source_options={"validation_captions": request.captions}
    )
    with pytest.raises(WlsupError, match="share 12 pictures"):
        module.setup()


def test_what_is_missing_or_empty_is_named(tmp_path):
    document = coco_json()
    for annotation in document["annotations"]:
        if annotation["image_id"] == 38:
            annotation["caption"] = " \n"
    document["annotations"] += [{"image_id": 9, "id": 1, "caption": "of no picture"}, {"caption": "of none"}]
    source = load_source("coco", lay(tmp_path, document, skip=("000000000075.jpg",)))
    assert source.dropped["000000000038.jpg"] == "no caption" and source.dropped["000000000075.jpg"].startswith(
        "not in"
    )
    assert len(source.keys) == 10
    assert any("2 captions of pictures that are not listed" in note for note in source.notes)
    assert any("5 annotations without a caption" in note for note in source.notes)


def test_other_annotation_files_and_cut_ones_are_refused(tmp_path):
    document = coco_json()
    for annotation in document["annotations"]:
        annotation.pop("caption")
    with pytest.raises(WlsupError, match="lists no captions.*instances"):
        load_source("coco", lay(tmp_path, document))
    request = lay(tmp_path)
    text = Path(request.captions).read_text()
    Path(request.captions).write_text(text[: len(text) // 2])
    with pytest.raises(WlsupError, match="not sound JSON.*Copy or download it again"):
        load_source("coco", request)
    with pytest.raises(WlsupError, match="needs captions .*wlsup data fetch coco"):
        load_source("coco", SourceRequest(images=request.images))


def test_names_may_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(noise_jpeg(1))
    document = coco_json(3)
    document["images"][0]["file_name"] = "../secret.jpg"
    source = load_source("coco", lay(tmp_path, document))
    assert "leads out of" in source.dropped["../secret.jpg"] and len(source.keys) == 2
