"""The process in which `run_python` runs a program: a script that imports nothing of ours."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any

__all__ = ["main"]

_FILE_BYTES = 1 << 20  # of each file that a program writes
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
# Audit events of Python, or how they begin.
_NEVER = (
    *("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "os.kill", "os.putenv"),
    *("subprocess.", "pty.", "ctypes.", "socket.", "urllib.", "webbrowser.", "winreg.", "_winapi."),
)
_INSIDE = (
    "shutil.",  # rmtree then removes names that are relative to a folder's descriptor, and they say nothing
    *("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("os.chown", "os.utime", "os.setxattr", "os.removexattr", "sqlite3.connect"),
)


def main() -> None:
    """Read a job from the standard input, run its program, and write what became of it to the standard output."""
    job = json.load(sys.stdin.buffer)
    result = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    _leave_network()
    _set_limits(job["seconds"], job["memory_bytes"])
    _refuse_by_python(os.path.realpath(os.curdir) + os.sep)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    reason = ""
    try:
        exec(compile(job["program"], "<program>", "exec"), namespace)
    except BaseException as error:
        namespace.clear()  # there may be no memory left
        reason = _describe(error, job["program"])
    os.write(result, json.dumps({"token": job["token"], "reason": reason}).encode())
    os._exit(0)  # what the program has registered to be run at its end is not


def _leave_network() -> None:
    """Go where there is no network, if this is a Linux that lets its users do so."""
    if sys.platform != "linux":
        return
    user, group = os.getuid(), os.getgid()
    with suppress(OSError, AttributeError):
        if ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
            # Without a name for its user it could make no files.
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                Path("/proc/self", name).write_text(text, encoding="ascii")


def _set_limits(seconds: float, memory_bytes: int) -> None:
    """Set the limits of the system, where it has them."""
    if sys.platform == "win32":
        return
    import resource

    processor = ceil(seconds) + 1  # the parent's clock comes first
    for name, limit in (
        ("RLIMIT_CPU", processor),
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_FSIZE", _FILE_BYTES),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 0),  # neither threads, but those of the superuser are not counted
    ):
        with suppress(ValueError, OSError, AttributeError):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def _refuse_by_python(folder: str) -> None:
    """Make Python refuse what a program has no business with; `folder`, with a separator at its end, is its own."""

    def inside(path: object) -> bool:
        path = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        return (path + os.sep).startswith(folder) or path == os.devnull

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            refused = bool(flags & _WRITING) and not isinstance(path, int) and not inside(path)
        elif event.startswith(_INSIDE):
            refused = not all(inside(path) for path in arguments if isinstance(path, str | bytes | os.PathLike))
        else:
            refused = event.startswith(_NEVER) and event != "socket.__new__"  # asyncio makes a pair of them
        if refused:
            raise PermissionError(f"{event} is refused in the sandbox")

    sys.addaudithook(hook)


def _describe(error: BaseException, program: str) -> str:
    """Return what went wrong, and in which line of the program."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    lines = program.splitlines()
    numbers = [
        line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<program>"
    ]
    if not numbers:  # a syntax error says itself where it is
        return text
    return f"{text[:200]} (line {numbers[0]}: {lines[numbers[0] - 1].strip()[:100]})"


if __name__ == "__main__":
    main()
