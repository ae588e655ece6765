"""Progress of long steps on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO, TypeVar

__all__ = ["track"]

Item = TypeVar("Item")
_BAR = 24
_LINE_EVERY = 15.0  # seconds between lines when stderr is no terminal


def track(items: Sequence[Item] | Iterable[Item], *, step: str, total: int, quiet: bool = False) -> Iterator[Item]:
    """Yield the items, showing how many of `total` are done, the rate and the time left."""
    out = sys.stderr
    begin = shown = time.monotonic()
    terminal = out.isatty()
    done = 0
    try:
        for item in items:
            if not quiet and terminal:
                _bar(out, step, done, total, time.monotonic() - begin)
            yield item
            done += 1
            now = time.monotonic()
            if not quiet and not terminal and (now - shown >= _LINE_EVERY or done == total):
                shown = now
                out.write(f"{_state(step, done, total, now - begin)}\n")
                out.flush()
    finally:
        if not quiet and terminal:
            _bar(out, step, done, total, time.monotonic() - begin)
            out.write("\n")


def _bar(out: TextIO, step: str, done: int, total: int, seconds: float) -> None:
    filled = _BAR * done // max(total, 1)
    out.write(f"\r\x1b[K[{'━' * filled}{' ' * (_BAR - filled)}] {_state(step, done, total, seconds)}")
    out.flush()


def _state(step: str, done: int, total: int, seconds: float) -> str:
    text = f"{step} {done}/{total}"
    if done and seconds > 0:
        text += f", {done / seconds:.1f}/s, {_clock(seconds)}"
        if done < total:
            text += f", {_clock(seconds / done * (total - done))} left"
    return text


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
