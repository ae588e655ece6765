"""One row of activations times the weights: the kernel of decoding. It reads every plane once and nothing else twice.

Rows are worked on one after another, which processors fetch best, or a few together, which load activations once for
all of them; a batch of rows shares the work that comes once a row, tables before it and the last sums behind it. For
each vector of plane bytes: planes to codes, codes to values, values times activations. With 8-bit activations the sum
over 32 columns is scaled in float, so every 32 columns have a scale of their own, at the price of one conversion and
one multiplication per eight products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.codegen.emit import Emitter, lanes_of, shuffle, vector
from pmpd.tvm_kernels.codegen.isa import Isa
from pmpd.tvm_kernels.codegen.planes import split_planes
from pmpd.tvm_kernels.codegen.tables import Int8Tables, exact_tables

__all__ = [
    "LINE",
    "float_values",
    "fma",
    "gemv_exact",
    "gemv_int8",
    "load_planes",
    "parameters",
    "store_rows",
    "sum_lanes",
    "tile_rows",
]

LINE = 64  # bytes of a plane's row come in whole cache lines

# The C signature of kernels.h, pmpd_matmul_fn.
_PARAMETERS = (
    ("planes", "uint8*"),
    ("plane_bytes", "int64"),
    ("codebook", "uint16*"),
    ("packed", "PACKED*"),
    ("scale", "float32*"),
    ("sum", "float32*"),
    ("y", "float32*"),
    ("ldy", "int64"),
    ("scratch", "SCRATCH*"),
    ("lines", "int32"),
    ("m", "int32"),
    ("begin", "int32"),
    ("end", "int32"),
)


def parameters(packed: str, scratch: str = "uint8") -> list[tuple[str, str]]:
    """Return the C signature, with the types of packed activations and of scratch memory."""
    types = {"PACKED*": f"{packed}*", "SCRATCH*": f"{scratch}*"}
    return [(name, types.get(dtype, dtype)) for name, dtype in _PARAMETERS]


def tile_rows(e: Emitter, first: Any, rows: int) -> list[Any]:
    """Return the numbers of the tile's rows; beyond the last row they repeat it, and the result is not stored."""
    last = e.bind(e["end"] - 1)
    return [e.bind(tirx.min(first + row, last), f"row{row}") for row in range(rows)]


def load_planes(e: Emitter, isa: Isa, bits: int, row: Any, offset: Any, prefetch: int) -> list[Any]:
    """Load a vector of every plane at byte `offset` of a row whose bytes begin at `row` (int64), as uint32 lanes."""
    loaded = []
    for plane in range(bits):
        where = e["planes"], e["plane_bytes"] * tirx.const(plane, "int64") + row + offset
        if prefetch:
            e.prefetch(where[0], where[1] + tirx.const(prefetch, "int64"))
        loaded.append(e.bind(tirx.reinterpret(vector("uint32", isa.words), e.load(*where, isa.width)), f"plane{plane}"))
    return loaded


def sum_lanes(e: Emitter, totals: list[Any]) -> Any:
    """Return one vector with the sum of the lanes of each given vector (powers of two of both)."""
    lanes = width = lanes_of(totals[0])
    # Pairs of vectors are folded into one until one is left; the lanes of one total stay side by side.
    while len(totals) > 1 and width > 1:
        low = [group + lane for group in range(0, lanes, width) for lane in range(width // 2)]
        both = [*low, *(lanes + lane for lane in low)]
        totals = [_fold(e, [a, b], both, width // 2) for a, b in zip(totals[::2], totals[1::2], strict=True)]
        width //= 2
    total = e.bind(shuffle(totals, range(lanes * len(totals))))
    count = lanes_of(total) // width
    while width > 1:
        low = [width * group + lane for group in range(count) for lane in range(width // 2)]
        total, width = _fold(e, [total], low, width // 2), width // 2
    return total


def _fold(e: Emitter, values: list[Any], lanes: list[int], distance: int) -> Any:
    return e.bind(shuffle(values, lanes) + shuffle(values, [lane + distance for lane in lanes]))


def store_rows(e: Emitter, first: Any, rows: int, value: Any) -> None:
    """Store the results of a tile, except rows beyond the last."""
    if rows == 1:
        e.store(e["y"], first.astype("int64"), value)
        return
    with e.when(first + rows <= e["end"]):
        e.store(e["y"], first.astype("int64"), value)
    with e.when(first + rows > e["end"]):
        for row in range(rows - 1):
            with e.when(first + row < e["end"]):
                e.store(e["y"], (first + row).astype("int64"), shuffle([value], [row]))


def gemv_int8(isa: Isa, *, name: str, bits: int, rows: int, batch: int, sums: int, prefetch: int) -> Any:
    """Return the kernel with 8-bit codebooks and activations.

    Args:
        isa: the instruction set.
        name: the C symbol.
        bits: p, how many planes are read.
        rows: rows computed together.
        batch: how many times so many rows have their tables made and their sums folded together.
        sums: independent sums of the products of a vector of plane bytes.
        prefetch: bytes ahead in every stream of planes that are asked for; 0 leaves it to the processor.
    """
    return _Int8(isa, name=name, bits=bits, rows=rows, batch=batch, sums=sums, prefetch=prefetch).function()


def gemv_exact(isa: Isa, *, name: str, bits: int, rows: int, batch: int, sums: int, prefetch: int) -> Any:
    """Return the kernel with float16 codebooks and float32 activations and sums; arguments as `gemv_int8`."""
    return _Exact(isa, name=name, bits=bits, rows=rows, batch=batch, sums=sums, prefetch=prefetch).function()


class _Gemv:
    """The loops of the kernel; what depends on the accuracy is in the subclasses."""

    packed: str  # type of packed activations
    lanes: int  # float32 sums of a row

    def __init__(self, isa: Isa, *, name: str, bits: int, rows: int, batch: int, sums: int, prefetch: int) -> None:
        self.isa, self.bits, self.rows, self.tile = isa, bits, rows, rows * batch
        self.sums, self.prefetch = sums, prefetch
        self.e = Emitter(name, parameters(self.packed))

    def prepare(self) -> None:
        """Do what comes before the first tile."""

    def make_tables(self, first: Any) -> None:
        """Make the look-up tables of the rows of a tile."""
        raise NotImplementedError

    def load_tables(self, row: Any) -> Any:
        """Return the tables of a row of the tile, for `multiply`."""
        raise NotImplementedError

    def load_activations(self, offset: Any) -> Any:
        """Return what all rows multiply with the vector of plane bytes at `offset`."""
        raise NotImplementedError

    def multiply(self, total: Any, planes: Sequence[Any], tables: Any, activations: Any) -> Any:
        """Return the sums of a row with the products of a vector of plane bytes added."""
        raise NotImplementedError

    def scaled(self, sums: Any) -> Any:
        """Return the tile's results from its sums, a lane a row."""
        raise NotImplementedError

    def function(self) -> Any:
        """Return the finished `tirx.PrimFunc`."""
        e, isa, lanes = self.e, self.isa, self.lanes
        stride = e.bind(e["lines"].astype("int64") * LINE, "stride")
        last = e.bind(e["end"] - 1)
        self.prepare()
        with e.loop("tile", e["begin"], e["end"], self.tile) as first:
            self.make_tables(first)
            totals = e.local("float32", self.tile * lanes, "totals")
            with e.loop("row", tirx.const(0, "int32"), tirx.const(self.tile, "int32"), self.rows) as row:
                own = [e.bind(row + number) for number in range(self.rows)]
                starts = [e.bind(tirx.min(first + each, last).astype("int64") * stride, "start") for each in own]
                tables = [self.load_tables(each) for each in own]
                sums = e.local("float32", self.rows * lanes, "sums")
                for number in range(self.rows):
                    e.store(sums, number * lanes, tirx.const(0.0, vector("float32", lanes)))
                with e.loop("block", tirx.const(0, "int32"), e["lines"] * (LINE // isa.width)) as block:
                    offset = e.bind(block.astype("int64") * isa.width)
                    activations = self.load_activations(offset)
                    for number, start in enumerate(starts):
                        planes = load_planes(e, isa, self.bits, start, offset, self.prefetch)
                        total = e.load(sums, number * lanes, lanes)
                        total = self.multiply(total, planes, tables[number], activations)
                        e.store(sums, number * lanes, total)
                for number, each in enumerate(own):
                    e.store(totals, each * lanes, e.load(sums, number * lanes, lanes))
            result = sum_lanes(e, [e.load(totals, number * lanes, lanes) for number in range(self.tile)])
            store_rows(e, first, self.tile, e.bind(self.scaled(result)))
        return e.function()


class _Int8(_Gemv):
    packed = "int8"

    def __init__(self, isa: Isa, **choices: Any) -> None:
        super().__init__(isa, **choices)
        self.lanes = isa.words

    def prepare(self) -> None:
        e = self.e
        self.made = Int8Tables.allocate(e, rows=self.tile, bits=self.bits, slots=2)
        self.made.fill(e, self.isa, e["codebook"], tile_rows(e, e["begin"], self.tile), slot=tirx.const(0, "int32"))

    def make_tables(self, first: Any) -> None:
        e = self.e
        self.slot = e.bind(tirx.floormod(tirx.floordiv(first - e["begin"], self.tile), 2))
        self.low, self.step = self.made.scale(e, slot=self.slot)
        self.made.fill(
            e, self.isa, e["codebook"], tile_rows(e, first + self.tile, self.tile), slot=e.bind(1 - self.slot)
        )

    def load_tables(self, row: Any) -> Any:
        return self.made.tables.load(self.e, self.isa, row, slot=self.slot)

    def load_activations(self, offset: Any) -> Any:
        e, width, words = self.e, self.isa.width, self.isa.words
        x = [e.load(e["packed"], offset * 8 + column * width, width, f"x{column}") for column in range(8)]
        return x, e.load(e["scale"], offset // 4, words, "scale")

    def multiply(self, total: Any, planes: Sequence[Any], tables: Any, activations: Any) -> Any:
        e, isa = self.e, self.isa
        x, scale = activations
        sums: list[Any] = [tirx.const(0, vector("int32", isa.words))] * self.sums
        for number, code in enumerate(split_planes(e, isa, planes)):
            values = isa.lookup(e, tables[code.variant], code.index, self.bits)
            own = number % self.sums
            sums[own] = e.bind(isa.dot(sums[own], values, x[code.column]))
        return fma(tirx.Cast(vector("float32", isa.words), _add(e, sums)), scale, total)

    def scaled(self, sums: Any) -> Any:
        everything = self.e.load(self.e["sum"], tirx.const(0, "int32"))
        return sums * self.step + self.low * (tirx.Broadcast(everything, self.tile) if self.tile > 1 else everything)


class _Exact(_Gemv):
    packed = "float32"

    def __init__(self, isa: Isa, **choices: Any) -> None:
        super().__init__(isa, **choices)
        self.lanes = isa.width // 2

    def make_tables(self, first: Any) -> None:
        self.made = exact_tables(self.e, self.e["codebook"], tile_rows(self.e, first, self.tile), self.bits)

    def load_tables(self, row: Any) -> Any:
        return self.made.load(self.e, self.isa, row, half=0), self.made.load(self.e, self.isa, row, half=1)

    def load_activations(self, offset: Any) -> Any:
        return offset * 8

    def multiply(self, total: Any, planes: Sequence[Any], tables: Any, activations: Any) -> Any:
        e, isa, halves = self.e, self.isa, self.isa.width // 2
        sums: list[Any] = [total] + [tirx.const(0.0, vector("float32", halves))] * (self.sums - 1)
        for number, code in enumerate(split_planes(e, isa, planes)):
            for parity, values in enumerate(float_values(e, isa, tables, code, self.bits)):
                x = e.load(e["packed"], activations + (2 * code.column + parity) * halves, halves, "x")
                own = (2 * number + parity) % self.sums
                sums[own] = e.bind(fma(values, x, sums[own]))
        return _add(e, sums)

    def scaled(self, sums: Any) -> Any:
        return sums


def _add(e: Emitter, values: list[Any]) -> Any:
    """Return the sum of vectors."""
    total = values[0]
    for value in values[1:]:
        total = e.bind(total + value)
    return total


def float_values(e: Emitter, isa: Isa, tables: tuple[Any, Any], code: Any, bits: int) -> tuple[Any, Any]:
    """Look up float32 weights: those of the even bytes of a vector, then those of the odd ones."""
    halves = isa.width // 2
    words = vector("uint16", halves)
    low, high = (tirx.reinterpret(words, isa.lookup(e, half[code.variant], code.index, bits)) for half in tables)
    byte, eight = tirx.const(0x00FF, words), tirx.const(8, words)
    even = (low & byte) | (high << eight)
    odd = (low >> eight) | (high & tirx.const(0xFF00, words))

    def to_float(value: Any) -> Any:
        half_floats = tirx.reinterpret(vector("float16", halves), e.bind(value))
        return e.bind(tirx.Cast(vector("float32", halves), half_floats))

    return to_float(even), to_float(odd)


def fma(a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``, fused."""
    dtype = str(a.ty.dtype)
    return tirx.call_llvm_pure_intrin(dtype, "llvm.fma", a, b, c)
