"""Source `mini`: generated captioned scenes, so that everything runs with nothing to download."""

from __future__ import annotations

from wlsup.data.sources import CaptionSource, MemoryPictures, SourceRequest, register
from wlsup.errors import WlsupError

__all__ = ["MINI_PAIRS", "mini_source"]

MINI_PAIRS = 4000
"""Training pairs generated unless another number is asked for; fewer are the first of more, so subsets are nested."""


@register("mini")
def mini_source(request: SourceRequest, *, scene_seed: int = 0) -> CaptionSource:
    """Generate scenes; the held-out pairs come from their own split.

    Args:
        request: ``pairs`` and ``validation_pairs`` say how many; ``captions`` and ``images`` must not be given.
        scene_seed: another seed gives other scenes.

    Raises:
        WlsupError: if paths are given.
    """
    # Imported on use: the generator is not needed by those who train on files.
    from wlsup.data.mini import mini_captions

    for option in ("captions", "images"):
        given = getattr(request, option)
        if given is not None:
            raise WlsupError(
                f"{option}={given!r} was given with source 'mini', which generates its own. Set source to 'table'."
            )
    train = mini_captions("train", request.pairs or MINI_PAIRS, scene_seed)
    source = CaptionSource("mini", list(train.keys), train.captions, MemoryPictures(train.images))
    if request.validation_pairs:
        held_out = mini_captions("validation", request.validation_pairs, scene_seed)
        source.validation = CaptionSource(
            "mini", list(held_out.keys), held_out.captions, MemoryPictures(held_out.images)
        )
    return source
