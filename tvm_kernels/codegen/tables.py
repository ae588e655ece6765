"""Codebooks as look-up tables of bytes, which a kernel makes for the few rows that it works on.

`int8`: the entries of a row become 8-bit steps between its least and its greatest value, so that with w = low + step c
a row's result is ``step * sum(c x) + low * sum(x)``. `exact`: the two bytes of each float16 entry, in two tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.codegen.emit import Emitter, lanes_of, shuffle, vector
from pmpd.tvm_kernels.codegen.isa import Isa
from pmpd.tvm_kernels.codegen.planes import table_entries, table_variants

# Entries worked on together, which is what the widest registers hold as float32.
LANES = 16

__all__ = ["ByteTables", "Int8Tables", "exact_tables"]


@dataclass(frozen=True)
class ByteTables:
    """Byte tables of a tile of rows, in a buffer on the stack.

    Attributes:
        buffer: ``[slots, halves, variants, rows, size]`` bytes.
        rows: rows in the tile.
        bits: of the codes.
        halves: 1, or 2 for the low and the high byte of float16.
    """

    buffer: Any
    rows: int
    bits: int
    halves: int

    @classmethod
    def allocate(cls, e: Emitter, *, rows: int, bits: int, halves: int = 1, slots: int = 1) -> ByteTables:
        """Make room for the tables of `slots` tiles."""
        size = halves * table_variants(bits) * rows * max(16, 2**bits)
        return cls(e.local("uint8", slots * size, "tables"), rows, bits, halves)

    def _place(self, slot: Any, half: int, variant: int) -> Any:
        variants, size = table_variants(self.bits), self.rows * max(16, 2**self.bits)
        return slot * (self.halves * variants * size) + (half * variants + variant) * size

    def load(self, e: Emitter, isa: Isa, row: int, *, slot: Any = 0, half: int = 0) -> list[list[Any]]:
        """Return the tables of a row, for each variant, as `Isa.lookup` takes them."""
        offset = row * max(16, 2**self.bits)
        variants = range(table_variants(self.bits))
        return [
            isa.tables(e, self.buffer, self._place(slot, half, variant) + offset, self.bits) for variant in variants
        ]

    def store(self, e: Emitter, half: int, lines: Sequence[Sequence[Any]], *, slot: Any = 0) -> None:
        """Lay out entries (uint8), in lines as `_entries` makes them."""
        for variant in range(table_variants(self.bits)):
            place = self._place(slot, half, variant)
            for line in lines:
                # Stores are as wide as the later loads, so that LLVM can hold the tables in registers.
                for first in range(0, len(line), 64 // LANES):
                    parts = line[first : first + 64 // LANES]
                    lanes = list(range(sum(map(lanes_of, parts))))
                    if self.bits < 4:
                        entries = table_entries(self.bits, variant)
                        lanes = [first + entry for first in lanes[:: 2**self.bits] for entry in entries]
                    codes = e.bind(shuffle(parts, lanes))
                    e.store(self.buffer, place, codes)
                    place = place + lanes_of(codes)


@dataclass(frozen=True)
class Int8Tables:
    """Tables of 8-bit steps, with the least value and the step of every row of a tile.

    With two slots a kernel makes the tables of the next tile before it works on the current one, so that the long chain
    from a codebook to its table is computed alongside the products and not before them.
    """

    tables: ByteTables
    scalars: Any

    @classmethod
    def allocate(cls, e: Emitter, *, rows: int, bits: int, slots: int = 1) -> Int8Tables:
        """Make room for `slots` tiles."""
        tables = ByteTables.allocate(e, rows=rows, bits=bits, slots=slots)
        return cls(tables, e.local("float32", slots * 2 * rows, "scalars"))

    def scale(self, e: Emitter, *, slot: Any = 0) -> tuple[Any, Any]:
        """Return the least value and the step of every row (float32, a lane a row)."""
        rows = self.tables.rows
        low, step = (e.load(self.scalars, slot * (2 * rows) + part * rows, rows) for part in range(2))
        return low, step

    def fill(self, e: Emitter, isa: Isa, codebook: Any, rows: Sequence[Any], *, slot: Any = 0) -> None:
        """Make the tables of `rows` (row numbers) from codebook float16 ``[N, 1, 2**bits]``, given as uint16."""
        low, step, lines = _int8_entries(e, isa, codebook, rows, self.tables.bits)
        self.tables.store(e, 0, lines, slot=slot)
        e.store(self.scalars, slot * (2 * len(rows)), low)
        e.store(self.scalars, slot * (2 * len(rows)) + len(rows), step)


def exact_tables(e: Emitter, codebook: Any, rows: Sequence[Any], bits: int) -> ByteTables:
    """Make the byte tables of `rows` from codebook float16 ``[N, 1, 2**bits]``, given as uint16."""
    lines = _entries(e, codebook, rows, bits, "uint16")
    tables = ByteTables.allocate(e, rows=len(rows), bits=bits, halves=2)

    def byte(part: Any, shift: int) -> Any:
        words = part >> tirx.const(shift, str(part.ty.dtype)) if shift else part
        return e.bind(tirx.Cast(vector("uint8", lanes_of(part)), words))

    for half, shift in enumerate((0, 8)):
        tables.store(e, half, [[byte(part, shift) for part in line] for line in lines])
    return tables


def _int8_entries(
    e: Emitter, isa: Isa, codebook: Any, rows: Sequence[Any], bits: int
) -> tuple[Any, Any, list[list[Any]]]:
    """Return the least value and the step of every row, and the entries as 8-bit steps, in lines."""
    entries, count = 2**bits, len(rows)
    lines = _entries(e, codebook, rows, bits, "float32")
    group = min(entries, LANES)  # the lanes of a line that belong to one row
    lows, highs = [], []
    for line in lines:
        low, high = line[0], line[0]
        for part in line[1:]:
            low, high = e.bind(tirx.min(low, part)), e.bind(tirx.max(high, part))
        reach = 1
        while reach < group:
            partner = [lane ^ reach for lane in range(lanes_of(low))]
            low = e.bind(tirx.min(low, shuffle([low], partner)))
            high = e.bind(tirx.max(high, shuffle([high], partner)))
            reach *= 2
        lows.append(low)
        highs.append(high)
    heads = [group * row for row in range(count)]
    low, high = e.bind(shuffle(lows, heads), "low"), e.bind(shuffle(highs, heads))  # (rows,)
    scalars = vector("float32", count)
    width = e.bind(tirx.max(high - low, tirx.const(1e-30, scalars)))
    step = e.bind(width * tirx.const(1 / (isa.levels - 1), scalars), "step")
    inverse = e.bind(tirx.const(isa.levels - 1, scalars) / width)

    def inverses(number: int, lanes: int) -> Any:
        """Return one over the step of each lane's row."""
        if entries > LANES:  # a division of a whole vector: LLVM takes many seconds over the spread-out scalar here
            extent = tirx.max(highs[number] - lows[number], tirx.const(1e-30, vector("float32", lanes)))
            return e.bind(tirx.const(isa.levels - 1, vector("float32", lanes)) / extent)
        return e.bind(shuffle([inverse], [number * (LANES // group) + lane // group for lane in range(lanes)]))

    def codes(line: Sequence[Any], number: int) -> list[Any]:
        lanes = lanes_of(line[0])
        scale, half = inverses(number, lanes), tirx.const(0.5, vector("float32", lanes))
        steps = [tirx.Cast(vector("int32", lanes), (part - lows[number]) * scale + half) for part in line]
        values = [tirx.Cast(vector("uint8", lanes), step) for step in steps]
        return [e.bind(value ^ tirx.const(0x80, vector("uint8", lanes)) if isa.signed else value) for value in values]

    if isa.signed:
        low = e.bind(low + step * tirx.const(128, scalars))
    return low, step, [codes(line, number) for number, line in enumerate(lines)]


def _entries(e: Emitter, codebook: Any, rows: Sequence[Any], bits: int, dtype: str) -> list[list[Any]]:
    """Load the entries of `rows`: lines of one vector that holds whole rows, or of several that hold one row."""
    entries = 2**bits
    values = []
    for row in rows:
        begin = row.astype("int64") * entries
        parts = [e.load(codebook, begin + part, min(entries, LANES)) for part in range(0, entries, LANES)]
        if dtype == "float32":
            parts = [_float32(e, part) for part in parts]
        values.append(parts)
    if entries >= LANES:
        return values
    together = LANES // entries
    groups = [[part for (part,) in values[first : first + together]] for first in range(0, len(rows), together)]
    return [[e.bind(shuffle(group, range(entries * len(group))))] for group in groups]


def _float32(e: Emitter, half: Any) -> Any:
    lanes = lanes_of(half)
    return e.bind(tirx.Cast(vector("float32", lanes), tirx.reinterpret(vector("float16", lanes), half)))
