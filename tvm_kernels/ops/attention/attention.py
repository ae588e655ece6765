"""Attention of new tokens over the KV cache, rotary embedding and appending included.

One call works on some key/value heads. Keys and values are float16, so a position costs half the bytes of float32;
sums are float32. The query heads that share a key/value head, and in prefill several tokens, are taken `queries` at a
time, so that a key that was loaded and converted once serves all of them. Scores are kept for all positions, the
softmax takes their true maximum, and values are summed with all elements of a head in registers.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.codegen.emit import Emitter, shuffle, vector
from pmpd.tvm_kernels.codegen.isa import Isa
from pmpd.tvm_kernels.ops.matmul.gemv import sum_lanes

__all__ = ["attention", "queries_together"]

ZERO = tirx.const(0, "int32")
LOG2_E = 1.4426950408889634
# exp2 on [-1/2, 1/2], relative error 2.4e-6: the coefficients of the Taylor series of 2^x.
EXP2 = (1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477, 0.0013333558146428443)


def queries_together(isa: Isa, dim: int) -> int:
    """Return how many queries of `dim` elements the registers can hold the sums of: 1, 2 or 4."""
    return max(count for count in (1, 2, 4) if count == 1 or count * dim // isa.words <= isa.registers // 2)


def attention(isa: Isa, *, name: str, dim: int, queries: int) -> Any:
    """Return the kernel for heads of `dim` elements (a multiple of 16), `queries` of them at a time (1, 2 or 4).

    C signature: ``pmpd_attention_fn`` of kernels.h.
    """
    return _Attention(isa, name, dim, queries).function()


class _Attention:
    def __init__(self, isa: Isa, name: str, dim: int, queries: int) -> None:
        self.isa, self.dim, self.queries = isa, dim, queries
        self.lanes = min(isa.words, 16)
        self.parts = dim // self.lanes  # vectors of a head
        self.positions = 16 // queries  # whose scores make a vector of sixteen with those of all queries
        self.e = Emitter(
            name,
            [
                ("qkv", "float32*"),
                ("keys", "uint16*"),
                ("values", "uint16*"),
                ("cos", "float32*"),
                ("sin", "float32*"),
                ("y", "float32*"),
                ("scratch", "float32*"),
                ("scale", "float32"),
                ("m", "int32"),
                ("past", "int32"),
                ("capacity", "int32"),
                ("heads", "int32"),
                ("kv_heads", "int32"),
                ("pairs", "int32"),
                ("begin", "int32"),
                ("end", "int32"),
            ],
        )

    def function(self) -> Any:
        e, dim = self.e, self.dim
        width = e.bind((e["heads"] + e["kv_heads"] * 2) * dim, "width")  # of a row of qkv
        group = e.bind(tirx.truncdiv(e["heads"], e["kv_heads"]), "group")
        with e.loop("kv_head", e["begin"], e["end"]) as kv_head:
            cache = e.bind(kv_head.astype("int64") * e["capacity"].astype("int64") * dim, "cache")
            with e.loop("token", ZERO, e["m"]) as token:
                self._append(kv_head, token, width, cache)
            rows = e.bind(e["m"] * group)
            with e.loop("row", ZERO, rows, self.queries) as first:
                last = e.bind(rows - 1)
                own = [e.bind(tirx.min(first + query, last)) for query in range(self.queries)]
                tokens = [e.bind(tirx.truncdiv(row, group)) for row in own]
                heads = [e.bind(kv_head * group + tirx.truncmod(row, group)) for row in own]
                for query, (token, head) in enumerate(zip(tokens, heads, strict=True)):
                    self._load_query(query, token, head, width)
                lengths = [e.bind(e["past"] + token + 1) for token in tokens]
                longest = e.bind(lengths[-1])
                blocks = e.bind(tirx.truncdiv(longest + (self.positions - 1), self.positions), "blocks")
                greatest = self._scores(cache, blocks, longest, lengths)
                inverse = self._softmax(blocks, greatest)
                self._sum_values(cache, longest, tokens, heads, inverse)
        return e.function()

    @property
    def _score_base(self) -> int:
        """Where scores begin in scratch memory, behind the queries."""
        return self.queries * self.dim

    def _append(self, kv_head: Any, token: Any, width: Any, cache: Any) -> None:
        """Rotate a token's key, and put key and value at their place in the cache, as float16."""
        e, dim = self.e, self.dim
        source = e.bind(token * width + (e["heads"] + kv_head) * dim)
        place = e.bind(cache + (e["past"] + token).astype("int64") * dim)
        with e.loop("element", ZERO, tirx.const(dim // 8, "int32")) as part:
            x = e.load(e["qkv"], source + e["kv_heads"] * dim + part * 8, 8)
            e.store(e["values"], place + (part * 8).astype("int64"), e.bind(self.isa.to_half(x)))
        self._rotate(
            source, token, lambda at, x: e.store(e["keys"], place + at.astype("int64"), e.bind(self.isa.to_half(x)))
        )

    def _load_query(self, query: int, token: Any, head: Any, width: Any) -> None:
        """Rotate a query and keep it, times the scale and the logarithm's base, in scratch memory."""
        e = self.e
        factor = e.bind(e["scale"] * tirx.const(LOG2_E, "float32"))
        source = e.bind(token * width + head * self.dim)

        def keep(at: Any, x: Any) -> None:
            e.store(e["scratch"], at + query * self.dim, x * tirx.Broadcast(factor, 8))

        self._rotate(source, token, keep)

    def _rotate(self, source: Any, token: Any, put: Any) -> None:
        """Pass on a head with its first ``2 * pairs`` elements rotated in halves, eight elements at a time."""
        e, pairs = self.e, self.e["pairs"]
        angle = e.bind((e["past"] + token) * pairs)
        with e.loop("pair", ZERO, tirx.truncdiv(pairs, 8)) as part:
            at = e.bind(part * 8)
            a, b = e.load(e["qkv"], source + at, 8), e.load(e["qkv"], source + pairs + at, 8)
            cos, sin = e.load(e["cos"], angle + at, 8), e.load(e["sin"], angle + at, 8)
            put(at, e.bind(a * cos - b * sin))
            put(e.bind(at + pairs), e.bind(b * cos + a * sin))
        with e.loop("rest", ZERO, tirx.truncdiv(tirx.const(self.dim, "int32") - pairs * 2, 8)) as part:
            at = e.bind(pairs * 2 + part * 8)
            put(at, e.load(e["qkv"], source + at, 8))

    def _scores(self, cache: Any, blocks: Any, longest: Any, lengths: list[Any]) -> Any:
        """Write the scores of every position, 16 a vector (query by query); return the greatest of each lane."""
        e, lanes, positions = self.e, self.lanes, self.positions
        least = tirx.const(-1e30, "float32x16")
        greatest = e.local("float32", 16, "greatest")
        e.store(greatest, 0, least)
        # Lane query * positions + i is position first + i: seen if it is below the query's length.
        ends = e.bind(shuffle(lengths, [lane // positions for lane in range(16)]))
        offsets = e.bind(_lanes(lane % positions for lane in range(16)))
        with e.loop("block", ZERO, blocks) as block:
            first = e.bind(block * positions)
            last = e.bind(longest - 1)
            rows = [e.bind(cache + tirx.min(first + i, last).astype("int64") * self.dim) for i in range(positions)]
            totals: list[Any] = [tirx.const(0.0, vector("float32", lanes))] * 16
            for row in rows:
                self._prefetch(e["values"], row)  # for _sum_values
            for part in range(self.parts):
                queries = [
                    e.load(e["scratch"], tirx.const(query * self.dim + part * lanes, "int32"), lanes)
                    for query in range(self.queries)
                ]
                for i, row in enumerate(rows):
                    key = e.bind(self.isa.from_half(e.load(e["keys"], row + part * lanes, lanes)))
                    for query, x in enumerate(queries):
                        index = query * positions + i
                        totals[index] = e.bind(key * x + totals[index])
            seen = (tirx.Broadcast(first, 16) + offsets) < ends
            scores = e.bind(tirx.Select(seen, sum_lanes(e, totals), least))
            e.store(e["scratch"], block * 16 + self._score_base, scores)
            e.store(greatest, 0, tirx.max(e.load(greatest, 0, 16), scores))
        return e.load(greatest, 0, 16)

    def _prefetch(self, cache: Any, row: Any) -> None:
        """Ask for a position's vector: memory would idle while scores or sums are computed."""
        for byte in range(0, self.dim * 2, 64):
            self.e.prefetch(cache, row + byte // 2)

    def _softmax(self, blocks: Any, greatest: Any) -> list[Any]:
        """Replace scores by their powers of two, less the greatest; return one over the sum of each query."""
        e, positions = self.e, self.positions
        greatest = self._within(greatest, tirx.max)
        sums = e.local("float32", 16, "sums")
        e.store(sums, 0, tirx.const(0.0, "float32x16"))
        with e.loop("block", ZERO, blocks) as block:
            place = e.bind(block * 16 + self._score_base)
            power = self._exp2(e.bind(e.load(e["scratch"], place, 16) - greatest))
            e.store(e["scratch"], place, power)
            e.store(sums, 0, e.load(sums, 0, 16) + power)
        total = self._within(e.load(sums, 0, 16), lambda a, b: a + b)
        return [
            e.bind(tirx.const(1.0, "float32") / shuffle([total], [query * positions])) for query in range(self.queries)
        ]

    def _within(self, value: Any, combine: Any) -> Any:
        """Combine the lanes of each query; every lane gets the result."""
        reach = 1
        while reach < self.positions:
            partner = [lane ^ reach for lane in range(16)]
            value = self.e.bind(combine(value, shuffle([value], partner)))
            reach *= 2
        return value

    def _exp2(self, x: Any) -> Any:
        """Return 2 to the power of x (sixteen lanes, none above 0), within 3e-6. NaN stays NaN."""
        e, floats = self.e, "float32x16"
        least = tirx.const(-126.0, floats)
        x = e.bind(tirx.Select(x < least, least, x))  # not max, which drops NaN
        whole = e.bind(tirx.Cast("int32x16", x - tirx.const(0.5, floats)))  # truncation: the nearest, as x <= 0
        rest = e.bind(x - tirx.Cast(floats, whole))
        power = tirx.const(EXP2[-1], floats)
        for coefficient in EXP2[-2::-1]:
            power = e.bind(power * rest + tirx.const(coefficient, floats))
        exponent = (whole + tirx.const(127, "int32x16")) << tirx.const(23, "int32x16")
        return e.bind(power * tirx.reinterpret(floats, exponent))

    def _sum_values(self, cache: Any, longest: Any, tokens: list[Any], heads: list[Any], inverse: list[Any]) -> None:
        """Sum the values of all positions by their weights, and store the heads' outputs."""
        e, lanes, parts = self.e, self.lanes, self.parts
        sums = e.local("float32", self.queries * self.dim, "outputs")
        for index in range(self.queries * parts):
            e.store(sums, index * lanes, tirx.const(0.0, vector("float32", lanes)))
        with e.loop("position", ZERO, longest) as position:
            row = e.bind(cache + position.astype("int64") * self.dim)
            self._prefetch(e["keys"], row + e["capacity"].astype("int64") * self.dim)  # of the next head
            block, lane = tirx.truncdiv(position, self.positions), tirx.truncmod(position, self.positions)
            place = e.bind(block * 16 + lane + self._score_base)
            weights = [e.load(e["scratch"], place + query * self.positions) for query in range(self.queries)]
            for part in range(parts):
                value = e.bind(self.isa.from_half(e.load(e["values"], row + part * lanes, lanes)))
                for query, weight in enumerate(weights):
                    index = (query * parts + part) * lanes
                    e.store(sums, index, value * tirx.Broadcast(weight, lanes) + e.load(sums, index, lanes))
        for query, (token, head, factor) in enumerate(zip(tokens, heads, inverse, strict=True)):
            target = e.bind((token * e["heads"] + head) * self.dim)
            for part in range(parts):
                total = e.load(sums, (query * parts + part) * lanes, lanes)
                e.store(e["y"], target + part * lanes, total * tirx.Broadcast(factor, lanes))


def _lanes(numbers: Any) -> Any:
    values = [tirx.const(number, "int32") for number in numbers]
    return tirx.Shuffle(values, [tirx.const(i, "int32") for i in range(len(values))])
