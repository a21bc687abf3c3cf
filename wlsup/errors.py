"""The one error a user meets: what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["WlsupError", "choose"]


class WlsupError(ValueError):
    """A mistake in a user's input; the command line prints its message, without a traceback, and exits with 2."""


def choose(kind: str, given: object, allowed: Iterable[str], hint: str = "") -> str:
    """Return ``given`` if it is one of ``allowed``.

    Args:
        kind: what is being chosen, as the message names it ("approach", "eval set").
        given: the user's value.
        allowed: the valid names; the message lists them in this order.
        hint: what to do about it, appended to the message.

    Raises:
        WlsupError: naming the value, the nearest valid name and all valid names.
    """
    names = list(allowed)
    if isinstance(given, str) and given in names:
        return given
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    tail = f" {hint}" if hint else ""
    raise WlsupError(f"Unknown {kind} {given!r}.{guess} Valid: {', '.join(names) or '(none)'}.{tail}")
