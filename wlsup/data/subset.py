"""Which pairs: subsets and splits by a hash of the key, the same on every machine, nested, and stable under loss."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from wlsup.errors import WlsupError
from wlsup.files import written_whole

__all__ = [
    "hash_order",
    "hash_positions",
    "manifest_sha256",
    "read_manifest",
    "split_by_hash",
    "split_positions",
    "write_manifest",
]


def hash_order(keys: Iterable[str], salt: str) -> list[str]:
    """Return the keys sorted by SHA-256 of salt and key: a fixed shuffle that no listing order can change."""
    keys = list(keys)
    return [keys[position] for position in hash_positions(keys, salt)]


def hash_positions(keys: Iterable[str], salt: str) -> np.ndarray:
    """Return the (n,) int64 positions of the keys in their `hash_order`."""
    heads = bytearray()
    for key in keys:
        heads += hashlib.sha256(f"{salt}\0{key}".encode("utf-8", "surrogatepass")).digest()[:16]
    # The first 16 of 32 bytes order the keys as all do, unless two of them agree in 128 bits.
    high, low = np.frombuffer(heads, ">u8").reshape(-1, 2).T
    return np.lexsort((low, high))


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
    train, held_out = split_positions(keys, pairs, validation, options)
    return [keys[position] for position in train], [keys[position] for position in held_out]


def split_positions(
    keys: Sequence[str],
    pairs: int | None,
    validation: int,
    options: tuple[str, str] = ("pairs", "validation_pairs"),
    fixed: Collection[str] | None = None,
) -> tuple[list[int], list[int]]:
    """Choose as `split_by_hash` does; arguments likewise.

    Args:
        keys: see there.
        pairs: see there; of no account if ``fixed`` is given.
        validation: see there.
        options: see there.
        fixed: the training keys, of a manifest; those that are not among ``keys`` are left out, and none is held out.

    Returns:
        (positions of the training keys, positions of the held-out keys), each sorted by key.

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
    free = np.arange(len(keys))
    chosen = None
    if fixed is not None:
        fixed = set(fixed)
        is_fixed = np.fromiter((key in fixed for key in keys), bool, len(keys))
        free, chosen = np.flatnonzero(~is_fixed), np.flatnonzero(is_fixed)
        if validation > len(free):
            raise WlsupError(
                f"{held}={validation}, but beside the manifest's keys the source has only {len(free)}. "
                f"Set {held} to at most {len(free)}."
            )
    order = free[hash_positions(_At(keys, free), "wlsup validation")]
    held_out, rest = order[:validation], np.sort(order[validation:])
    if chosen is None:
        if pairs is not None and pairs > len(rest):
            raise WlsupError(
                f"{size}={pairs}, but the source has {len(keys)} usable keys, of which {validation} are held out. "
                f"Set {size} to at most {len(rest)}, or to null to use them all (--data.{size} null)."
            )
        chosen = rest if pairs is None else rest[hash_positions(_At(keys, rest), "wlsup pairs")][:pairs]
    return _by_key(keys, chosen), _by_key(keys, held_out)


def _by_key(keys: Sequence[str], positions: np.ndarray) -> list[int]:
    return sorted(positions.tolist(), key=keys.__getitem__)


class _At:
    """The keys at some positions, made when asked for: of three million none need be kept."""

    def __init__(self, keys: Sequence[str], positions: np.ndarray) -> None:
        self.keys, self.positions = keys, positions

    def __iter__(self) -> Iterator[str]:
        return (self.keys[position] for position in self.positions)


def manifest_sha256(keys: Iterable[str]) -> str:
    """Return the SHA-256 of a manifest: the sorted keys, one a line."""
    return hashlib.sha256(_manifest(keys)).hexdigest()


def write_manifest(path: str | Path, keys: Iterable[str]) -> str:
    """Write the sorted keys, one a line, and return their `manifest_sha256` (which `sha256sum` also prints)."""
    content = _manifest(keys)
    with written_whole(Path(path)) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def read_manifest(path: str | Path) -> list[str]:
    """Read the keys that `write_manifest` wrote.

    Raises:
        WlsupError: if the file is missing, empty, cut off in mid-line, or names a key twice.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WlsupError(f"manifest {path} cannot be read: {error.strerror}. Give a run's manifest.txt.") from None
    keys = content.decode("utf-8", "surrogatepass").split("\n") if content else [""]
    if keys.pop():
        raise WlsupError(f"manifest {path} does not end with a line end: it is cut off. Copy it again.")
    if not keys or not all(keys):
        raise WlsupError(f"manifest {path} is empty or has an empty line. It must hold one key a line.")
    if len(set(keys)) != len(keys):
        raise WlsupError(f"manifest {path} names {len(keys) - len(set(keys))} keys twice. It must hold each key once.")
    return keys


def _manifest(keys: Iterable[str]) -> bytes:
    return "".join(f"{key}\n" for key in sorted(keys)).encode("utf-8", "surrogatepass")
