"""Attention of new tokens over the KV cache, in two kernels: `append` extends the cache, `attend` reads it.

Keys and values are float16, so a position costs half the bytes of float32; sums are float32. The query heads that share
a key/value head, and in prefill several tokens, are taken `queries` at a time, so that a key that was loaded and
converted once serves all of them. Scores are kept for all positions, the softmax takes their true maximum, and values
are summed with all elements of a head in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.codegen.emit import Emitter, shuffle, vector
from pmpd.tvm_kernels.codegen.isa import Isa
from pmpd.tvm_kernels.codegen.vector import sum_lanes

__all__ = ["append", "attend", "queries_together"]

ZERO = tirx.const(0, "int32")
LINE = 16  # float32 lanes of a line of scores
FLOATS, WORDS = f"float32x{LINE}", f"uint32x{LINE}"
PART = 8  # elements of a head that are rotated together
LOG2_E = 1.4426950408889634
LEAST_SCORE = -1e30  # of positions that a query does not see
# exp2 on [-1/2, 1/2], relative error 2.4e-6: the coefficients of the Taylor series of 2^x.
EXP2 = (1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477, 0.0013333558146428443)
# tanh(x) = x P(x^2) / Q(x^2) up to TANH_END, where it is 1 in float32: the coefficients of P and Q of the least
# relative error, 2.1e-8 exactly and 3.5e-7 in float32 arithmetic.
TANH_P = (0.9999999790283632, 0.1337971408184196, 0.003494029960726965, 2.058340609176879e-05, 1.3318970748424657e-08)
TANH_Q = (1.0, 0.4671302932592191, 0.02587105573135201, 0.00032830853257988625, 7.761977300592912e-07)
TANH_END = 9.02

# The arguments of pmpd_append_fn and pmpd_attend_fn, in ort_ops/attention.h.
_ARRAYS = (
    ("qkv", "float32*"),  # (M, (H + 2 G) D)
    ("keys", "uint16*"),  # (G, C, D), float16
    ("values", "uint16*"),  # (G, C, D), float16
    ("cos", "float32*"),  # (positions, pairs)
    ("sin", "float32*"),  # (positions, pairs)
)
_APPEND = (
    *_ARRAYS,
    *((name, "int32") for name in ("m", "past", "capacity", "heads", "kv_heads", "pairs", "begin", "end")),
)
_ATTEND = (
    *_ARRAYS,
    ("y", "float32*"),  # (M, H D)
    ("scratch", "float32*"),
    ("scale", "float32"),
    ("softcap", "float32"),
    *((name, "int32") for name in ("window", "past", "capacity", "heads", "kv_heads", "pairs", "kv_head")),
    ("begin", "int32"),
    ("end", "int32"),
)


def queries_together(isa: Isa, dim: int) -> int:
    """Return how many queries of `dim` elements the registers can hold the sums of: 1, 2 or 4."""
    return max(count for count in (1, 2, 4) if count == 1 or count * dim // isa.words <= isa.registers // 2)


def append(isa: Isa, *, name: str, dim: int) -> Any:
    """Return the kernel that rotates the new keys and writes them and the new values to the cache, as float16.

    C signature: ``pmpd_append_fn`` of ``ort_ops/attention.h``; `dim` elements of a head, a multiple of 16.
    """
    e = Emitter(name, _APPEND)
    with e.loop("kv_head", e["begin"], e["end"]) as kv_head:
        head = e.bind(kv_head.astype("int64") * e["capacity"].astype("int64") * dim)  # of the cache
        with e.loop("token", ZERO, e["m"]) as token:
            row = _qkv_row(e, token, dim)
            key = e.bind(row + (e["heads"] + kv_head) * dim)
            value = e.bind(key + e["kv_heads"] * dim)
            position = e.bind(e["past"] + token)
            place = e.bind(head + position.astype("int64") * dim)
            with e.loop("part", ZERO, tirx.const(dim // PART, "int32")) as part:
                x = e.load(e["qkv"], value + part * PART, PART)
                e.store(e["values"], place + (part * PART).astype("int64"), e.bind(isa.to_half(x)))

            def store_key(element: Any, x: Any, place: Any = place) -> None:
                e.store(e["keys"], place + element.astype("int64"), e.bind(isa.to_half(x)))

            _rotate(e, key, position, dim, store_key)
    return e.function()


def attend(isa: Isa, *, name: str, dim: int, queries: int, limited: bool) -> Any:
    """Return the kernel of attention for queries of one key/value head, `queries` of them at a time (1, 2 or 4).

    C signature: ``pmpd_attend_fn`` of ``ort_ops/attention.h``; `dim` elements of a head, a multiple of 16. Only a
    `limited` one has regard to `window` and `softcap`: in one function, the code without them was a tenth slower.
    """
    return _Attend(isa, name, dim, queries, limited).function()


def _qkv_row(e: Emitter, token: Any, dim: int) -> Any:
    """Return where a token's row of qkv begins."""
    return e.bind(token * e.bind((e["heads"] + e["kv_heads"] * 2) * dim))


def _rotate(e: Emitter, source: Any, position: Any, dim: int, store: Callable[[Any, Any], None]) -> None:
    """Rotate the first ``2 * pairs`` elements of a head of qkv in halves; store all, `PART` elements at a time.

    Args:
        e: the kernel.
        source: where the head begins in qkv.
        position: of its token.
        dim: elements of the head.
        store: is called with the number of the first element, and the elements.
    """
    pairs = e["pairs"]
    angle = e.bind(position * pairs)
    with e.loop("pair", ZERO, tirx.truncdiv(pairs, PART)) as part:
        first = e.bind(part * PART)
        a, b = e.load(e["qkv"], source + first, PART), e.load(e["qkv"], source + pairs + first, PART)
        cos, sin = e.load(e["cos"], angle + first, PART), e.load(e["sin"], angle + first, PART)
        store(first, e.bind(a * cos - b * sin))
        store(e.bind(first + pairs), e.bind(b * cos + a * sin))
    with e.loop("plain", ZERO, tirx.truncdiv(tirx.const(dim, "int32") - pairs * 2, PART)) as part:
        first = e.bind(pairs * 2 + part * PART)
        store(first, e.load(e["qkv"], source + first, PART))


class _Attend:
    """The kernel `attend`: for every block of `queries` queries, scores, softmax, sums of values.

    Scratch memory holds the block's queries and then its scores, in lines of 16. A line has the scores of `positions` =
    16 / `queries` positions with all queries of the block; of 4 queries q and positions p, in this order::

        scratch   | query 0: D floats | ... | query 3: D floats | line 0 | line 1 | line 2 | ...
                                                                   |
        line 1    | q0 p4 | q0 p5 | q0 p6 | q0 p7 | q1 p4 | ... | q3 p7 |

    `_query_place` and `_line_place` say where each begins, `_lane` which lane of a line belongs to which query.

    Attributes:
        limited: the kernel has windows and softcaps.
        lanes: float32 lanes of a vector of a head's elements.
        parts: vectors of a head.
        positions: positions of a line of scores.
    """

    def __init__(self, isa: Isa, name: str, dim: int, queries: int, limited: bool) -> None:
        self.isa, self.dim, self.queries, self.limited = isa, dim, queries, limited
        self.lanes = min(isa.words, LINE)
        self.parts = dim // self.lanes
        self.positions = LINE // queries
        self.e = Emitter(name, _ATTEND)

    def _query_place(self, query: int) -> int:
        """Return where a query of the block begins in scratch memory."""
        return query * self.dim

    def _line_place(self, line: Any) -> Any:
        """Return where a line of scores begins in scratch memory: behind the queries."""
        return line * LINE + self.queries * self.dim

    def _line(self, position: Any) -> Any:
        """Return the line of a position."""
        return tirx.truncdiv(position, self.positions)

    def _lane(self, query: int, position: int = 0) -> int:
        """Return the lane of a query's score with the line's position of a number."""
        return query * self.positions + position

    def function(self) -> Any:
        """Return the finished `tirx.PrimFunc`."""
        e, dim = self.e, self.dim
        group = e.bind(tirx.truncdiv(e["heads"], e["kv_heads"]), "group")
        cache = e.bind(e["kv_head"].astype("int64") * e["capacity"].astype("int64") * dim, "cache")
        with e.loop("query", e["begin"], e["end"], self.queries) as first:
            last = e.bind(e["end"] - 1)  # repeated where the block ends early
            numbers = [e.bind(tirx.min(first + query, last)) for query in range(self.queries)]
            tokens = [e.bind(tirx.truncdiv(number, group)) for number in numbers]
            heads = [e.bind(e["kv_head"] * group + tirx.truncmod(number, group)) for number in numbers]
            for query, (token, head) in enumerate(zip(tokens, heads, strict=True)):
                self._load_query(query, token, head)
            # Each query sees the positions from a start to an end.
            ends = [e.bind(e["past"] + token + 1) for token in tokens]
            starts = [e.bind(tirx.max(end - e["window"], ZERO)) if self.limited else ZERO for end in ends]
            span = starts[0], ends[-1]  # of the block: tokens are in order
            lines = e.bind(self._line(span[0])), e.bind(self._line(span[1] + (self.positions - 1)))
            greatest = self._scores(cache, lines, starts, ends)
            if self.limited:
                self._cap(lines, greatest)
            inverse = self._softmax(lines, e.load(greatest, 0, LINE))  # (queries,)
            self._sum_values(cache, span, tokens, heads, inverse)
        return e.function()

    def _load_query(self, query: int, token: Any, head: Any) -> None:
        """Rotate a query and store it, times the scale and the logarithm's base, in scratch memory."""
        e = self.e
        factor = e.bind(e["scale"] * tirx.const(LOG2_E, "float32"))
        source = e.bind(_qkv_row(e, token, self.dim) + head * self.dim)

        def store(element: Any, x: Any) -> None:
            e.store(e["scratch"], element + self._query_place(query), x * tirx.Broadcast(factor, PART))

        _rotate(e, source, e.bind(e["past"] + token), self.dim, store)

    def _scores(self, cache: Any, lines: tuple[Any, Any], starts: list[Any], ends: list[Any]) -> Any:
        """Write the scores of the positions of some lines; return a buffer with the greatest of each lane, (16,)."""
        e, lanes, positions = self.e, self.lanes, self.positions
        least = tirx.const(LEAST_SCORE, FLOATS)
        greatest = e.local("float32", LINE, "greatest")
        e.store(greatest, 0, least)
        # A position is seen if it is less than `seen` behind the query's start; unsigned, those before it are not.
        query_of = [lane // positions for lane in range(LINE)]
        seen = [e.bind(end - start) for start, end in zip(starts, ends, strict=True)]
        seen_line = e.bind(tirx.Cast(WORDS, shuffle(seen, query_of)))  # (16,)
        offsets = e.bind(_constants(lane % positions for lane in range(LINE)) - shuffle(starts, query_of))  # (16,)
        with e.loop("line", *lines) as line:
            first = e.bind(line * positions)
            last = e.bind(ends[-1] - 1)
            rows = [e.bind(cache + tirx.min(first + i, last).astype("int64") * self.dim) for i in range(positions)]
            totals: list[Any] = [tirx.const(0.0, vector("float32", lanes))] * LINE  # 16 x (lanes,)
            for row in rows:
                self._prefetch(e["values"], row)  # for _sum_values
            for part in range(self.parts):
                queries = [
                    e.load(e["scratch"], tirx.const(self._query_place(query) + part * lanes, "int32"), lanes)
                    for query in range(self.queries)
                ]  # queries x (lanes,)
                for i, row in enumerate(rows):
                    key = e.bind(self.isa.from_half(e.load(e["keys"], row + part * lanes, lanes)))  # (lanes,)
                    for query, x in enumerate(queries):
                        lane = self._lane(query, i)
                        totals[lane] = e.bind(key * x + totals[lane])
            is_seen = tirx.Cast(WORDS, tirx.Broadcast(first, LINE) + offsets) < seen_line
            scores = e.bind(tirx.Select(is_seen, sum_lanes(e, totals), least))  # (16,)
            e.store(e["scratch"], self._line_place(line), scores)
            e.store(greatest, 0, tirx.max(e.load(greatest, 0, LINE), scores))
        return greatest

    def _cap(self, lines: tuple[Any, Any], greatest: Any) -> None:
        """Replace scores s, and the greatest of each lane, by ``c * tanh(s / c)`` if there is a softcap c."""
        e, least = self.e, tirx.const(LEAST_SCORE, FLOATS)
        cap = e.bind(e["softcap"] * tirx.const(LOG2_E, "float32"))  # scores are times the logarithm's base
        inverse = e.bind(tirx.const(1.0, "float32") / cap)

        def capped(x: Any) -> Any:
            y = self._tanh(e.bind(x * tirx.Broadcast(inverse, LINE))) * tirx.Broadcast(cap, LINE)
            return tirx.Select(tirx.EQ(x, least), least, y)  # what is not seen stays unseen

        with e.when(e["softcap"] > tirx.const(0.0, "float32")):
            e.store(greatest, 0, capped(e.load(greatest, 0, LINE)))
            with e.loop("line", *lines) as line:
                place = e.bind(self._line_place(line))
                e.store(e["scratch"], place, capped(e.load(e["scratch"], place, LINE)))

    def _tanh(self, x: Any) -> Any:
        """Return the hyperbolic tangent of x (16 lanes) within 4e-7 of itself. NaN stays NaN."""
        e, end = self.e, tirx.const(TANH_END, FLOATS)
        x = e.bind(tirx.Select(x > end, end, x))  # not min and max, which drop NaN
        x = e.bind(tirx.Select(x < -end, -end, x))
        square = e.bind(x * x)
        top, bottom = (tirx.const(coefficients[-1], FLOATS) for coefficients in (TANH_P, TANH_Q))
        for p, q in zip(TANH_P[-2::-1], TANH_Q[-2::-1], strict=True):
            top = e.bind(top * square + tirx.const(p, FLOATS))
            bottom = e.bind(bottom * square + tirx.const(q, FLOATS))
        return e.bind(x * top / bottom)

    def _prefetch(self, cache: Any, row: Any) -> None:
        """Prefetch a position's vector: memory would idle while scores or sums are computed."""
        for byte in range(0, self.dim * 2, 64):
            self.e.prefetch(cache, row + byte // 2)

    def _softmax(self, lines: tuple[Any, Any], greatest: Any) -> list[Any]:
        """Replace scores by their powers of two, less the greatest; return one over the sum of each query."""
        e = self.e
        greatest = self._within(greatest, tirx.max)
        sums = e.local("float32", LINE, "sums")
        e.store(sums, 0, tirx.const(0.0, FLOATS))
        with e.loop("line", *lines) as line:
            place = e.bind(self._line_place(line))
            power = self._exp2(e.bind(e.load(e["scratch"], place, LINE) - greatest))  # (16,)
            e.store(e["scratch"], place, power)
            e.store(sums, 0, e.load(sums, 0, LINE) + power)
        total = self._within(e.load(sums, 0, LINE), lambda a, b: a + b)  # (16,)
        return [
            e.bind(tirx.const(1.0, "float32") / shuffle([total], [self._lane(query)])) for query in range(self.queries)
        ]

    def _within(self, line: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """Combine the lanes of each query; every lane gets its query's result."""
        reach = 1
        while reach < self.positions:
            partner = [lane ^ reach for lane in range(LINE)]
            line = self.e.bind(combine(line, shuffle([line], partner)))
            reach *= 2
        return line

    def _exp2(self, x: Any) -> Any:
        """Return 2 to the power of x (16 lanes, none above 0), within 3e-6. NaN stays NaN."""
        e, floats = self.e, FLOATS
        least = tirx.const(-126.0, floats)
        x = e.bind(tirx.Select(x < least, least, x))  # not max, which drops NaN
        whole = e.bind(tirx.Cast(f"int32x{LINE}", x - tirx.const(0.5, floats)))  # truncation: the nearest, as x <= 0
        fraction = e.bind(x - tirx.Cast(floats, whole))
        power = tirx.const(EXP2[-1], floats)
        for coefficient in EXP2[-2::-1]:
            power = e.bind(power * fraction + tirx.const(coefficient, floats))
        exponent = (whole + tirx.const(127, f"int32x{LINE}")) << tirx.const(23, f"int32x{LINE}")
        return e.bind(power * tirx.reinterpret(floats, exponent))

    def _sum_values(
        self, cache: Any, span: tuple[Any, Any], tokens: list[Any], heads: list[Any], inverse: list[Any]
    ) -> None:
        """Sum the values of the positions of a span by their weights, and store the heads' outputs."""
        e, lanes, parts = self.e, self.lanes, self.parts
        sums = e.local("float32", self.queries * self.dim, "outputs")  # (queries, parts, lanes)
        for index in range(self.queries * parts):
            e.store(sums, index * lanes, tirx.const(0.0, vector("float32", lanes)))
        with e.loop("position", *span) as position:
            row = e.bind(cache + position.astype("int64") * self.dim)
            self._prefetch(e["keys"], row + e["capacity"].astype("int64") * self.dim)  # of the next head
            line, i = self._line(position), tirx.truncmod(position, self.positions)
            place = e.bind(self._line_place(line) + i)
            weights = [e.load(e["scratch"], place + self._lane(query)) for query in range(self.queries)]
            for part in range(parts):
                value = e.bind(self.isa.from_half(e.load(e["values"], row + part * lanes, lanes)))  # (lanes,)
                for query, weight in enumerate(weights):
                    index = (query * parts + part) * lanes
                    e.store(sums, index, value * tirx.Broadcast(weight, lanes) + e.load(sums, index, lanes))
        for query, (token, head, factor) in enumerate(zip(tokens, heads, inverse, strict=True)):
            target = e.bind((token * e["heads"] + head) * self.dim)
            for part in range(parts):
                total = e.load(sums, (query * parts + part) * lanes, lanes)  # (lanes,)
                e.store(e["y"], target + part * lanes, total * tirx.Broadcast(factor, lanes))


def _constants(numbers: Iterable[int]) -> Any:
    """Return a vector of int32 constants."""
    values = [tirx.const(number, "int32") for number in numbers]
    return tirx.Shuffle(values, [tirx.const(i, "int32") for i in range(len(values))])
