"""What the commands of this package share: errors as one line, and lists as options."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from pmpd.runtime.errors import MissingExtraError, PmpdError, unknown_choice
from pmpd.tvm_kernels.targets import Target, find_target, host_target

__all__ = ["local_target", "read_list", "user_errors"]


@contextmanager
def user_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """Leave the program with one line for what a user can mend: status 1, or 130 when interrupted."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = "apache-tvm" if error.name == "tvm" else str(error.name)
        message, status = str(MissingExtraError(missing, "tune")), 1
    except (PmpdError, OSError) as error:
        message, status = str(error), 1
    except KeyboardInterrupt:
        message, status = interrupted, 130
    else:
        return
    click.echo(f"error: {message}", err=True)
    sys.exit(status)


def read_list(value: str, what: str, choices: Iterable[object]) -> tuple[Any, ...]:
    """Read a list like ``int8,exact``, in the type of the choices.

    Raises:
        PmpdError: something is not among the choices.
    """
    known = {str(choice): choice for choice in choices}
    names = tuple(dict.fromkeys(value.split(",")))
    for name in names:
        if name not in known:
            raise PmpdError(unknown_choice(what, name, known))
    return tuple(known[name] for name in names)


def local_target() -> Target:
    """Return the target of this machine.

    Raises:
        PmpdError: there is none.
    """
    name = host_target()
    if name is None:
        raise PmpdError("no operator library is made for this machine, so there are no kernels to time")
    return find_target(name)
