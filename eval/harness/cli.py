"""The command ``pmpd-lm-eval``: lm-evaluation-harness's own command line, which knows the model ``pmpd``.

The harness finds models in a registry that is filled by imports, and imports nothing of other packages by itself.
"""

from __future__ import annotations

import signal
import sys
from typing import ClassVar

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[harness]'`")

from pmpd.runtime.console.command import Command
from pmpd.runtime.errors import PmpdError, one_line

__all__ = ["main"]


class _PassedOn(Command):
    """A command whose options are all another program's."""

    common: ClassVar[tuple[str, ...]] = ()


@click.command(
    "pmpd-lm-eval",
    cls=_PassedOn,
    extra="harness",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(arguments: tuple[str, ...]) -> None:
    """Run `lm-eval` with ARGUMENTS, where `--model pmpd --model_args bundle=DIR,schedule=SPEC` is a bundle."""
    from lm_eval.__main__ import cli_evaluate

    import pmpd.eval.harness.model  # noqa: F401 - registers the model

    # The harness ends the processes that compute its standard errors by this signal: they must not inherit our handler.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except PmpdError:
        raise
    except ImportError as error:  # of a task, so no extra of ours has it
        raise PmpdError(f"a task needs a package that is not installed: {one_line(error)}") from error
