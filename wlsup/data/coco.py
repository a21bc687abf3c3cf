"""Source `coco`: MS-COCO's captions as published, annotation JSON and image folder or zip.

Source: Lin et al. 2014; Chen et al. 2015 (the captions).

Keys are the pictures' file names as the annotations give them (``000000391895.jpg``), which no machine changes.
"""

from __future__ import annotations

from pathlib import Path

from wlsup.data.captions import clean_caption, stored_source
from wlsup.data.json_stream import stream_json
from wlsup.data.sources import CaptionSource, SourceRequest, register
from wlsup.data.stores import clean_name, open_store
from wlsup.data.subset import hash_order
from wlsup.data.table import resolve_prefix
from wlsup.errors import WlsupError

__all__ = ["coco_source"]


@register("coco")
def coco_source(
    request: SourceRequest, *, validation_captions: str | None = None, validation_images: str | None = None
) -> CaptionSource:
    """Read COCO's captions: about five for each picture.

    Args:
        request: ``captions`` is ``captions_train2017.json`` (or any file of that format); ``images`` the folder or zip
            of its pictures, or the folder above.
        validation_captions: ``captions_val2017.json``, to hold out COCO's own validation pictures (of them the
            ``validation_pairs`` first by hash) rather than training ones.
        validation_images: folder or zip of those; None for ``images``.

    Raises:
        WlsupError: if a file is missing, no such JSON, or cut off.
    """
    if request.captions is None or request.images is None:
        raise WlsupError(
            "Source 'coco' needs captions (annotations/captions_train2017.json) and images (the folder train2017 or "
            "train2017.zip). `wlsup data fetch coco` downloads them."
        )
    source = _read(request.captions, request.images)
    if validation_captions is not None:
        held_out = _read(validation_captions, validation_images or request.images)
        keys = sorted(hash_order(held_out.keys, "wlsup validation")[: request.validation_pairs])
        both = sorted(set(keys) & set(source.keys))
        if both:
            raise WlsupError(
                f"{validation_captions} and {request.captions} share {len(both)} pictures, such as {both[0]!r}, so "
                "that training would see what is held out. Give COCO's own two files, or only captions."
            )
        source.validation = held_out.select(keys)
        source.dropped |= held_out.dropped
        source.notes += held_out.notes
    return source


def _read(captions: str, images: str) -> CaptionSource:
    names, texts, without, unknown = _annotations(Path(captions))
    records: dict[str, list[str]] = {}
    for image_id, name in names.items():
        records.setdefault(clean_name(name), []).extend(texts.pop(image_id, []))
    notes = []
    if without:
        notes.append(f"{without} annotations without a caption left out")
    if texts or unknown:
        notes.append(f"{sum(map(len, texts.values())) + unknown} captions of pictures that are not listed left out")
    store = open_store(images)
    return stored_source("coco", records, store, resolve_prefix(store, list(records)), notes)


def _annotations(path: Path) -> tuple[dict[object, str], dict[object, list[str]], int, int]:
    """Return file names and captions by picture id, the number of annotations without text and of those without id."""
    names: dict[object, str] = {}
    texts: dict[object, list[str]] = {}
    without = unknown = captions = 0
    for member, element in stream_json(path):
        if member == "images" and isinstance(element, dict):
            if isinstance(element.get("file_name"), str) and isinstance(element.get("id"), int | str):
                names.setdefault(element["id"], element["file_name"])
        elif member == "annotations" and isinstance(element, dict):
            captions += "caption" in element
            text = clean_caption(element.get("caption"))
            if not text:
                without += 1
            elif isinstance(element.get("image_id"), int | str):
                texts.setdefault(element["image_id"], []).append(text)
            else:
                unknown += 1
    if not names or not captions:
        lacking = "pictures (`images` with id and file_name)" if not names else "captions (`annotations` with caption)"
        raise WlsupError(
            f"{path} lists no {lacking}. Give one of COCO's caption files, such as captions_train2017.json; "
            "instances_*.json and person_keypoints_*.json hold no captions."
        )
    return names, texts, without, unknown
