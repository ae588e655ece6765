"""Evaluation data: JSON lines or plain text, and prompts made from their fields."""

from __future__ import annotations

import gzip
import json
import re
import string
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["Record", "Template", "read_records"]

JSON_LINES = (".jsonl", ".json", ".ndjson")
_FIELD = re.compile(r"(\w+)(?:\[(\d+)\])?")


@dataclass(frozen=True)
class Record:
    """One record of a data file: where it stands (``file:line``) and its fields."""

    source: str
    fields: Mapping[str, Any]

    def value(self, name: str) -> Any:
        """Return the field `name`, or item i of a list for ``name[i]``.

        Raises:
            PmpdError: the record has no such field or item.
        """
        match = _FIELD.fullmatch(name)
        key, index = (match[1], match[2]) if match else (name, None)
        if key not in self.fields:
            raise PmpdError(f"{self.source}: {unknown_choice('field', key, self.fields)}")
        value = self.fields[key]
        if index is None:
            return value
        if not isinstance(value, list) or int(index) >= len(value):
            raise PmpdError(f"{self.source}: field {key!r} has no item {index}, it is {value!r:.60}")
        return value[int(index)]

    def text(self, name: str) -> str:
        """Return a field that is a text or a number, as text.

        Raises:
            PmpdError: the record has no such field, or it is something else.
        """
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise PmpdError(
                f"{self.source}: field {name!r} is not text but {value!r:.60}: choose another field or {name}[0]"
            )
        return str(value)


@dataclass(frozen=True)
class Template:
    """A text with ``{field}`` and ``{field[0]}`` in it (``{{`` and ``}}`` are plain braces).

    Raises:
        PmpdError: the braces do not match, a name cannot be a field, or there is no field at all.
    """

    text: str

    def __post_init__(self) -> None:
        if not self._fields():
            raise PmpdError(f"prompt template {self.text!r} has no {{field}}: every prompt would be the same")

    def _parts(self) -> list[tuple[str, str | None, str | None, str | None]]:
        try:
            return list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise PmpdError(
                f"prompt template {self.text!r}: {error} (plain braces are written {{{{ and }}}})"
            ) from None

    def _fields(self) -> list[str]:
        names = []
        for _, name, spec, conversion in self._parts():
            if name is None:
                continue
            if spec or conversion or not _FIELD.fullmatch(name):
                raise PmpdError(
                    f"prompt template {self.text!r}: {{{name}}} is not of the form {{field}} or {{field[0]}}"
                )
            names.append(name)
        return names

    def render(self, record: Record) -> str:
        """Return the text with the record's fields put in. Raises PmpdError for a field that is missing or not text."""
        parts = ((literal, name) for literal, name, _, _ in self._parts())
        return "".join(literal + (record.text(name) if name is not None else "") for literal, name in parts)


def read_records(path: Path) -> Iterator[Record]:
    """Read a data file one record at a time: JSON lines by name (``.jsonl``), any other file as one text.

    A text file becomes one record with the field ``text``. Both are UTF-8, with or without a byte order mark, and may
    be compressed (``.gz``).

    Raises:
        PmpdError: the file cannot be read, is not UTF-8, or a line is not a JSON object.
    """
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if packed else path.open(encoding="utf-8-sig") as file:
            if (Path(path.stem) if packed else path).suffix not in JSON_LINES:
                yield Record(path.name, {"text": file.read()})
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse(f"{path.name}:{number}", line)
    except UnicodeDecodeError as error:
        raise PmpdError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise PmpdError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _parse(source: str, line: str) -> Record:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PmpdError(f"{source} is not valid JSON ({error}): the file needs one JSON object per line") from None
    if not isinstance(fields, dict):
        raise PmpdError(f"{source} is not a JSON object but {fields!r:.60}: the file needs one object per line")
    return Record(source, fields)
