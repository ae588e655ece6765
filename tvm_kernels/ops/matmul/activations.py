"""Activations in the order in which kernels meet their columns, as floats or as 8-bit steps; once a call.

Vector (block, j) of a row holds columns ``8 b + j`` of the block's bytes b, as `planes.split_planes` yields the codes.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.codegen.emit import Emitter, shuffle, vector
from pmpd.tvm_kernels.codegen.isa import Isa
from pmpd.tvm_kernels.codegen.vector import reduce_lanes

__all__ = ["pack_float32", "pack_int8"]

LINE_COLUMNS = 512
GROUP = 32  # columns that share a scale: those that meet in one 32-bit lane of a dot product


def _parameters(packed: str) -> list[tuple[str, str]]:
    """Return the arguments of pmpd_pack_fn, in ort_ops/matmul.h."""
    return [
        ("x", "float32*"),
        ("packed", packed),
        ("scale", "float32*"),
        ("sum", "float32*"),
        ("k", "int32"),
        ("lines", "int32"),
        ("begin", "int32"),
        ("end", "int32"),
    ]


def pack_int8(isa: Isa, *, name: str) -> Any:
    """Return the kernel that rounds every 32 columns to 8 bits with a scale of their own (their largest over 127)."""
    e = Emitter(name, _parameters("int8*"))
    floats, ints = vector("float32", GROUP), vector("int32", GROUP)
    order = [8 * byte + column for column in range(8) for byte in range(4)]
    with e.loop("row", e["begin"], e["end"]) as row:
        source = e.bind(row.astype("int64") * e["k"].astype("int64"))
        groups = e.bind(e["lines"] * (LINE_COLUMNS // GROUP))
        target = e.bind(row.astype("int64") * groups.astype("int64"))
        total = e.local("float32", 1, "total")
        e.store(total, 0, tirx.const(0.0, "float32"))
        with e.loop("group", tirx.const(0, "int32"), groups) as group:
            x = e.local("float32", GROUP, "columns")
            first = e.bind(group * GROUP)
            with e.when(first + GROUP <= e["k"]):
                e.store(x, 0, e.load(e["x"], source + first.astype("int64"), GROUP))
            with e.when(first + GROUP > e["k"]):  # the row ends here: nothing beyond it is read
                e.store(x, 0, tirx.const(0.0, floats))
                with e.loop(
                    "column", tirx.const(0, "int32"), tirx.max(e["k"] - first, tirx.const(0, "int32"))
                ) as column:
                    e.store(x, column, e.load(e["x"], source + (first + column).astype("int64")))
            values = e.load(x, 0, GROUP)  # (32,)
            # The largest magnitude, found among the bits as integers: there infinity and NaN exceed all numbers,
            # while a maximum of floats would drop NaN. Either makes the scale, and so all results of the row, NaN.
            magnitudes = tirx.reinterpret(ints, values) & tirx.const(0x7FFFFFFF, ints)
            largest = e.bind(tirx.reinterpret("float32", reduce_lanes(e, magnitudes, tirx.max)))
            scale = e.bind(largest * tirx.const(1 / 127, "float32"), "scale")
            inverse = tirx.const(127.0, "float32") / tirx.max(largest, tirx.const(1e-30, "float32"))
            rounded = e.bind(
                tirx.call_llvm_pure_intrin(floats, "llvm.rint", values * tirx.Broadcast(e.bind(inverse), GROUP))
            )
            steps = e.bind(tirx.Cast(ints, rounded))
            number = e.bind(target + group.astype("int64"))
            e.store(e["scale"], number, scale)
            sofar = e.load(total, 0)
            e.store(total, 0, sofar + scale * tirx.Cast("float32", reduce_lanes(e, steps, lambda a, b: a + b)))
            codes = e.bind(tirx.Cast(vector("int8", GROUP), steps))  # (32,)
            byte = e.bind(number * 4)  # of the row's planes
            block, within = tirx.floordiv(byte, isa.width), tirx.floormod(byte, isa.width)
            place = e.bind(block * (8 * isa.width) + within)
            ordered = e.bind(shuffle([codes], order))  # (8, 4): column of a byte, byte
            for column in range(8):
                four = shuffle([ordered], range(4 * column, 4 * column + 4))
                e.store(e["packed"], place + column * isa.width, four)
        e.store(e["sum"], row, e.load(total, 0))
    return e.function()


def pack_float32(isa: Isa, *, name: str) -> Any:
    """Return the kernel that only reorders: of every (block, j) first the even bytes, then the odd ones."""
    e = Emitter(name, _parameters("float32*"))
    halves = isa.width // 2
    with e.loop("row", e["begin"], e["end"]) as row:
        source = e.bind(row.astype("int64") * e["k"].astype("int64"))
        target = e.bind(row.astype("int64") * e["lines"].astype("int64") * LINE_COLUMNS)
        with e.loop("byte", tirx.const(0, "int32"), e["lines"] * (LINE_COLUMNS // 8)) as byte:
            block, within = tirx.floordiv(byte, isa.width), tirx.floormod(byte, isa.width)
            place = e.bind(block * (8 * isa.width) + tirx.floormod(within, 2) * halves + tirx.floordiv(within, 2))
            for bit in range(8):
                column = e.bind(byte * 8 + bit)
                inside = column < e["k"]
                # The index stays inside the row even where the value is not used.
                index = tirx.min(column, e["k"] - 1).astype("int64")
                value = e.load(e["x"], source + index)
                chosen = tirx.Select(inside, value, tirx.const(0.0, "float32"))
                e.store(e["packed"], target + (place + bit * isa.width).astype("int64"), chosen)
    return e.function()
