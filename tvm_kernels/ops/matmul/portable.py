"""Any precision, any number of groups, in plain vector arithmetic that LLVM compiles for any machine: `pmpd_any`.

It runs where no kernel of a known instruction set does: on other architectures, and for more than one codebook a row.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.codegen.emit import Emitter, vector
from pmpd.tvm_kernels.codegen.isa import Portable
from pmpd.tvm_kernels.codegen.vector import reduce_lanes
from pmpd.tvm_kernels.ops.matmul.activations import LINE_COLUMNS

__all__ = ["PORTABLE_NAME", "portable_matmul"]

PORTABLE_NAME = "pmpd_any"
LANES = 16
_BASIC = Portable()  # converts float16 with integer arithmetic and one multiplication


def portable_matmul() -> Any:
    """Return `pmpd_any` of ort_ops/matmul.h: decode a line of a row to floats, multiply it with every x."""
    e = Emitter(
        PORTABLE_NAME,
        [
            ("planes", "uint8*"),
            ("plane_bytes", "int64"),
            ("codebook", "uint16*"),
            ("x", "float32*"),
            ("y", "float32*"),
            ("ldy", "int64"),
            ("bits", "int32"),
            ("groups", "int32"),
            ("group_bytes", "int32"),
            ("k", "int32"),
            ("lines", "int32"),
            ("m", "int32"),
            ("begin", "int32"),
            ("end", "int32"),
        ],
    )
    zero = tirx.const(0, "int32")
    with e.loop("row", e["begin"], e["end"]) as row:
        with e.loop("token", zero, e["m"]) as token:
            e.store(e["y"], token.astype("int64") * e["ldy"] + row.astype("int64"), tirx.const(0.0, "float32"))
        with e.loop("line", zero, e["lines"]) as line:
            weights = e.local("float32", LINE_COLUMNS, "weights")
            with e.loop("byte", zero, tirx.const(LINE_COLUMNS // 8, "int32")) as byte:
                _decode_byte(e, row, e.bind(line * (LINE_COLUMNS // 8) + byte), byte, weights)
            _multiply_line(e, row, e.bind(line * LINE_COLUMNS), weights)
    return e.function()


def _decode_byte(e: Emitter, row: Any, byte: Any, place: Any, weights: Any) -> None:
    """Look up the weights of the eight columns of one byte of every plane."""
    zero, wide = tirx.const(0, "int32"), vector("int32", 8)
    codes = e.local("int32", 8, "codes")
    e.store(codes, 0, tirx.const(0, wide))
    shifts = tirx.Ramp(zero, tirx.const(1, "int32"), 8)
    with e.loop("plane", zero, e["bits"]) as plane:
        row_bytes = e["lines"].astype("int64") * (LINE_COLUMNS // 8)
        where = plane.astype("int64") * e["plane_bytes"] + row.astype("int64") * row_bytes + byte.astype("int64")
        value = tirx.Cast("int32", e.load(e["planes"], where))
        bits = (tirx.Broadcast(value, 8) >> shifts) & tirx.const(1, wide)
        e.store(codes, 0, (e.load(codes, 0, 8) << tirx.const(1, wide)) | bits)
    group = e.bind(tirx.min(tirx.floordiv(byte, e["group_bytes"]), e["groups"] - 1))
    codebook = row.astype("int64") * e["groups"].astype("int64") + group.astype("int64")
    first = e.bind(codebook << e["bits"].astype("int64"))
    for column in range(8):
        entry = e.load(e["codebook"], first + e.load(codes, column).astype("int64"))
        e.store(weights, place * 8 + column, e.bind(_BASIC.from_half(entry)))


def _multiply_line(e: Emitter, row: Any, first: Any, weights: Any) -> None:
    """Add the products of one line of weights to the results of every row of activations."""
    zero, lanes = tirx.const(0, "int32"), vector("float32", LANES)
    count = e.bind(tirx.min(e["k"] - first, tirx.const(LINE_COLUMNS, "int32")))
    with e.loop("token", zero, e["m"]) as token:
        source = e.bind(token.astype("int64") * e["k"].astype("int64") + first.astype("int64"))
        totals = e.local("float32", LANES, "totals")
        e.store(totals, 0, tirx.const(0.0, lanes))
        vectors = e.bind(tirx.floordiv(count, LANES))
        with e.loop("part", zero, vectors) as part:
            x = e.load(e["x"], source + part.astype("int64") * LANES, LANES)
            e.store(totals, 0, e.load(totals, 0, LANES) + x * e.load(weights, part * LANES, LANES))
        total = reduce_lanes(e, e.load(totals, 0, LANES), lambda a, b: a + b)
        place = e.bind(token.astype("int64") * e["ldy"] + row.astype("int64"))
        e.store(e["y"], place, e.load(e["y"], place) + total)
        with e.loop("tail", e.bind(vectors * LANES), count) as column:
            product = e.load(e["x"], source + column.astype("int64")) * e.load(weights, column)
            e.store(e["y"], place, e.load(e["y"], place) + product)
