"""A node's own copy of a folder of shards, where a job's script has made one; options name the shared folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

__all__ = ["MARK", "STAGED", "staged"]

STAGED = "WLSUP_STAGED"
"""The environment's variable that names the copy's folder; it may be there on some nodes only."""

MARK = ".wlsup-staged"
"""The file in a whole, verified copy that names the folder it is of; ``cluster/stage.sh`` writes it last."""

_log = logging.getLogger("wlsup.data")


def staged(folder: Path) -> Path:
    """Return this node's copy of ``folder`` if there is a whole one, else ``folder``.

    Args:
        folder: of the shards, on the shared file system.
    """
    copy = Path(os.environ.get(STAGED, ""))
    if not os.environ.get(STAGED) or not folder.is_dir():
        return folder
    try:
        source = (copy / MARK).read_text(encoding="utf-8").splitlines()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        _log.warning("no whole copy of the shards in %s on this node: they are read from %s", copy, folder)
        return folder
    if Path(source) != folder.resolve():
        return folder  # the copy is of other shards
    _log.info("shards are read from this node's copy, %s", copy)
    return copy
