"""The errors a user of PMPD can cause, each one clear line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["BundleError", "ContextLengthError", "KernelError", "MissingExtraError", "PmpdError", "unknown_choice"]


class PmpdError(Exception):
    """Something the user can mend: the message says what, which value, where, and what to do."""


class BundleError(PmpdError):
    """A bundle that is missing, damaged, unsafe or of a version this runtime does not read."""


class ContextLengthError(PmpdError):
    """More tokens than the KV cache has room for."""


class KernelError(PmpdError):
    """There are no kernels, or none that are fast, for a bundle on this machine."""


class MissingExtraError(PmpdError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: run `pip install 'pmpd[{extra}]'`")


def unknown_choice(what: str, value: object, choices: Iterable[object]) -> str:
    """Return `unknown <what> '<value>'` with the list of choices, the nearest first."""
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), names, n=len(names), cutoff=0.4)
    ordered = near + [name for name in names if name not in near]
    return f"unknown {what} '{value}': choose one of {', '.join(ordered)}"
