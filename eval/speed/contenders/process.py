"""The measuring side: starts a contender's process and sends it requests. See `serve` for the other side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pmpd.runtime.errors import PmpdError

__all__ = ["Process", "make_models"]

_SERVE = Path(__file__).with_name("serve.py")


class Process:
    """A contender, loaded and waiting in a process of its own; it computes only while `run` waits for it.

    Args:
        name: what messages call it.
        python: the Python that runs it.
        contender: the file that defines it.
        options: what its `load` or `make` takes.

    Attributes:
        facts: what it says of itself once it is loaded.

    Raises:
        PmpdError: it cannot be started, or cannot load.
    """

    def __init__(
        self, name: str, *, python: str, contender: Path, options: Mapping[str, Any], action: str = "serve"
    ) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, "-P", _SERVE, action, contender, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                encoding="utf-8",
            )
        except OSError as error:
            self._log.close()
            raise PmpdError(f"{name}: cannot run {python} ({error.strerror}): give a Python interpreter") from None
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Its ``other_load`` is the share of all processors' time that other processes used meanwhile, None where the
        system does not tell.

        Raises:
            PmpdError: the contender fails.
        """
        assert self._process.stdin is not None
        begin, busy = time.perf_counter(), _busy_seconds()
        with suppress(BrokenPipeError):  # it ended: what it left behind says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        other_load = None
        if busy is not None:
            available = (time.perf_counter() - begin) * (os.cpu_count() or 1)
            other_load = max(0.0, (_busy_seconds() or busy) - busy - answer["cpu_seconds"]) / available
        return {**answer, "other_load": other_load}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PmpdError(f"{self.name} ended without an answer: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PmpdError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        """Return the last line that the process wrote, or the signal that ended it."""
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"signal {signal.Signals(-code).name}" if code < 0 else lines[-1] if lines else f"exit code {code}"


def _busy_seconds() -> float | None:
    """Return how long all processors together have been at work, or taken away by a hypervisor, since the start."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)
    except OSError:
        return None
    user, nice, system, _idle, _wait, interrupts, soft_interrupts, stolen = map(int, fields[1:9])
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


def make_models(name: str, *, python: str, contender: Path, options: Mapping[str, Any]) -> None:
    """Let a contender make the models it lacks. Raises PmpdError when it cannot."""
    Process(name, python=python, contender=contender, options=options, action="make").close()
