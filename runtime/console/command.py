"""The frame of every command: errors and signals become exit codes, messages one line, and logging one format.

A command is declared with ``@click.command(cls=Command, extra="text")``. The frame adds ``-h``, ``-q``, ``-v`` and
``--version``; the command raises `PmpdError` for whatever a user can fix and returns when all went well.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, TypeVar

import click

from pmpd.runtime.console.output import check_writable, write_atomically
from pmpd.runtime.errors import MissingExtraError, PmpdError, one_line, unknown_choice

__all__ = [
    "FAILED",
    "FILE",
    "INTERRUPTED",
    "TERMINATED",
    "USAGE",
    "Command",
    "Failure",
    "Group",
    "Terminated",
    "check_outputs",
    "choose",
    "combine",
    "first_interrupt",
    "is_quiet",
    "json_option",
    "list_option",
    "print_result",
    "warn_unverified",
    "write_result",
]

FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143  # 0 is success; 128 + n is "ended by signal n"
FILE = click.Path(path_type=Path)

_MESSAGE_LIMIT = 1000  # characters; our own messages are shorter, whatever they quote
_LOUDNESS = "pmpd.loudness"
_MOMENT = 0.05  # seconds; long enough for a finalizer or a callback to return
# Packages whose name differs from that of the module.
_DISTRIBUTIONS = {"tvm": "apache-tvm", "rouge_score": "rouge-score", "google": "protobuf"}

Value = TypeVar("Value")
log = logging.getLogger("pmpd")


class Terminated(KeyboardInterrupt):
    """A signal asks the process to end: it cleans up as after an interrupt and exits with 128 + `number`.

    Python drops what is raised in a finalizer or a callback, and so does some C++ code. A request to end that was
    dropped while the command runs is made again, a moment later.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __del__(self) -> None:
        if callable(signal.getsignal(self.number)):  # the command still runs: `_signals` has not put the default back
            main = threading.main_thread().ident
            again = threading.Timer(_MOMENT, signal.pthread_kill, [main, self.number])
            again.daemon = True
            again.start()


class Failure(click.ClickException):
    """The end of a command: a message for stderr and an exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


class Command(click.Command):
    """A command in the frame.

    Args:
        extra: the extra of the package `pmpd` that installs what the command imports.
        interrupted: what to say after SIGINT, SIGTERM or SIGHUP, such as how to resume.
        epilog: examples, each line as typed.
    """

    common: ClassVar[tuple[str, ...]] = ("quiet", "verbose")

    def __init__(
        self,
        *arguments: Any,
        extra: str = "text",
        interrupted: str = "interrupted",
        examples: Sequence[str] = (),
        **options: Any,
    ) -> None:
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
        options["context_settings"] = settings | (options.get("context_settings") or {})
        super().__init__(*arguments, **options)
        self.extra, self.interrupted, self.examples = extra, interrupted, tuple(examples)
        self.params += [_COMMON[name]() for name in self.common]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples below the options."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what a user can fix, a missing package and a signal become `Failure`."""
        if not isinstance(self, Group):
            _start_logging(ctx.meta.get(_LOUDNESS, logging.INFO))
        try:
            return self._run(ctx)
        except PmpdError as error:
            raise Failure(str(error)) from error
        except ImportError as error:
            if error.name is None or error.name.partition(".")[0] == "pmpd":
                raise
            raise Failure(str(MissingExtraError(_DISTRIBUTIONS.get(error.name, error.name), self.extra))) from error
        except MemoryError as error:
            raise Failure("not enough memory: close other programs, or take a smaller model or context") from error
        except OSError as error:
            raise Failure(*_os_error(error)) from error

    def _run(self, ctx: click.Context) -> Any:
        """Run the command; an interrupt becomes `Failure`, also where a library made another error of it."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, Exception) as error:
            interrupt: BaseException | None = error
            while interrupt is not None and not isinstance(interrupt, KeyboardInterrupt):
                interrupt = interrupt.__cause__ or interrupt.__context__
            if interrupt is None:
                raise
            code = 128 + interrupt.number if isinstance(interrupt, Terminated) else INTERRUPTED
            raise Failure(self.interrupted, code) from error

    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run the command line; in standalone mode, end the process with its exit code."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*arguments, standalone_mode=False, **options)
        try:
            with _signals():
                code = run(*arguments, standalone_mode=False, **options)
        except Failure as error:
            code = _report(error.message, error.code)
        except click.UsageError as error:
            code = _report(_usage(error, self.name), USAGE)
        except click.ClickException as error:
            code = _report(error.format_message(), error.exit_code)
        except click.Abort:
            code = _report(self.interrupted, INTERRUPTED)
        except OSError as error:  # the help could not be printed
            code = _report(*_os_error(error))
        sys.exit(code if isinstance(code, int) else 0)


class Group(Command, click.Group):
    """A group of commands, one of which may be the default: an argument that names no command goes to that one.

    Args:
        default: the name of the default command.
        route: returns the arguments with the name of the command in front; default: that of `default`.
    """

    common: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *arguments: Any,
        default: str | None = None,
        route: Callable[[list[str]], list[str]] | None = None,
        **options: Any,
    ) -> None:
        if default is not None:
            options.setdefault("options_metavar", "[COMMAND]")
            options.setdefault("subcommand_metavar", "[OPTIONS] ...")
        super().__init__(*arguments, **options)
        self.default = default
        self.route = route or (lambda words: [str(default), *words])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the name of the default command in front where no command is named."""
        flags = {flag for param in self.get_params(ctx) for flag in param.opts}
        if self.default is not None and (not args or (args[0] not in self.commands and args[0] not in flags)):
            args = self.route(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order in which they were declared."""
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options and commands, and the options of the default command."""
        super().format_options(ctx, formatter)
        if self.default is not None:
            command = self.commands[self.default]
            context = click.Context(command, info_name=self.default, parent=ctx)
            options = [param for param in command.get_params(context) if isinstance(param, click.Option)]
            records = [record for option in options if (record := option.get_help_record(context))]
            with formatter.section(f"Options of {self.default}, the default command"):
                formatter.write_dl(records)


def _loudness_option(*flags: str, level: int, help: str) -> click.Option:
    def set_level(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value:
            context.meta[_LOUDNESS] = level

    return click.Option(flags, is_flag=True, expose_value=False, callback=set_level, help=help)


_COMMON: Mapping[str, Callable[[], click.Option]] = {
    "quiet": lambda: _loudness_option(
        "-q", "--quiet", level=logging.ERROR, help="Print only the result: no progress, no notes, no warnings."
    ),
    "verbose": lambda: _loudness_option("-v", "--verbose", level=logging.DEBUG, help="Print more details."),
}


def is_quiet() -> bool:
    """Whether the command that runs was given ``--quiet``."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(_LOUDNESS) == logging.ERROR


def combine(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return one decorator for several options that commands share; the help lists them in this order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def list_option(*flags: str, **options: Any) -> Callable[[Any], Any]:
    """Return an option for several values: repeatable, and each value may be a list like ``int8,exact``."""

    def split(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for value in values for name in value.split(",")))

    return click.option(*flags, multiple=True, callback=split, **options)


def choose(names: Iterable[str], what: str, choices: Iterable[Value]) -> tuple[Value, ...]:
    """Return the choices of these names, in the type of the choices.

    Raises:
        PmpdError: a name is not among the choices.
    """
    known = {str(choice): choice for choice in choices}
    names = tuple(names)
    for name in names:
        if name not in known:
            raise PmpdError(unknown_choice(what, name, known))
    return tuple(known[name] for name in names)


def json_option(what: str = "all results") -> Callable[[Any], Any]:
    """Return the option ``--json FILE``; ``-`` is standard output."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(path_type=Path, allow_dash=True),
        metavar="FILE",
        help=f"Write {what} as JSON; - prints JSON instead of text.",
    )


def check_outputs(*files: Path | None) -> None:
    """Check before hours of work that results can be written. Raises PmpdError if not."""
    for file in files:
        if file is not None and str(file) != "-":
            check_writable(file)


def print_result(text: str, json_file: Path | None, json: Callable[[], str]) -> None:
    """Print a result as text and write it as JSON where asked; with ``--json -`` print the JSON alone."""
    if json_file is not None and str(json_file) == "-":
        click.echo(json(), nl=False)
        return
    click.echo(text)
    write_result(json_file, json)


def write_result(path: Path | None, content: Callable[[], str | bytes]) -> None:
    """Write a file in one step where a path is given, and say so."""
    if path is not None:
        write_atomically(path, content())
        log.info("wrote %s", path)


def warn_unverified(path: Path, *, verified: bool) -> None:
    """Warn about a bundle whose export skipped its checks (``--no-verify``)."""
    if not verified:
        log.warning("%s is an unverified bundle (exported with --no-verify): its answers may be wrong", path)


class _StderrHandler(logging.Handler):
    """Logs to the `sys.stderr` of the moment, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if record.levelno >= logging.WARNING:
            line = f"{record.levelname.lower()}: {line}"
        with _bars_aside():
            click.echo(line, err=True)


def _bars_aside() -> Any:
    tqdm = sys.modules.get("tqdm")
    return nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(file=sys.stderr)


def _start_logging(level: int) -> None:
    """Send log records to stderr: ours from `level` on, those of other packages if they are warnings."""
    root = logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        root.addHandler(_StderrHandler())
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger("pmpd").setLevel(level)


@contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP run the clean-up of an interrupt; a signal that the parent ignores stays ignored."""

    def terminate(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def first_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C only be noted, and yield whether it was; the next ends the command, as it does outside.

    A noted interrupt raises nothing, so nothing that runs is left half done: ask for it between two steps.
    """
    noted = False

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal noted
        noted = True
        signal.signal(number, signal.default_int_handler)

    handles = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not if the parent ignores it
    if handles:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        if handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _usage(error: click.UsageError, name: str | None) -> str:
    message = one_line(error.format_message(), _MESSAGE_LIMIT).rstrip(".")
    command = name if error.ctx is None else error.ctx.command_path
    return f"{message[:1].lower()}{message[1:]} (see `{command} --help`)"


def _os_error(error: OSError) -> tuple[str, int]:
    """Return message and exit code. A reader that closed the pipe is no failure to report: click ends quietly."""
    if error.errno == errno.EPIPE:
        raise error
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}", FAILED
    return f"cannot write the output: {reason}", FAILED


def _report(message: str, code: int) -> int:
    _abandon_output()
    click.echo(f"error: {one_line(message, _MESSAGE_LIMIT)}", err=True)
    return code


def _abandon_output() -> None:
    """Flush standard output; if it cannot be written, let nothing be written to it when Python exits."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
