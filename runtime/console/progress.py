"""Progress of long steps on stderr: a bar on a terminal, a line now and then elsewhere.

It is shown where the command frame made the notes of `pmpd` visible, and hidden under ``--quiet`` and in applications.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

__all__ = ["Progress", "progress", "track"]

Item = TypeVar("Item")
log = logging.getLogger(__name__)

_LINE_EVERY = 15.0  # seconds between lines where stderr is not a terminal
_FORMAT = "{desc} {n_fmt}/{total_fmt}, {rate_fmt}, {elapsed}, {remaining} left{postfix}"
_BAR = f"[{{bar:24}}] {_FORMAT}"


class Progress:
    """The progress of one step: what a caller tells about it."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def advance(self, count: int = 1) -> None:
        """Count `count` more items as done."""
        self._bar.update(count)

    def describe(self, step: str) -> None:
        """Change the name of the step."""
        self._bar.set_description_str(step)

    def note(self, text: str) -> None:
        """Show a text behind the figures, such as a loss, from the next update on."""
        self._bar.set_postfix_str(text, refresh=False)

    def expect(self, total: int) -> None:
        """Change the number of items there are."""
        self._bar.total = total


@contextmanager
def progress(step: str, *, total: int, unit: str = "item", transient: bool = False) -> Iterator[Progress]:
    """Show a step of `total` items while the block runs.

    Args:
        step: name of the step, such as ``quantize``.
        total: number of items.
        unit: what an item is, in the rate.
        transient: whether the bar vanishes at the end, for steps inside others.
    """
    if not log.isEnabledFor(logging.INFO) or sys.stderr is None:
        yield Progress(_Hidden())
        return
    terminal = sys.stderr.isatty()
    bar = _open_bar(
        desc=step,
        total=total,
        unit=unit,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        leave=terminal and not transient,
        bar_format=_BAR if terminal else _FORMAT,
        mininterval=0.1 if terminal else _LINE_EVERY,
        delay=0 if terminal else 1e-9,  # a line for zero items says nothing
    )
    try:
        yield Progress(bar)
        if not terminal and not transient:
            bar.refresh()
    finally:
        bar.close()


def track(
    items: Iterable[Item], *, step: str, total: int, unit: str = "item", quiet: bool = False, transient: bool = False
) -> Iterator[Item]:
    """Yield the items, showing how many of `total` are done, the rate and the time left."""
    if quiet:
        yield from items
        return
    with progress(step, total=total, unit=unit, transient=transient) as shown:
        for item in items:
            yield item
            shown.advance()


def _open_bar(**options: Any) -> Any:
    from tqdm import tqdm

    bar: Any = type("Bar", (tqdm,), {"monitor_interval": 0})  # tqdm starts no thread
    bar.set_lock(threading.RLock())  # the default is a lock between processes
    return bar(ascii=None, smoothing=0, miniters=1, dynamic_ncols=True, **options)


class _Hidden:
    """A bar that is not shown."""

    total = 0

    def update(self, count: int) -> None: ...

    def set_description_str(self, text: str) -> None: ...

    def set_postfix_str(self, text: str, *, refresh: bool) -> None: ...


class _Lines:
    """A file for tqdm that makes a line of each state of a bar, without control characters."""

    encoding = "utf-8"

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if line := " ".join(text.replace("\x1b[A", "").split()):
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        self._file.flush()
