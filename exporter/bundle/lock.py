"""An exclusive lock on a file, on POSIX and on Windows; it is released when the process dies."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

__all__ = ["open_locked"]


def open_locked(path: Path) -> TextIO:
    """Create or open a file and lock it; closing the file releases the lock.

    The holder may delete the file while it has the lock.

    Raises:
        BlockingIOError: another process, or another opening in this one, holds the lock.
        FileNotFoundError: the folder is missing, or a holder deleted the file just now: try again.
        OSError: the file cannot be opened.
    """
    file = path.open("a")
    try:
        _lock(file.fileno())
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError(path)
    except BaseException:
        file.close()
        raise
    return file


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(*error.args) from None

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
