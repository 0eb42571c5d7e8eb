"""Errors and remarks of the reader. They name its options, and each caller spells these as its users write them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

OPTION, VALUE = "\x1e", "\x1f"  # the record and unit separators of ASCII


def option(name: str, *values: str) -> str:
    """Return an option for a message, such as ``missing`` with the values "-999" and "closed"; see ``spelled``."""
    return OPTION + VALUE.join([name, *values]) + OPTION


NO_TIME, COLUMN = option("time", "none"), option("column")


def choice(name: str, values: Sequence[str]) -> str:
    """Return the options for a choice of values, such as ``--sheet A or --sheet B``."""
    return " or ".join(option(name, value) for value in values)


def flag(name: str, *values: str) -> str:
    """Spell an option for the command line, such as ``--missing -999 closed``."""
    return shlex.join([f"--{name.replace('_', '-')}", *values])


def spelled(message: str, spell: Callable[..., str] = flag) -> str:
    """Return a message in which ``spell(name, *values)`` replaces each option."""
    parts = message.split(OPTION)
    parts[1::2] = [spell(*part.split(VALUE)) for part in parts[1::2]]
    return "".join(parts)


class TableError(ValueError):
    """The table cannot be read, or is ambiguous. The message names the option that resolves the ambiguity."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(spelled(message))

    @property
    def option(self) -> str | None:
        """The name of the first option in the message."""
        _, *found = self.message.split(OPTION)
        return found[0].split(VALUE)[0] if found else None
