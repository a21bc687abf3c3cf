from __future__ import annotations

import pytest
from native import imagenet_entries, write_imagenet_captions

from wlsup.data.sources import SourceRequest, load_source
from wlsup.errors import WlsupError

ENTRIES = imagenet_entries()


def lay(tmp_path, *arguments, **options):
    return SourceRequest(**write_imagenet_captions(tmp_path, *arguments, **options))


@pytest.mark.parametrize("images", ["train", ""])
def test_imagenet_captions_are_joined_as_asked_over_the_ilsvrc_folder(tmp_path, images):
    request = lay(tmp_path, images=images)
    source = load_source("imagenet_captions", request)
    assert list(source.keys) == sorted(f"{e['wnid']}/{e['filename']}" for e in ENTRIES) and not source.dropped
    assert source.captions[0] == ["my fish 0. caught here & now 5 < 6"]
    assert source.pictures.read(0).shape == (3, 32, 40)
    options = {"fields": ["tags", "title"], "joining": " | "}
    assert load_source("imagenet_captions", request, options).captions[1] == ["lake, tench | my fish 1."]
    options = {"fields": ["title", "tags", "description"], "joining": None}
    assert load_source("imagenet_captions", request, options).captions[1] == [
        "my fish 1.",
        "lake, tench",
        "caught here & now 5 < 6",
    ]


def test_entries_without_text_or_picture_are_named(tmp_path):
    entries = [dict(e) for e in ENTRIES]
    entries[0] |= {"title": "", "description": None}
    entries[1] |= {"filename": "n01440764_99.JPEG"}
    entries.append({"title": "no file"})
    source = load_source("imagenet_captions", lay(tmp_path, entries))
    assert source.dropped["n01440764/n01440764_0.JPEG"] == "no caption"
    assert source.dropped["n01440764/n01440764_99.JPEG"].startswith("not in") and len(source.keys) == 6
    assert any("1 entries without filename" in note for note in source.notes)


def test_an_unknown_field_or_another_file_is_refused(tmp_path):
    request = lay(tmp_path)
    with pytest.raises(WlsupError, match="Unknown field .*'titel'. Did you mean 'title'"):
        load_source("imagenet_captions", request, {"fields": ["titel"]})
    with pytest.raises(WlsupError, match="no objects with filename and wnid"):
        load_source("imagenet_captions", lay(tmp_path, [{"a": 1}]))


def test_class_names_are_captions_too(tmp_path):
    request = SourceRequest(images=str(lay(tmp_path).images))
    source = load_source("imagenet_class_names", request)
    assert len(source.keys) == 8 and source.keys[0] == "n01440764/n01440764_0.JPEG"
    assert source.captions[0] == ["a photo of a tench."]
    options = {"templates": ["a {}.", "the {}."], "synonyms": True}
    assert load_source("imagenet_class_names", request, options).captions[0] == [
        "a tench.",
        "the tench.",
        "a Tinca tinca.",
        "the Tinca tinca.",
    ]
    mapping = tmp_path / "LOC_synset_mapping.txt"
    mapping.write_text("n01440764 trout, brown trout\nn02123045 cat\n")
    named = load_source("imagenet_class_names", SourceRequest(str(mapping), request.images))
    assert named.captions[0] == ["a photo of a trout."] and named.captions[7] == ["a photo of a cat."]
    with pytest.raises(WlsupError, match="one {} each"):
        load_source("imagenet_class_names", request, {"templates": ["a photo"]})
    mapping.write_text("n01440764 trout\n")
    with pytest.raises(WlsupError, match="1 of 2 classes have no name .* 'n02123045'"):
        load_source("imagenet_class_names", SourceRequest(str(mapping), request.images))


def test_validation_pictures_are_not_trained_on(tmp_path):
    request = lay(tmp_path, images="")
    keys = load_source("imagenet_class_names", SourceRequest(images=request.images)).keys
    assert len(keys) == 8 and not [key for key in keys if "val" in key]
