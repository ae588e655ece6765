"""Many rows of activations times the weights: the kernel of prefill.

A tile of `rows` weight rows is decoded once for `depth` cache lines of each, into scratch memory that stays in the
first-level cache, and then multiplied with all rows of activations, `tokens` of them at a time, so that their sums stay
in registers. Results of one stretch of columns are added to those of the stretches before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.emit import Emitter, shuffle, vector
from pmpd.tvm_kernels.gemv import LINE, float_values, fma, load_planes, parameters, sum_lanes, tile_rows
from pmpd.tvm_kernels.isa import Isa
from pmpd.tvm_kernels.planes import split_planes
from pmpd.tvm_kernels.tables import Int8Tables, exact_tables

__all__ = ["gemm_exact", "gemm_int8"]


def gemm_int8(isa: Isa, *, name: str, bits: int, rows: int, tokens: int, depth: int) -> Any:
    """Return the kernel with 8-bit codebooks and activations.

    Args:
        isa: the instruction set.
        name: the C symbol.
        bits: p, how many planes are read.
        rows: weight rows in a tile, a power of two.
        tokens: rows of activations multiplied together.
        depth: cache lines of a row decoded at a time; scratch memory is ``512 * rows * depth`` bytes.
    """
    e = Emitter(name, parameters("int8"))
    width, words, ints = isa.width, vector("float32", isa.words), vector("int32", isa.words)
    with e.loop("tile", e["begin"], e["end"], rows) as first:
        numbers = tile_rows(e, first, rows)
        made = Int8Tables.allocate(e, rows=rows, bits=bits)
        made.fill(e, isa, e["codebook"], numbers)
        low, step = made.scale(e)
        tables = [made.tables.load(e, isa, row) for row in range(rows)]

        def decode(block: Any, row: int, planes: Sequence[Any]) -> None:
            for code in split_planes(e, isa, planes):
                values = isa.lookup(e, tables[row][code.variant], code.index, bits)
                e.store(e["scratch"], (block * 8 + code.column) * (rows * width) + row * width, values)

        def multiply(blocks: Any, starts: Sequence[Any], stretch: Any, totals: Any) -> None:
            with e.loop("block", tirx.const(0, "int32"), blocks) as block:
                sums: list[Any] = [tirx.const(0, ints)] * (rows * tokens)
                for column in range(8):
                    place = (block * 8 + column) * (rows * width)
                    weights = [e.load(e["scratch"], place + row * width, width) for row in range(rows)]
                    for token, start in enumerate(starts):
                        where = start + stretch * width * 8 + (block * 8 + column).astype("int64") * width
                        x = e.load(e["packed"], where, width)
                        for row, weight in enumerate(weights):
                            index = token * rows + row
                            sums[index] = e.bind(isa.dot(sums[index], weight, x))
                for token, start in enumerate(starts):
                    where = tirx.floordiv(start, 32) + (stretch + block.astype("int64")) * isa.words
                    scale = e.load(e["scale"], where, isa.words)
                    for index in range(token * rows, (token + 1) * rows):
                        sofar = e.load(totals, index * isa.words, isa.words)
                        e.store(totals, index * isa.words, fma(tirx.Cast(words, sums[index]), scale, sofar))

        def begin(token: Any) -> Any:
            return low * tirx.Broadcast(e.load(e["sum"], token), rows)

        _stretches(e, isa, numbers, first, bits, rows, tokens, depth, decode, multiply, begin, step)
    return e.function()


def gemm_exact(isa: Isa, *, name: str, bits: int, rows: int, tokens: int, depth: int) -> Any:
    """Return the kernel with float16 codebooks and float32 activations and sums; arguments as `gemm_int8`.

    Scratch memory is ``2048 * rows * depth`` bytes.
    """
    e = Emitter(name, parameters("float32", "float32"))
    lanes, unroll = isa.words, 4
    with e.loop("tile", e["begin"], e["end"], rows) as first:
        numbers = tile_rows(e, first, rows)
        made = exact_tables(e, e["codebook"], numbers, bits)
        tables = [(made.load(e, isa, row, half=0), made.load(e, isa, row, half=1)) for row in range(rows)]

        def decode(block: Any, row: int, planes: Sequence[Any]) -> None:
            for code in split_planes(e, isa, planes):
                for parity, values in enumerate(float_values(e, isa, tables[row], code, bits)):
                    for half in range(2):
                        place = block * 32 + (code.column * 2 + parity) * 2 + half
                        part = shuffle([values], range(half * lanes, (half + 1) * lanes))
                        e.store(e["scratch"], place * (rows * lanes) + row * lanes, part)

        def multiply(blocks: Any, starts: Sequence[Any], stretch: Any, totals: Any) -> None:
            with e.loop("quad", tirx.const(0, "int32"), blocks * (32 // unroll)) as quad:
                sums = [e.load(totals, index * lanes, lanes) for index in range(rows * tokens)]
                for part in range(unroll):
                    place = quad * unroll + part
                    weights = [e.load(e["scratch"], (place * rows + row) * lanes, lanes) for row in range(rows)]
                    for token, start in enumerate(starts):
                        where = start + stretch * isa.width * 8 + place.astype("int64") * lanes
                        x = e.load(e["packed"], where, lanes)
                        for row, weight in enumerate(weights):
                            index = token * rows + row
                            sums[index] = e.bind(fma(weight, x, sums[index]))
                for index, total in enumerate(sums):
                    e.store(totals, index * lanes, total)

        def begin(token: Any) -> Any:
            return tirx.const(0.0, vector("float32", rows))

        one = tirx.const(1.0, vector("float32", rows))
        _stretches(e, isa, numbers, first, bits, rows, tokens, depth, decode, multiply, begin, one)
    return e.function()


def _stretches(
    e: Emitter,
    isa: Isa,
    numbers: Sequence[Any],
    first: Any,
    bits: int,
    rows: int,
    tokens: int,
    depth: int,
    decode: Callable[[Any, int, Sequence[Any]], None],
    multiply: Callable[[Any, Sequence[Any], Any, Any], None],
    begin: Callable[[Any], Any],
    step: Any,
) -> None:
    """Decode and multiply a tile of weight rows, stretch by stretch of columns, and store ``begin + step * sum``."""
    stride = e.bind(e["lines"].astype("int64") * LINE)
    starts = [e.bind(number.astype("int64") * stride, f"start{row}") for row, number in enumerate(numbers)]
    per_line = LINE // isa.width
    count = rows * tokens * isa.words
    with e.loop("token", tirx.const(0, "int32"), e["m"]) as token:
        _update(e, first, rows, token, lambda _: begin(token))
    with e.loop("stretch", tirx.const(0, "int32"), e["lines"], depth) as line:
        blocks = e.bind(tirx.min(e["lines"] - line, tirx.const(depth, "int32")) * per_line, "blocks")
        stretch = e.bind((line * per_line).astype("int64"), "stretch")
        with e.loop("block", tirx.const(0, "int32"), blocks) as block:
            offset = e.bind((stretch + block.astype("int64")) * isa.width)
            for row, start in enumerate(starts):
                decode(block, row, load_planes(e, isa, bits, start, offset, 0))
        with e.loop("group", tirx.const(0, "int32"), e["m"], tokens) as head:
            last = e.bind(e["m"] - 1)
            own = [e.bind(tirx.min(head + token, last)) for token in range(tokens)]
            totals = e.local("float32", count, "totals")
            for index in range(rows * tokens):
                e.store(totals, index * isa.words, tirx.const(0.0, vector("float32", isa.words)))
            multiply(blocks, [e.bind(token.astype("int64") * stride * 8) for token in own], stretch, totals)
            for number in range(tokens):
                parts = [e.load(totals, (number * rows + row) * isa.words, isa.words) for row in range(rows)]
                value = e.bind(sum_lanes(e, parts) * step)
                with e.when(head + number < e["m"]):
                    _update(e, first, rows, head + number, lambda before, value=value: before + value)


def _update(e: Emitter, first: Any, rows: int, token: Any, change: Callable[[Any], Any]) -> None:
    """Replace the tile's results for one row of activations; rows beyond the last are left alone."""
    place = e.bind(token.astype("int64") * e["ldy"] + first.astype("int64"))
    with e.when(first + rows <= e["end"]):
        e.store(e["y"], place, change(e.load(e["y"], place, rows)))
    with e.when(first + rows > e["end"]):
        for row in range(rows - 1):
            with e.when(first + row < e["end"]):
                before = e.load(e["y"], place + row)
                value = e.bind(change(tirx.Broadcast(before, rows)))
                e.store(e["y"], place + row, shuffle([value], [row]))
