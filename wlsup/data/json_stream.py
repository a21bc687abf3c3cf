"""Reading large JSON files element by element, so that a file of a million annotations costs one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from wlsup.errors import WlsupError

__all__ = ["stream_json"]

_CHUNK = 1 << 20
_MAX_VALUE = 1 << 28
"""Characters of the largest single value read: one that never ends must not fill the memory."""


def stream_json(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a JSON file's arrays.

    Args:
        path: a file that holds an object, whose members' arrays are gone through one after another, or one array.

    Yields:
        (member, element) for each element of an array, (member, value) for a member that is none; of a file that is
        one array, ("", element).

    Raises:
        WlsupError: if the file is missing or no JSON, or ends too early (its position is named).
    """
    path = Path(path).expanduser()
    try:
        # Undecodable bytes come through as surrogates, to be mended and counted where the text is used.
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            yield from _Reader(path, file).document()
    except FileNotFoundError:
        raise WlsupError(f"No such file: {path}. Looked in {Path.cwd()}; give a path that exists.") from None
    except OSError as error:
        raise WlsupError(f"{path} cannot be read: {error.strerror}. Check the file and its permissions.") from error


class _Reader:
    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.position, self.before, self.ended = "", 0, 0, False
        self.decoder = json.JSONDecoder()

    def document(self) -> Iterator[tuple[str, Any]]:
        opening = self.peek()
        if opening == "[":
            yield from (("", element) for element in self.array())
        elif opening == "{":
            yield from self.members()
        else:
            raise self.broken("neither an object nor an array")
        if self.peek():
            raise self.broken("text after the end")

    def members(self) -> Iterator[tuple[str, Any]]:
        self.position += 1
        if self.peek() == "}":
            self.position += 1
            return
        while True:
            name = self.value()
            if not isinstance(name, str):
                raise self.broken("a member's name is no string")
            self.expect(":")
            if self.peek() == "[":
                yield from ((name, element) for element in self.array())
            else:
                yield name, self.value()
            if self.expect(",}") == "}":
                return

    def array(self) -> Iterator[Any]:
        self.position += 1
        if self.peek() == "]":
            self.position += 1
            return
        while True:
            yield self.value()
            if self.expect(",]") == "]":
                return

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except (ValueError, RecursionError) as error:
                if not self.refill():
                    raise self.broken("it ends too early" if self.ended and self.at_end() else str(error)) from None
                continue
            if not self._may_go_on(value, end) or not self.refill():
                self.position = end
                return value

    def _may_go_on(self, value: Any, end: int) -> bool:
        """Say whether what was read ends in the middle of a number: ``12`` of ``125``, or of ``12.5``."""
        rest = self.text[end : end + 8]
        return (
            isinstance(value, int | float) and end + len(rest) == len(self.text) and not rest.strip("0123456789.eE+-")
        )

    def at_end(self) -> bool:
        return len(self.text) - self.position < _CHUNK and not self.text.rstrip().endswith(("}", "]"))

    def peek(self) -> str:
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.refill():
                return ""

    def expect(self, allowed: str) -> str:
        found = self.peek()
        if not found or found not in allowed:
            raise self.broken("it ends too early" if not found else f"{found!r} instead of {' or '.join(allowed)}")
        self.position += 1
        return found

    def refill(self) -> bool:
        if self.ended or len(self.text) - self.position > _MAX_VALUE:
            return False
        # As much again as is left over, so that a value of n characters is tried log n times.
        more = self.file.read(max(_CHUNK, len(self.text) - self.position))
        if not more:
            self.ended = True
            return False
        self.before += self.position
        self.text, self.position = self.text[self.position :] + more, 0
        return True

    def broken(self, why: str) -> WlsupError:
        return WlsupError(
            f"{self.path} is not sound JSON: {why}, near character {self.before + self.position:,}. "
            "Copy or download it again, and compare its size or checksum with the original's."
        )
