"""Which pairs: subsets and splits by a hash of the key, the same on every machine, nested, and stable under loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from wlsup.errors import WlsupError

__all__ = ["hash_order", "manifest_sha256", "split_by_hash", "write_manifest"]


def hash_order(keys: Iterable[str], salt: str) -> list[str]:
    """Return the keys sorted by SHA-256 of salt and key: a fixed shuffle that no listing order can change."""

    def digest(key: str) -> bytes:
        return hashlib.sha256(f"{salt}\0{key}".encode("utf-8", "surrogatepass")).digest()

    return sorted(keys, key=digest)


def split_by_hash(
    keys: Sequence[str],
    pairs: int | None,
    validation: int,
    options: tuple[str, str] = ("pairs", "validation_pairs"),
) -> tuple[list[str], list[str]]:
    """Choose the held-out keys, then the training keys from the rest.

    The held-out keys are the first ``validation`` in one hash order, and the training keys the first ``pairs`` of the
    others in a second, independent one. With the same ``validation``, a larger ``pairs`` therefore contains a smaller
    one; and a key that disappears changes a subset only if it was in it (its place goes to the next in hash order).

    Args:
        keys: distinct keys in any order.
        pairs: size of the training subset; None for all that are not held out.
        validation: number of keys held out.
        options: the settings that gave ``pairs`` and ``validation``, as messages name them.

    Returns:
        (training keys, held-out keys), each sorted by name.

    Raises:
        WlsupError: if there are too few keys.
    """
    size, held = options
    if validation < 0 or (pairs is not None and pairs < 1):
        raise WlsupError(f"{size}={pairs}, {held}={validation}: give {size} >= 1 (or none, for all) and {held} >= 0.")
    if validation >= len(keys):
        raise WlsupError(
            f"{held}={validation}, but the source has only {len(keys)} usable keys. "
            f"Set {held} below {len(keys)}, or check the source."
        )
    held_out = hash_order(keys, "wlsup validation")[:validation]
    rest = hash_order(set(keys).difference(held_out), "wlsup pairs")
    if pairs is not None and pairs > len(rest):
        raise WlsupError(
            f"{size}={pairs}, but the source has {len(keys)} usable keys, of which {validation} are held out. "
            f"Set {size} to at most {len(rest)}, or leave it unset to use them all."
        )
    return sorted(rest[:pairs]), sorted(held_out)


def manifest_sha256(keys: Iterable[str]) -> str:
    """Return the SHA-256 of a manifest: the sorted keys, one a line."""
    return hashlib.sha256(_manifest(keys)).hexdigest()


def write_manifest(path: str | Path, keys: Iterable[str]) -> str:
    """Write the sorted keys, one a line, and return their `manifest_sha256` (which `sha256sum` also prints)."""
    content = _manifest(keys)
    Path(path).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _manifest(keys: Iterable[str]) -> bytes:
    return "".join(f"{key}\n" for key in sorted(keys)).encode("utf-8", "surrogatepass")
