"""The header of a GGUF file: its metadata, and where its tensors lie.

It is read here and not by the package `gguf`, which takes counts in the file at their word (a damaged one hangs it or
fills the memory) and needs many seconds for a vocabulary of 150 k tokens. Every count is checked against the bytes
that are left before anything of its size is made. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pmpd.runtime.errors import PmpdError

__all__ = ["GgufHeader", "GgufTensor"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4
_LONGEST_NAME = 200  # characters; tensors have up to 64
# Bytes of the smallest entry: a name and a type and a byte; a name, dimensions, type and offset.
_LEAST_VALUE, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
# Far above real ones (a million tokens, a tokenizer of 20 MB), and far below what would fill the memory.
_MOST_ENTRIES, _MOST_CHARACTERS = 1 << 22, 1 << 26
_AGAIN = "fetch the file again"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: its shape as numpy has it, its ggml type (a number), and where its bytes begin."""

    file: Path
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def elements(self) -> int:
        """The product of its shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its data. Use `GgufHeader.read`.

    Attributes:
        file: the file.
        metadata: its keys and values; arrays are lists.
        tensors: its tensors by name.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read the header of a file.

        Raises:
            PmpdError: it is not a GGUF file, of another version or byte order, damaged, or it ends too early.
        """
        try:
            with file.open("rb") as stream:
                if stream.read(len(_MAGIC)) != _MAGIC:
                    raise PmpdError(f"{file} is not a GGUF file (it does not begin with GGUF): give another --model")
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return cls(file, *_Reader(file, data).header())
        except OSError as error:
            raise PmpdError(f"{file} cannot be read ({error.strerror}): check the path and its permissions") from None


class _Reader:
    """Reads a header from its first byte to its last."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file, self._data, self._at = file, data, len(_MAGIC)

    def header(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Return metadata and tensors."""
        version = self._scalar("I")
        if version not in _VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
                raise PmpdError(f"{self._file} is a big-endian GGUF file: give the little-endian one")
            raise PmpdError(
                f"{self._file} has GGUF version {version}, this is for {_VERSIONS}: convert the model again"
            )
        tensor_count, value_count = self._scalar("Q"), self._scalar("Q")
        self._require_room(value_count, _LEAST_VALUE, "metadata")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = self._name()
            if key in metadata:
                raise self._damaged(f"two values of {key}")
            metadata[key] = self._value(self._scalar("I"))
        self._require_room(tensor_count, _LEAST_TENSOR, "tensors")
        places = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment % 8:
            raise self._damaged(f"general.alignment is {alignment!r}")
        begin = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in places:
            if name in tensors:
                raise self._damaged(f"two tensors {name}")
            tensors[name] = GgufTensor(self._file, name, shape, kind, begin + offset)
        return metadata, tensors

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._name(), self._scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._scalar("I"), self._scalar("Q"))
        if kind not in _SCALARS:
            raise self._damaged(f"a value of the unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            self._require_room(count, 8, "strings")
            return [self._string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self._damaged(f"an array of the type {kind}")
        self._require_room(count, struct.calcsize(f"<{_SCALARS[kind]}"), "numbers")
        return list(self._unpack(f"<{count}{_SCALARS[kind]}"))

    def _name(self) -> str:
        """Return the name of a value or a tensor, which messages quote."""
        name = self._string()
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise self._damaged(f"the name {name!r:.60}")
        return name

    def _string(self) -> str:
        length = self._scalar("Q")
        self._require_room(length, 1, "characters")
        text = self._data[self._at : self._at + length]
        self._at += length
        return text.decode("utf-8", errors="replace")

    def _scalar(self, code: str) -> Any:
        return self._unpack(f"<{code}")[0]

    def _unpack(self, codes: str) -> tuple[Any, ...]:
        size = struct.calcsize(codes)
        self._require_room(1, size, "numbers")
        values = struct.unpack_from(codes, self._data, self._at)
        self._at += size
        return values

    def _require_room(self, count: int, size: int, what: str) -> None:
        left = len(self._data) - self._at
        if count > (_MOST_CHARACTERS if what == "characters" else _MOST_ENTRIES):
            raise self._damaged(f"byte {self._at} announces {count} {what}, more than a model has")
        if count * size > left:
            raise PmpdError(
                f"{self._file} is cut short or damaged (byte {self._at} announces {count * size} bytes of {what}, "
                f"{left} are left): {_AGAIN}"
            )

    def _damaged(self, what: str) -> PmpdError:
        return PmpdError(f"{self._file} is damaged ({what}): {_AGAIN}")
