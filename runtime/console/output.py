"""Output of commands: numbers, tables, CSV and JSON as text, and files written in one step."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from math import floor, log10
from pathlib import Path

from pmpd.runtime.errors import PmpdError

__all__ = ["amount", "byte_text", "check_writable", "csv_text", "json_text", "markdown_table", "write_atomically"]

# A list of numbers on lines of its own, as `json.dumps` indents it (no JSON text holds a raw line break).
_NUMBERS = re.compile(r"\[\n[\d\s.,eE+-]+\]")


def amount(value: float, *, digits: int = 3) -> str:
    """Return a number with `digits` significant digits, but at most three decimals; a dash for zero."""
    if value == 0:
        return "–"
    decimals = min(max(0, digits - 1 - floor(log10(abs(value)))), 3)
    return f"{value:,.{decimals}f}"


def byte_text(count: float) -> str:
    """Return a number of bytes in the unit that suits it, with three significant digits: ``9.35 MB``."""
    if count < 999.5:
        return f"{count:.0f} bytes"
    power = min(int(log10(count / 999.5) / 3) + 1, 3)
    scaled = count / 1000**power
    return f"{scaled:.{max(0, 2 - int(log10(scaled)))}f} {'_kMG'[power]}B"


def markdown_table(table: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return rows of cells as a markdown table: the first row is the header, `left` columns are aligned to the left."""
    widths = [max(3, *(len(line[i]) for line in table)) for i in range(len(table[0]))]
    rule = [":" + "-" * (width - 1) if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    cells = [
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (table[0], rule, *table[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as comma-separated values, the keys of all of them first; what a row lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_text(document: object) -> str:
    """Return JSON as text for people too: indented, with lists of numbers on one line."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    return _NUMBERS.sub(lambda match: re.sub(r"\s+", " ", match[0]), text) + "\n"


def check_writable(path: Path) -> None:
    """Check that a file can be written, before the work whose result it is.

    Raises:
        PmpdError: the folder does not exist or cannot be written, or the path is a folder.
    """
    if path.is_dir():
        raise PmpdError(f"{path} is a folder: give the name of a file for the result")
    if path.exists() and not path.is_file():
        return  # a device or a FIFO
    folder = path.absolute().parent
    if not folder.is_dir():
        raise PmpdError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise PmpdError(f"cannot write {path}: the folder {folder} is not writable")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file in one step: a reader sees the old file or the whole new one, never a part.

    A symbolic link is followed, and a file that is replaced keeps its permissions. A device or a FIFO, such as
    ``/dev/stdout``, is written to and stays what it is.

    Raises:
        PmpdError: the file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        _write(path.resolve(), data)
    except OSError as error:
        raise PmpdError(f"cannot write {path} ({error.strerror}): choose another place") from None
    except RuntimeError:  # Path.resolve, before Python 3.13
        raise PmpdError(f"cannot write {path} ({os.strerror(errno.ELOOP)}): choose another place") from None


def _write(path: Path, data: bytes) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):  # opening a folder for writing raises IsADirectoryError
        with path.open("wb") as file:
            file.write(data)
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
