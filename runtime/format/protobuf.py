"""The protobuf wire format, read strictly: as much of it as an ONNX file needs (protobuf.dev, "Encoding").

A message is a sequence of fields. Each has a number and a wire type: a varint, 8 bytes, 4 bytes, or a length and that
many bytes (a string, a nested message, packed numbers). Groups, deprecated since 2008, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Field", "read_fields", "read_varints"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}
# A field: its number, and its value, an int for a varint and the bytes of anything else.
Field = tuple[int, int | memoryview]


def read_fields(message: memoryview) -> Iterator[Field]:
    """Yield the fields of a message in the order they stand; values are views.

    Raises:
        ValueError: the bytes end inside a field, or are not a message.
    """
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 2**29:
            raise ValueError(f"field number {number}")
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if size > end - at:
            raise ValueError(f"a field of {size} bytes where {end - at} are left")
        yield number, message[at : at + size]
        at += size


def read_varints(packed: memoryview) -> Iterator[int]:
    """Yield packed varints. Raises ValueError if the bytes end inside one."""
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the unsigned varint at an offset, and the offset after it."""
    if at < len(data) and data[at] < 0x80:  # most are one byte
        return data[at], at + 1
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, at + i + 1
    raise ValueError("a number that does not end, or is larger than 64 bits")
