"""Runs a Python program in a process of its own, under limits.

This guards against accidents of code that a model wrote (endless loops, huge lists, files in the wrong place), not
against attackers: a program that means to can get out. Run what you do not trust in a virtual machine.

What holds where:

| | Linux | macOS | Windows |
|---|---|---|---|
| time; no input, output thrown away; an empty folder to work in; almost no environment | yes | yes | yes |
| refused by Python: processes, signals to others, network, changes outside of that folder | yes | yes | yes |
| processor time, size of files (1 MiB each), no core dump | yes | yes | no |
| memory | yes | no (the system ignores it) | no |
| what the program starts is killed with it | yes | yes | no |
| no network at all | where a user may make namespaces | no | no |
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pmpd.runtime.errors import one_line

__all__ = ["Verdict", "run_python"]

_CHILD = Path(__file__).with_name("child.py")
# Alone among packages and paths, as with -I; but the environment is read, for the seed of hashes.
_PYTHON = (sys.executable, "-s", "-S", "-P", "-B")


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end; if not, why, in one line: ``AssertionError (line 9: assert f(2) == 4)``."""

    passed: bool
    reason: str = ""


def run_python(program: str, *, seconds: float = 10.0, memory_bytes: int = 1 << 30) -> Verdict:
    """Run a program that uses nothing but the standard library; it passes if it reaches its end without an exception.

    A program that leaves before, as by ``sys.exit(0)``, does not pass. Hashes have a fixed seed, so that the order of
    sets is the same in each run. Threads are refused where the system counts a user's processes.

    Args:
        program: its text.
        seconds: how long it may run, the start of Python included (0.1 s).
        memory_bytes: how much address space it may have, Python's own included.
    """
    token = secrets.token_hex(16)  # what the child writes at the program's end, and the program does not know
    job = {"program": program, "token": token, "seconds": seconds, "memory_bytes": memory_bytes}
    # Files, no pipes: nobody waits for a reader.
    with (
        tempfile.TemporaryDirectory(prefix="pmpd-sandbox-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as result,
    ):
        source.write(json.dumps(job).encode())
        source.seek(0)
        process = subprocess.Popen(
            [*_PYTHON, str(_CHILD)],
            stdin=source,
            stdout=result,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"ran longer than {seconds:g} s")
        finally:
            _kill(process)
        result.seek(0)
        return _verdict(result.read(4096), token, code)


def _environment(folder: str) -> dict[str, str]:
    environment = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}  # Windows needs it
    return {**environment, "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError, PermissionError):  # the group is gone; macOS says so in the second way
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict(written: bytes, token: str, code: int) -> Verdict:
    try:
        answer = json.loads(written)
        if answer["token"] == token:
            return Verdict(not answer["reason"], one_line(answer["reason"]))
    except (ValueError, TypeError, KeyError):
        pass  # the program ended itself, or has written into the file
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return Verdict(False, f"ended before its end was reached ({how})")
