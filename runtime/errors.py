"""User errors, and how foreign text gets into their messages: always as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BundleError",
    "ContextLengthError",
    "KernelError",
    "MissingExtraError",
    "PmpdError",
    "one_line",
    "unknown_choice",
]


class PmpdError(Exception):
    """A user error: the message says what, which value, where, and how to fix it, in one line."""


class BundleError(PmpdError):
    """A bundle that is missing, damaged, unsafe or of a version this runtime does not read."""


class ContextLengthError(PmpdError):
    """More tokens than the KV cache has room for."""


class KernelError(PmpdError):
    """No kernels, or only slow ones, for a bundle on this machine."""


class MissingExtraError(PmpdError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: run `pip install 'pmpd[{extra}]'`")


def one_line(text: object, limit: int = 300) -> str:
    """Return foreign text as part of a message: one line of at most `limit` printable characters.

    Other libraries' messages, names read from files and whatever a user typed may hold line breaks, terminal control
    characters, lone surrogates or a megabyte. Runs of white space and control characters become one space; a text that
    is too long loses its middle, because both ends tell most.
    """
    visible = "".join(character if character.isprintable() else " " for character in str(text))
    line = " ".join(visible.split())
    if len(line) <= limit:
        return line
    tail = limit // 3
    return f"{line[: limit - tail - 3]} … {line[len(line) - tail :]}"


def unknown_choice(what: str, value: object, choices: Iterable[object]) -> str:
    """Return `unknown <what> '<value>'` with the list of choices, the nearest first."""
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value)[:100], names, n=max(len(names), 1), cutoff=0.4)
    ordered = near + [name for name in names if name not in near]
    return f"unknown {what} '{one_line(value, 100)}': choose one of {', '.join(ordered)}"
