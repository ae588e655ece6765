"""The frame of all commands: exit codes, messages, signals, logging, and the options that every command has."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from pmpd.runtime.console.command import (
    Command,
    Group,
    choose,
    json_option,
    list_option,
    print_result,
    warn_unverified,
)
from pmpd.runtime.errors import MissingExtraError, PmpdError

COMMANDS = (
    "runtime.cli",
    "exporter.cli",
    "eval.cli",
    "npu_backend.cli",
    "tvm_kernels.tuning.cli",
    "tvm_kernels.bench.cli",
    "exporter.demo.train",
)


def run(command: click.Command, *arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments), prog_name=command.name)


def raising(error: BaseException) -> click.Command:
    @click.command("tool", cls=Command, extra="npu", interrupted="interrupted: run again to resume")
    def tool() -> None:
        raise error

    return tool


def module_missing(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PmpdError("bits 9: choose 1 to 8"), 1, "bits 9: choose 1 to 8"),
        (PmpdError("several\nlines\x1b[31m"), 1, "several lines [31m"),
        (MissingExtraError("onnxruntime", "cpu"), 1, "onnxruntime is not installed: run `pip install 'pmpd[cpu]'`"),
        (module_missing("onnx"), 1, "onnx is not installed: run `pip install 'pmpd[npu]'`"),
        (module_missing("tvm"), 1, "apache-tvm is not installed: run `pip install 'pmpd[npu]'`"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot write the output: No space left on device"),
        (OSError(errno.ENOENT, "No such file", "x.txt"), 1, "x.txt: No such file"),
        (MemoryError(), 1, "not enough memory: close other programs, or take a smaller model or context"),
        (KeyboardInterrupt(), 130, "interrupted: run again to resume"),
        (click.UsageError("--a and --b exclude each other."), 2, "--a and --b exclude each other (see `tool --help`)"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(error: BaseException, code: int, message: str) -> None:
    result = run(raising(error))
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"error: {message}\n")


def test_a_message_is_never_long() -> None:
    assert len(run(raising(PmpdError("x" * 100_000))).stderr) < 1100


@pytest.mark.parametrize("error", [ValueError("a bug"), module_missing("pmpd.nowhere")])
def test_a_bug_is_no_user_error(error: Exception) -> None:
    assert run(raising(error)).exception is error


@click.command("tool", cls=Command)
@list_option("--name", "names", default=["a,b"], show_default=True)
@json_option()
def shows(names: tuple[str, ...], json_file: Path | None) -> None:
    """Print names."""
    logging.getLogger("pmpd.somewhere").debug("detail")
    logging.getLogger("pmpd.somewhere").info("note")
    logging.getLogger("pmpd.somewhere").warning("slow")
    logging.getLogger("other").info("chatter")
    logging.getLogger("other").warning("deprecated")
    print_result(" ".join(names), json_file, lambda: '"json"\n')


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        ([], ["note", "warning: slow", "warning: deprecated"]),
        (["-q"], []),
        (["--quiet"], []),
        (["-v"], ["detail", "note", "warning: slow", "warning: deprecated"]),
    ],
)
def test_loudness(flags: list[str], lines: list[str]) -> None:
    result = run(shows, *flags)
    assert result.stderr.splitlines() == lines
    assert result.stdout == "a b\n"


def test_lists_are_repeatable_and_take_commas() -> None:
    assert run(shows, "-q", "--name", "c,d", "--name", "e", "--name", "c").stdout == "c d e\n"
    assert choose(("2", "1"), "number", range(3)) == (2, 1)
    with pytest.raises(PmpdError, match="unknown number '9': choose one of 0, 1, 2"):
        choose(("9",), "number", range(3))


def test_json_goes_to_a_file_or_stands_alone_on_stdout(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    result = run(shows, "--json", str(file))
    assert (result.stdout, file.read_text()) == ("a b\n", '"json"\n')
    assert f"wrote {file}" in result.stderr
    assert run(shows, "--json", "-").stdout == '"json"\n'


def test_a_group_has_a_default_command() -> None:
    @click.group("tool", cls=Group, default="first")
    def tool() -> None:
        """A tool."""

    @tool.command(cls=Command)
    @click.argument("word")
    def first(word: str) -> None:
        """Say a word."""
        click.echo(f"first {word}")

    @tool.command(cls=Command)
    def second() -> None:
        """Fail."""
        raise PmpdError("second fails")

    assert run(tool, "word").stdout == run(tool, "first", "word").stdout == "first word\n"
    assert run(tool, "second").stderr == "error: second fails\n"
    assert run(tool).stderr == "error: missing argument 'WORD' (see `tool first --help`)\n"
    assert run(tool, "word", "-x").stderr.startswith("error: no such option")
    text = run(tool, "--help").stdout
    assert "Say a word." in text
    assert "Options of first, the default command:" in text


def test_an_unverified_bundle_is_named(caplog: pytest.LogCaptureFixture) -> None:
    warn_unverified(Path("good"), verified=True)
    warn_unverified(Path("bad"), verified=False)
    (message,) = caplog.messages
    assert message.startswith("bad is an unverified bundle (exported with --no-verify)")


WAITING = """
import sys, time, click
from pmpd.runtime.console.command import Command

@click.command("tool", cls=Command, interrupted="interrupted: run again to resume")
def tool():
    try:
        click.echo("ready")
        time.sleep(60)
    finally:
        click.echo("cleaned up")

tool()
"""


def start_waiting(*, ignore: signal.Signals | None = None, program: str = WAITING) -> subprocess.Popen[str]:
    def prepare() -> None:
        if ignore is not None:
            signal.signal(ignore, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=prepare
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.interruptible
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cleans_up_and_says_how_to_resume(number: signal.Signals) -> None:
    with start_waiting() as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (out, err) == ("cleaned up\n", "error: interrupted: run again to resume\n")
    assert process.returncode == 128 + number


@pytest.mark.interruptible
def test_a_signal_that_arrives_in_a_finalizer_is_not_lost() -> None:
    """Python drops what is raised in a finalizer: torch's first steps have many, and a training went on for ever."""
    in_finalizer = "type('Slow', (), {'__del__': lambda self: (print('ready', flush=True), time.sleep(60))})()"
    with start_waiting(program=WAITING.replace('click.echo("ready")', in_finalizer)) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, "cleaned up\n")
    assert err.splitlines()[-1] == "error: interrupted: run again to resume"


NOTING = """
import time, click
from pmpd.runtime.console.command import Command, first_interrupt

@click.command("tool", cls=Command)
def tool():
    with first_interrupt() as interrupted:
        click.echo("ready")
        while not interrupted():
            time.sleep(0.01)
        click.echo("noted")
        STAY
    click.echo("left")
    time.sleep(60)

tool([])
"""


@pytest.mark.interruptible
@pytest.mark.parametrize(("stay", "then"), [("time.sleep(60)", "noted\n"), ("pass", "noted\nleft\n")])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_may_be_noted_and_the_second_ends(stay: str, then: str, second: signal.Signals) -> None:
    with start_waiting(program=NOTING.replace("STAY", stay)) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        for line in then.splitlines(keepends=True):
            assert process.stdout.readline() == line
        process.send_signal(second)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + second, "", "error: interrupted\n")


@pytest.mark.interruptible
def test_an_ignored_ctrl_c_is_not_noted() -> None:
    with start_waiting(ignore=signal.SIGINT, program=NOTING.replace("STAY", "pass")) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        out, _err = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, "")


def test_an_interrupt_that_a_library_makes_an_error_of_is_an_interrupt() -> None:
    """Code that is interrupted while it restores its own state fails in its own way (torch's vmap does)."""

    @click.command("tool", cls=Command, interrupted="interrupted: run again to resume")
    def tool() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("stack is empty")

    result = run(tool)
    assert (result.exit_code, result.stderr) == (130, "error: interrupted: run again to resume\n")


@pytest.mark.interruptible
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_parent_ignores_stays_ignored(number: signal.Signals) -> None:
    """A Ctrl-C meant for a script does not reach what the script runs in the background; SIGTERM still ends it."""
    with start_waiting(ignore=number) as process:
        process.send_signal(number)
        process.send_signal(signal.SIGTERM)
        _out, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err == "error: interrupted: run again to resume\n"


def command_of(module: str) -> Any:
    return importlib.import_module(f"pmpd.{module}").main


def leaves(command: click.Command) -> list[click.Command]:
    return (
        [leaf for sub in command.commands.values() for leaf in leaves(sub)] if isinstance(command, Group) else [command]
    )


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_is_in_the_frame(module: str) -> None:
    if module == "tvm_kernels.bench.cli":
        pytest.importorskip("tvm")
    command = command_of(module)
    result = run(command, "-h")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: {command.name} ")
    assert re.fullmatch(rf"{command.name}, version \d+\.\d+.*\n", run(command, "--version").stdout)
    for leaf in leaves(command):
        assert isinstance(leaf, Command)
        flags = {flag for param in leaf.params for flag in param.opts}
        assert {"-q", "--quiet", "-v", "--verbose"} <= flags
        assert "--json" in flags or module == "exporter.demo.train"
        for param in leaf.params:
            if isinstance(param, click.Option):
                assert param.help, f"{leaf.name} {param.opts[0]} has no help"
    wrong = run(command, "--no-such-option")
    assert (wrong.exit_code, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert wrong.stderr.startswith("error: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_help_that_cannot_be_written() -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "pmpd.runtime.cli", "--help"]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, timeout=60)
    assert process.returncode == 1
    assert process.stderr == f"error: cannot write the output: {os.strerror(errno.ENOSPC)}\n".encode()
