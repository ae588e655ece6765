"""Many rows of activations times the weights: the kernel of prefill.

A tile of weight rows is decoded once for some cache lines of each, into scratch memory that stays in the first-level
cache, and then multiplied with all rows of activations, a few at a time, so that their sums stay in registers. The
results of one stretch of columns are added to those of earlier stretches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.codegen.emit import Emitter, shuffle, vector
from pmpd.tvm_kernels.codegen.isa import Isa
from pmpd.tvm_kernels.codegen.planes import split_planes
from pmpd.tvm_kernels.codegen.tables import Int8Tables, exact_tables
from pmpd.tvm_kernels.codegen.vector import fma, sum_lanes
from pmpd.tvm_kernels.ops.matmul.gemv import LINE, float_values, load_planes, parameters, tile_rows
from pmpd.tvm_kernels.ops.matmul.tuning import Tuning

__all__ = ["gemm_exact", "gemm_int8"]

ZERO = tirx.const(0, "int32")


def gemm_int8(isa: Isa, tuning: Tuning, *, name: str, bits: int) -> Any:
    """Return the kernel with 8-bit codebooks and activations. Scratch memory is ``512 * rows * depth`` bytes.

    Args:
        isa: the instruction set.
        tuning: its `rows`, `tokens` and `depth`.
        name: the C symbol.
        bits: p, how many planes are read.
    """
    return _Int8(isa, tuning, name=name, bits=bits).function()


def gemm_exact(isa: Isa, tuning: Tuning, *, name: str, bits: int) -> Any:
    """Return the kernel with float16 codebooks and float32 activations and sums; arguments as `gemm_int8`.

    Scratch memory is ``2048 * rows * depth`` bytes.
    """
    return _Exact(isa, tuning, name=name, bits=bits).function()


class _Gemm:
    """The loops of the kernel; what depends on the accuracy is in the subclasses.

    Scratch memory holds decoded weights of a stretch in the order in which they are multiplied: ``[blocks, 8, rows,
    width]`` bytes (`int8`: block of plane bytes, column of a byte, weight row, byte), or ``[blocks, 32, rows, words]``
    floats (`exact`: of every column first the even bytes, then the odd ones, half a vector of them at a time).
    """

    packed: str  # type of packed activations
    decoded: str  # type of decoded weights

    def __init__(self, isa: Isa, tuning: Tuning, *, name: str, bits: int) -> None:
        self.isa, self.bits = isa, bits
        self.rows, self.tokens, self.depth = tuning.rows, tuning.tokens, tuning.depth
        self.e = Emitter(name, parameters(self.packed, self.decoded))

    def make_tables(self, numbers: Sequence[Any]) -> None:
        """Make the look-up tables of a tile of weight rows."""
        raise NotImplementedError

    def decode(self, block: Any, row: int, planes: Sequence[Any]) -> None:
        """Write the weights of one vector of plane bytes of one row to scratch memory."""
        raise NotImplementedError

    def multiply(self, blocks: Any, starts: Sequence[Any], stretch: Any, totals: Any) -> None:
        """Add to `totals`, a vector for each token and row, the products of decoded weights and activations."""
        raise NotImplementedError

    def first(self, token: Any) -> Any:
        """Return what the tile's results for a token begin with, a lane a row."""
        raise NotImplementedError

    def scaled(self, sums: Any) -> Any:
        """Return a stretch's part of the results from its sums, a lane a row."""
        raise NotImplementedError

    def function(self) -> Any:
        """Return the finished `tirx.PrimFunc`."""
        e, isa, rows, tokens = self.e, self.isa, self.rows, self.tokens
        per_line = LINE // isa.width
        stride = e.bind(e["lines"].astype("int64") * LINE)
        with e.loop("tile", e["begin"], e["end"], rows) as first:
            numbers = tile_rows(e, first, rows)
            self.make_tables(numbers)
            starts = [e.bind(number.astype("int64") * stride, f"start{row}") for row, number in enumerate(numbers)]
            with e.loop("token", ZERO, e["m"]) as token:
                self._store(first, token, e.bind(self.first(token)), add=False)
            with e.loop("stretch", ZERO, e["lines"], self.depth) as line:
                lines = tirx.min(e["lines"] - line, tirx.const(self.depth, "int32"))
                blocks, stretch = e.bind(lines * per_line, "blocks"), e.bind((line * per_line).astype("int64"))
                with e.loop("block", ZERO, blocks) as block:
                    offset = e.bind((stretch + block.astype("int64")) * isa.width)
                    for row, start in enumerate(starts):
                        self.decode(block, row, load_planes(e, isa, self.bits, start, offset, 0))
                with e.loop("group", ZERO, e["m"], tokens) as head:
                    totals = self._products(head, blocks, stretch, stride)
                    for number in range(tokens):
                        parts = [e.load(totals, (number * rows + row) * isa.words, isa.words) for row in range(rows)]
                        value = e.bind(self.scaled(sum_lanes(e, parts)))  # (rows,)
                        with e.when(head + number < e["m"]):
                            self._store(first, head + number, value, add=True)
        return e.function()

    def _products(self, head: Any, blocks: Any, stretch: Any, stride: Any) -> Any:
        """Multiply the decoded weights with a group of tokens; return the buffer of sums."""
        e, words = self.e, self.isa.words
        last = e.bind(e["m"] - 1)
        tokens = [e.bind(tirx.min(head + token, last)).astype("int64") for token in range(self.tokens)]
        totals = e.local("float32", self.rows * self.tokens * words, "totals")  # (tokens, rows, words)
        for index in range(self.rows * self.tokens):
            e.store(totals, index * words, tirx.const(0.0, vector("float32", words)))
        self.multiply(blocks, [e.bind(token * stride * 8) for token in tokens], stretch, totals)
        return totals

    def _store(self, first: Any, token: Any, value: Any, *, add: bool) -> None:
        """Set the tile's results for one token, or add to them; rows beyond the last are left alone."""
        e, rows = self.e, self.rows
        place = e.bind(token.astype("int64") * e["ldy"] + first.astype("int64"))
        with e.when(first + rows <= e["end"]):
            e.store(e["y"], place, e.load(e["y"], place, rows) + value if add else value)
        if rows == 1:
            return
        with e.when(first + rows > e["end"]):
            for row in range(rows - 1):
                result = shuffle([value], [row])
                with e.when(first + row < e["end"]):
                    e.store(e["y"], place + row, e.load(e["y"], place + row) + result if add else result)


class _Int8(_Gemm):
    packed, decoded = "int8", "uint8"

    def make_tables(self, numbers: Sequence[Any]) -> None:
        built = Int8Tables.allocate(self.e, rows=self.rows, bits=self.bits)
        built.fill(self.e, self.isa, self.e["codebook"], numbers)
        self.low, self.step = built.scale(self.e)
        self.tables = [built.tables.load(self.e, self.isa, row) for row in range(self.rows)]

    def decode(self, block: Any, row: int, planes: Sequence[Any]) -> None:
        width = self.isa.width
        for code in split_planes(self.e, self.isa, planes):
            values = self.isa.lookup(self.e, self.tables[row][code.variant], code.index, self.bits)
            self.e.store(self.e["scratch"], (block * 8 + code.column) * (self.rows * width) + row * width, values)

    def multiply(self, blocks: Any, starts: Sequence[Any], stretch: Any, totals: Any) -> None:
        e, isa, rows, width, words = self.e, self.isa, self.rows, self.isa.width, self.isa.words
        with e.loop("block", ZERO, blocks) as block:
            sums: list[Any] = [tirx.const(0, vector("int32", words))] * (
                rows * len(starts)
            )  # (tokens, rows) x (words,)
            for column in range(8):
                place = (block * 8 + column) * (rows * width)
                weights = [e.load(e["scratch"], place + row * width, width) for row in range(rows)]  # rows x (width,)
                for token, start in enumerate(starts):
                    where = start + stretch * width * 8 + (block * 8 + column).astype("int64") * width
                    x = e.load(e["packed"], where, width)
                    for index, weight in enumerate(weights, token * rows):
                        sums[index] = e.bind(isa.dot(sums[index], weight, x))
            for token, start in enumerate(starts):
                where = tirx.floordiv(start, 32) + (stretch + block.astype("int64")) * words
                scale = e.load(e["scale"], where, words)
                for index in range(token * rows, (token + 1) * rows):
                    product = tirx.Cast(vector("float32", words), sums[index])
                    e.store(totals, index * words, fma(product, scale, e.load(totals, index * words, words)))

    def first(self, token: Any) -> Any:
        return self.low * shuffle([self.e.load(self.e["sum"], token)], [0] * self.rows)

    def scaled(self, sums: Any) -> Any:
        return sums * self.step


class _Exact(_Gemm):
    packed, decoded = "float32", "float32"
    unroll = 4

    def make_tables(self, numbers: Sequence[Any]) -> None:
        built = exact_tables(self.e, self.e["codebook"], numbers, self.bits)
        self.tables = [
            (built.load(self.e, self.isa, row, half=0), built.load(self.e, self.isa, row, half=1))
            for row in range(self.rows)
        ]

    def decode(self, block: Any, row: int, planes: Sequence[Any]) -> None:
        words = self.isa.words
        for code in split_planes(self.e, self.isa, planes):
            for parity, values in enumerate(float_values(self.e, self.isa, self.tables[row], code, self.bits)):
                for half in range(2):
                    place = block * 32 + (code.column * 2 + parity) * 2 + half
                    part = shuffle([values], range(half * words, (half + 1) * words))
                    self.e.store(self.e["scratch"], (place * self.rows + row) * words, part)

    def multiply(self, blocks: Any, starts: Sequence[Any], stretch: Any, totals: Any) -> None:
        e, rows, words = self.e, self.rows, self.isa.words
        with e.loop("part", ZERO, blocks * (32 // self.unroll)) as part:
            sums = [e.load(totals, index * words, words) for index in range(rows * len(starts))]
            for number in range(self.unroll):
                place = part * self.unroll + number
                weights = [e.load(e["scratch"], (place * rows + row) * words, words) for row in range(rows)]
                for token, start in enumerate(starts):
                    x = e.load(e["packed"], start + stretch * self.isa.width * 8 + place.astype("int64") * words, words)
                    for index, weight in enumerate(weights, token * rows):
                        sums[index] = e.bind(fma(weight, x, sums[index]))
            for index, total in enumerate(sums):
                e.store(totals, index * words, total)

    def first(self, token: Any) -> Any:
        return tirx.const(0.0, vector("float32", self.rows))

    def scaled(self, sums: Any) -> Any:
        return sums
