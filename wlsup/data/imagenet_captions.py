"""Sources over an ILSVRC folder: `imagenet_captions` (what the photos' authors wrote) and `imagenet_class_names`.

Source: Fang et al. 2022, ImageNet-Captions: Flickr's title, tags and description of 463,622 training photos.

Keys are ``<wnid>/<file name>`` (``n01440764/n01440764_10026.JPEG``), wherever the folder lies.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wlsup.data.captions import clean_caption, stored_source
from wlsup.data.imagenet import class_names_of, is_wnid
from wlsup.data.json_stream import stream_json
from wlsup.data.sources import CaptionSource, SourceRequest, register
from wlsup.data.stores import ImageStore, clean_name, open_store
from wlsup.data.table import resolve_prefix
from wlsup.errors import WlsupError, choose

__all__ = ["FIELDS", "imagenet_captions_source", "imagenet_class_names_source"]

FIELDS = ("title", "tags", "description")
_MARKUP = re.compile(r"<[a-zA-Z/][^<>]*>")


@register("imagenet_captions")
def imagenet_captions_source(
    request: SourceRequest, *, fields: Sequence[str] = ("title", "description"), joining: str | None = ". "
) -> CaptionSource:
    """Read ``imagenet_captions.json``: a list of objects with filename, wnid, title, tags and description.

    HTML that Flickr allows in descriptions is removed; tags are joined by commas.

    Args:
        request: ``captions`` is that file; ``images`` the folder, tar or zip that holds ``<wnid>/<filename>``, or one
            above it (ILSVRC's ``train``, or its parent).
        fields: which of title, tags and description make the caption, in this order.
        joining: what stands between them; None makes each a caption of its own, of which training draws one an epoch.

    Raises:
        WlsupError: if a file is missing or no such JSON, or a field is unknown.
    """
    if request.captions is None or request.images is None:
        raise WlsupError(
            "Source 'imagenet_captions' needs captions (imagenet_captions.json, from `wlsup data fetch "
            "imagenet_captions`) and images (ImageNet's train folder, which must be got by hand)."
        )
    fields = [fields] if isinstance(fields, str) else list(fields)
    for field in fields:
        choose("field of imagenet_captions in source_options.fields:", field, FIELDS)
    if not fields:
        raise WlsupError(f"source_options.fields is empty. Give at least one of {', '.join(FIELDS)}.")
    records: dict[str, list[str]] = {}
    nameless = 0
    for _, element in stream_json(request.captions):
        name, wnid = (element.get(key) if isinstance(element, dict) else None for key in ("filename", "wnid"))
        if not isinstance(name, str) or not isinstance(wnid, str) or not name.strip():
            nameless += 1
            continue
        texts = [text for field in fields if (text := _text(element.get(field)))]
        if texts and joining is not None:
            texts = [clean_caption(_joined(texts, joining))]
        records.setdefault(f"{wnid}/{clean_name(name).rpartition('/')[2]}", []).extend(texts)
    if not records:
        raise WlsupError(
            f"{request.captions} holds no objects with filename and wnid. Give imagenet_captions.json as published."
        )
    notes = [f"{nameless} entries without filename or wnid left out"] if nameless else []
    store = open_store(request.images)
    return stored_source("imagenet_captions", records, store, _prefix(store, list(records)), notes)


@register("imagenet_class_names")
def imagenet_class_names_source(
    request: SourceRequest, *, templates: Sequence[str] = ("a photo of a {}.",), synonyms: bool = False
) -> CaptionSource:
    """Caption ImageNet's photos by their classes' names.

    Args:
        request: ``images`` is a folder, tar or zip of ``<wnid>/*.JPEG``, or one above it; ``captions`` may be a file
            of lines ``<wnid> name, synonym, ...`` (ILSVRC's LOC_synset_mapping.txt); None for WordNet's names.
        templates: each makes a caption, with the name in place of ``{}``.
        synonyms: use every name of a class, not only the first.

    Raises:
        WlsupError: if there are no class folders, a class has no name, or a template no place for it.
    """
    if request.images is None:
        raise WlsupError("Source 'imagenet_class_names' needs images: ImageNet's train folder, got by hand.")
    templates = [templates] if isinstance(templates, str) else list(templates)
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise WlsupError(f"source_options.templates={templates}: give templates with one {{}} each, for the name.")
    store = open_store(request.images)
    found: dict[str, str] = {}
    for name in store.names():
        parts = name.split("/")
        if len(parts) >= 2 and is_wnid(parts[-2]) and "val" not in parts[:-2]:
            found["/".join(parts[-2:])] = name
    if not found:
        raise WlsupError(f"images: {store.path} has no class folders named by wnid, such as n01440764/*.JPEG.")
    wnids = sorted({key.partition("/")[0] for key in found})
    names = class_names_of(wnids, Path(request.captions).expanduser() if request.captions else None)
    captions = {
        wnid: [
            template.replace("{}", name) for name in names[wnid][: None if synonyms else 1] for template in templates
        ]
        for wnid in wnids
    }
    records = {key: captions[key.partition("/")[0]] for key in found}
    prefix = next(iter(found.values())).removesuffix(next(iter(found)))
    return stored_source("imagenet_class_names", records, store, prefix, [])


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(text for item in value if (text := clean_caption(item)))
    return clean_caption(html.unescape(_MARKUP.sub(" ", value))) if isinstance(value, str) else ""


def _joined(texts: Sequence[str], joining: str) -> str:
    """Join, without doubling the joining's full stop after a text that ends in one."""
    mark = joining.strip()
    parts = [text.removesuffix(mark) if mark and text != mark else text for text in texts[:-1]]
    return joining.join([*parts, texts[-1]])


def _prefix(store: ImageStore, names: Sequence[str]) -> str:
    """Find the folder above the class folders: ILSVRC's usual places first, since searching lists everything."""
    for prefix in ("", "train/", "Data/CLS-LOC/train/", "ILSVRC/Data/CLS-LOC/train/"):
        if any(store.exists(prefix + name) for name in names[:50]):
            return prefix
    return resolve_prefix(store, names)
