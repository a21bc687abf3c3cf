"""Options of the commands that need no recipe, with argparse's complaints in one message of ours."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from wlsup.errors import WlsupError

__all__ = ["CommandParser", "given_numbers"]


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose mistakes are a `WlsupError`; the help is the command's own.

    Args:
        command: as typed after ``wlsup``.
        help_command: whose help lists the options; None for ``command``.
    """

    def __init__(self, command: str, help_command: str | None = None) -> None:
        super().__init__(prog=f"wlsup {command}", add_help=False, allow_abbrev=False)
        self.help_command = help_command or command

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise WlsupError(f"{self.prog}: {message}. `wlsup {self.help_command} --help` lists the options.")


def given_numbers(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those of the options that were given; each must be a positive number, or, of some, 0.

    Raises:
        WlsupError: naming the option.
    """
    chosen = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name, value in chosen.items():
        may_be_none = name in ("retries", "workers")
        if value < 0 or (value == 0 and not may_be_none):
            allowed = "0 or a positive number" if may_be_none else "a positive number"
            raise WlsupError(f"--{name.replace('_', '-')} {value}: give {allowed}.")
    return chosen
