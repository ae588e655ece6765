"""One row of activations times the weights: the kernel of decoding. It reads every plane once and nothing else twice.

Rows are worked on `rows` at a time, so that activations are loaded once for all of them and there are enough
independent sums to keep the pipelines full. For each vector of plane bytes: planes to codes, codes to values, values
times activations. With 8-bit activations the sum over 32 columns is scaled in float, so every 32 columns have a scale
of their own, at the price of one conversion and one multiplication per eight products.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.emit import Emitter, lanes_of, shuffle, vector
from pmpd.tvm_kernels.isa import Isa
from pmpd.tvm_kernels.planes import split_planes
from pmpd.tvm_kernels.tables import Int8Tables, exact_tables

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


def gemv_int8(isa: Isa, *, name: str, bits: int, rows: int, prefetch: int) -> Any:
    """Return the kernel with 8-bit codebooks and activations.

    Args:
        isa: the instruction set.
        name: the C symbol.
        bits: p, how many planes are read.
        rows: rows computed together.
        prefetch: bytes ahead in every stream of planes that are asked for; 0 leaves it to the processor.
    """
    e = Emitter(name, parameters("int8"))
    words, ints = vector("float32", isa.words), vector("int32", isa.words)
    stride = e.bind(e["lines"].astype("int64") * LINE, "stride")
    made = Int8Tables.allocate(e, rows=rows, bits=bits, slots=2)
    made.fill(e, isa, e["codebook"], tile_rows(e, e["begin"], rows), slot=tirx.const(0, "int32"))
    with e.loop("tile", e["begin"], e["end"], rows) as first:
        numbers = tile_rows(e, first, rows)
        slot = e.bind(tirx.floormod(tirx.floordiv(first - e["begin"], rows), 2))
        tables = [made.tables.load(e, isa, row, slot=slot) for row in range(rows)]
        low, step = made.scale(e, slot=slot)
        made.fill(e, isa, e["codebook"], tile_rows(e, first + rows, rows), slot=e.bind(1 - slot))
        starts = [e.bind(number.astype("int64") * stride, f"start{row}") for row, number in enumerate(numbers)]
        totals = e.local("float32", rows * isa.words, "totals")
        for row in range(rows):
            e.store(totals, row * isa.words, tirx.const(0.0, words))
        with e.loop("block", tirx.const(0, "int32"), e["lines"] * (LINE // isa.width)) as block:
            offset = e.bind(block.astype("int64") * isa.width)
            x = [e.load(e["packed"], offset * 8 + j * isa.width, isa.width, f"x{j}") for j in range(8)]
            scale = e.load(e["scale"], offset // 4, isa.words, "scale")
            for row in range(rows):
                planes = load_planes(e, isa, bits, starts[row], offset, prefetch)
                total: Any = tirx.const(0, ints)
                for code in split_planes(e, isa, planes):
                    values = isa.lookup(e, tables[row][code.variant], code.index, bits)
                    total = e.bind(isa.dot(total, values, x[code.column]))
                sofar = e.load(totals, row * isa.words, isa.words)
                e.store(totals, row * isa.words, fma(tirx.Cast(words, total), scale, sofar))
        sums = sum_lanes(e, [e.load(totals, row * isa.words, isa.words) for row in range(rows)])
        everything = e.load(e["sum"], tirx.const(0, "int32"))
        spread = tirx.Broadcast(everything, rows) if rows > 1 else everything
        store_rows(e, first, rows, e.bind(sums * step + low * spread))
    return e.function()


def gemv_exact(isa: Isa, *, name: str, bits: int, rows: int, prefetch: int) -> Any:
    """Return the kernel with float16 codebooks and float32 activations and sums; arguments as `gemv_int8`."""
    e = Emitter(name, parameters("float32"))
    halves = isa.width // 2
    sums = vector("float32", halves)
    stride = e.bind(e["lines"].astype("int64") * LINE, "stride")
    with e.loop("tile", e["begin"], e["end"], rows) as first:
        numbers = tile_rows(e, first, rows)
        made = exact_tables(e, e["codebook"], numbers, bits)
        tables = [(made.load(e, isa, row, half=0), made.load(e, isa, row, half=1)) for row in range(rows)]
        starts = [e.bind(number.astype("int64") * stride, f"start{row}") for row, number in enumerate(numbers)]
        totals = e.local("float32", rows * halves, "totals")
        for row in range(rows):
            e.store(totals, row * halves, tirx.const(0.0, sums))
        with e.loop("block", tirx.const(0, "int32"), e["lines"] * (LINE // isa.width)) as block:
            offset = e.bind(block.astype("int64") * isa.width)
            for row in range(rows):
                planes = load_planes(e, isa, bits, starts[row], offset, prefetch)
                total = e.load(totals, row * halves, halves)
                for code in split_planes(e, isa, planes):
                    for parity, values in enumerate(float_values(e, isa, tables[row], code, bits)):
                        where = offset * 8 + (2 * code.column + parity) * halves
                        total = e.bind(fma(values, e.load(e["packed"], where, halves, "x"), total))
                e.store(totals, row * halves, total)
        result = sum_lanes(e, [e.load(totals, row * halves, halves) for row in range(rows)])
        store_rows(e, first, rows, result)
    return e.function()


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
