"""One row of activations times the weights: the kernel of decoding. It reads every plane once and nothing else twice.

Rows are processed one after another, which suits prefetching best, or a few together, which load activations once for
all of them. A batch of rows shares the work that comes once a row: building tables before it, folding sums after it.
For each vector of plane bytes: planes to codes, codes to values, values times activations. With 8-bit activations the
sum over 32 columns is scaled in float, so every 32 columns have their own scale, at the price of one conversion and one
multiplication per eight products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.codegen.emit import Emitter, shuffle, vector
from pmpd.tvm_kernels.codegen.isa import Isa
from pmpd.tvm_kernels.codegen.planes import split_planes
from pmpd.tvm_kernels.codegen.tables import Int8Tables, exact_tables
from pmpd.tvm_kernels.codegen.vector import add, fma, sum_lanes
from pmpd.tvm_kernels.ops.matmul.tuning import Tuning

__all__ = ["LINE", "float_values", "gemv_exact", "gemv_int8", "load_planes", "parameters", "store_rows", "tile_rows"]

LINE = 64  # bytes of a plane's row come in whole cache lines

# The arguments of pmpd_matmul_fn, in ort_ops/matmul.h.
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


def gemv_int8(isa: Isa, tuning: Tuning, *, name: str, bits: int) -> Any:
    """Return the kernel with 8-bit codebooks and activations.

    Args:
        isa: the instruction set.
        tuning: its `rows`, `batch`, `sums` and `prefetch`.
        name: the C symbol.
        bits: p, how many planes are read.
    """
    return _Int8(isa, tuning, name=name, bits=bits).function()


def gemv_exact(isa: Isa, tuning: Tuning, *, name: str, bits: int) -> Any:
    """Return the kernel with float16 codebooks and float32 activations and sums; arguments as `gemv_int8`."""
    return _Exact(isa, tuning, name=name, bits=bits).function()


class _Gemv:
    """The loops of the kernel; what depends on the accuracy is in the subclasses.

    Attributes:
        tile: rows whose tables are built, and whose sums are folded, together.
        lanes: float32 sums of a row.
    """

    packed: str  # type of packed activations
    lanes: int

    def __init__(self, isa: Isa, tuning: Tuning, *, name: str, bits: int) -> None:
        self.isa, self.tuning, self.bits = isa, tuning, bits
        self.tile = tuning.rows * tuning.batch
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
        e, isa, lanes, rows = self.e, self.isa, self.lanes, self.tuning.rows
        stride = e.bind(e["lines"].astype("int64") * LINE, "stride")
        last = e.bind(e["end"] - 1)
        self.prepare()
        with e.loop("tile", e["begin"], e["end"], self.tile) as first:
            self.make_tables(first)
            totals = e.local("float32", self.tile * lanes, "totals")  # (tile, lanes)
            with e.loop("row", tirx.const(0, "int32"), tirx.const(self.tile, "int32"), rows) as row:
                numbers = [e.bind(row + number) for number in range(rows)]
                starts = [
                    e.bind(tirx.min(first + number, last).astype("int64") * stride, "start") for number in numbers
                ]
                tables = [self.load_tables(number) for number in numbers]
                sums = e.local("float32", rows * lanes, "sums")  # (rows, lanes)
                for index in range(rows):
                    e.store(sums, index * lanes, tirx.const(0.0, vector("float32", lanes)))
                with e.loop("block", tirx.const(0, "int32"), e["lines"] * (LINE // isa.width)) as block:
                    offset = e.bind(block.astype("int64") * isa.width)
                    activations = self.load_activations(offset)
                    for index, start in enumerate(starts):
                        planes = load_planes(e, isa, self.bits, start, offset, self.tuning.prefetch)
                        total = e.load(sums, index * lanes, lanes)
                        total = self.multiply(total, planes, tables[index], activations)
                        e.store(sums, index * lanes, total)
                for index, number in enumerate(numbers):
                    e.store(totals, number * lanes, e.load(sums, index * lanes, lanes))
            result = sum_lanes(e, [e.load(totals, number * lanes, lanes) for number in range(self.tile)])  # (tile,)
            store_rows(e, first, self.tile, e.bind(self.scaled(result)))
        return e.function()


class _Int8(_Gemv):
    packed = "int8"

    def __init__(self, isa: Isa, tuning: Tuning, *, name: str, bits: int) -> None:
        super().__init__(isa, tuning, name=name, bits=bits)
        self.lanes = isa.words

    def prepare(self) -> None:
        e = self.e
        self.built = Int8Tables.allocate(e, rows=self.tile, bits=self.bits, slots=2)
        self.built.fill(e, self.isa, e["codebook"], tile_rows(e, e["begin"], self.tile), slot=tirx.const(0, "int32"))

    def make_tables(self, first: Any) -> None:
        e = self.e
        self.slot = e.bind(tirx.floormod(tirx.floordiv(first - e["begin"], self.tile), 2))
        self.low, self.step = self.built.scale(e, slot=self.slot)
        self.built.fill(
            e, self.isa, e["codebook"], tile_rows(e, first + self.tile, self.tile), slot=e.bind(1 - self.slot)
        )

    def load_tables(self, row: Any) -> Any:
        return self.built.tables.load(self.e, self.isa, row, slot=self.slot)

    def load_activations(self, offset: Any) -> Any:
        e, width, words = self.e, self.isa.width, self.isa.words
        x = [
            e.load(e["packed"], offset * 8 + column * width, width, f"x{column}") for column in range(8)
        ]  # 8 x (width,)
        return x, e.load(e["scale"], offset // 4, words, "scale")  # (words,)

    def multiply(self, total: Any, planes: Sequence[Any], tables: Any, activations: Any) -> Any:
        e, isa = self.e, self.isa
        x, scale = activations
        sums: list[Any] = [tirx.const(0, vector("int32", isa.words))] * self.tuning.sums
        for number, code in enumerate(split_planes(e, isa, planes)):
            values = isa.lookup(e, tables[code.variant], code.index, self.bits)  # (width,)
            index = number % self.tuning.sums
            sums[index] = e.bind(isa.dot(sums[index], values, x[code.column]))
        return fma(tirx.Cast(vector("float32", isa.words), add(e, sums)), scale, total)

    def scaled(self, sums: Any) -> Any:
        everything = self.e.load(self.e["sum"], tirx.const(0, "int32"))
        return sums * self.step + self.low * (tirx.Broadcast(everything, self.tile) if self.tile > 1 else everything)


class _Exact(_Gemv):
    packed = "float32"

    def __init__(self, isa: Isa, tuning: Tuning, *, name: str, bits: int) -> None:
        super().__init__(isa, tuning, name=name, bits=bits)
        self.lanes = isa.width // 2

    def make_tables(self, first: Any) -> None:
        self.built = exact_tables(self.e, self.e["codebook"], tile_rows(self.e, first, self.tile), self.bits)

    def load_tables(self, row: Any) -> Any:
        return self.built.load(self.e, self.isa, row, half=0), self.built.load(self.e, self.isa, row, half=1)

    def load_activations(self, offset: Any) -> Any:
        return offset * 8

    def multiply(self, total: Any, planes: Sequence[Any], tables: Any, activations: Any) -> Any:
        e, isa, halves = self.e, self.isa, self.isa.width // 2
        sums: list[Any] = [total] + [tirx.const(0.0, vector("float32", halves))] * (self.tuning.sums - 1)
        for number, code in enumerate(split_planes(e, isa, planes)):
            for parity, values in enumerate(float_values(e, isa, tables, code, self.bits)):
                x = e.load(e["packed"], activations + (2 * code.column + parity) * halves, halves, "x")
                index = (2 * number + parity) % self.tuning.sums
                sums[index] = e.bind(fma(values, x, sums[index]))
        return add(e, sums)

    def scaled(self, sums: Any) -> Any:
        return sums


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
