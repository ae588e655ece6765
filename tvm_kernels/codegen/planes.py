"""From bit-planes to codes to values: the part that every kernel shares.

Byte b of plane i holds bit i of the codes of columns ``8 b … 8 b + 7``. `split_planes` turns p such bytes into eight
codes with shifts and selections: pairs of planes become 2-bit fields, pairs of those nibbles, pairs of those bytes.
The codes of column ``8 b + j`` come out in byte b of vector j, so a kernel meets its columns in the order (j, b) and
activations are laid out in that order beforehand, once a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.codegen.emit import Emitter, vector
from pmpd.tvm_kernels.codegen.isa import Isa

__all__ = ["Codes", "split_planes", "table_entries", "table_variants"]

_MASKS = {1: 0x55555555, 2: 0x33333333, 4: 0x0F0F0F0F}


def table_variants(bits: int) -> int:
    """Return how many tables a row needs: a nibble holds four 1-bit codes, two 2-bit codes or one of 3 or 4 bits."""
    return {1: 4, 2: 2}.get(bits, 1)


def table_entries(bits: int, variant: int) -> list[int]:
    """Return which codebook entry each of a table's entries holds; variant t reads the t-th code of a nibble."""
    if bits > 4:
        return list(range(2**bits))
    if bits == 3:  # the fourth plane is missing: the lowest bit of the nibble is junk
        return [index >> 1 for index in range(16)]
    return [(index >> (bits * variant)) % 2**bits for index in range(16)]


@dataclass(frozen=True)
class Codes:
    """An index vector (uint32 lanes) for `Isa.lookup`, the table variant to use, and the column j it belongs to."""

    index: Any
    variant: int
    column: int


def split_planes(e: Emitter, isa: Isa, planes: Sequence[Any]) -> list[Codes]:
    """Return the codes of eight columns a byte, from p plane vectors (uint32 lanes), most significant first."""
    bits = len(planes)
    width = 1 << (bits - 1).bit_length()  # of a field: 1, 2, 4 or 8 bits
    missing: list[Any] = [None] * (width - bits)
    # Up to 4 bits, junk below the code is harmless, as tables repeat; above, zeros on top keep tables small.
    level = [*planes, *missing] if bits <= 4 else [*missing, *planes]
    # Each vector of `fields` holds fields of `size` bits; field f of a byte is column first + f * size.
    fields: list[tuple[int, list[Any]]] = [(0, level)]
    size = 1
    while size < width:
        split = []
        for first, group in fields:
            halves = [_interleave(e, isa, high, low, size) for high, low in zip(group[::2], group[1::2], strict=True)]
            split.append((first, [even for even, _ in halves]))
            split.append((first + size, [odd for _, odd in halves]))
        fields = split
        size *= 2
    codes = []
    for first, (value,) in fields:
        if width == 8:
            codes.append(Codes(value, 0, first))
            continue
        nibbles = value, e.bind(value >> tirx.const(4, vector("uint32", isa.words)))
        for high, nibble in enumerate(nibbles):
            for variant in range(4 // width):
                field = high * (4 // width) + variant
                codes.append(Codes(nibble, variant, first + field * width))
    return codes


def _interleave(e: Emitter, isa: Isa, high: Any, low: Any, size: int) -> tuple[Any, Any]:
    """Join fields of `size` bits of two vectors into fields twice as wide: those at even places, those at odd ones."""
    words = vector("uint32", isa.words)
    mask, shift = tirx.const(_MASKS[size], words), tirx.const(size, words)
    if high is None and low is None:
        return None, None
    if high is None:
        return e.bind(low & mask), e.bind((low >> shift) & mask)
    if low is None:
        return e.bind(high << shift), high
    even, odd = isa.select(_MASKS[size], low, high << shift), isa.select(_MASKS[size], low >> shift, high)
    return e.bind(even), e.bind(odd)
