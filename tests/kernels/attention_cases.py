"""Calls of attention, what they must answer, and how far float32 arithmetic may be from it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Doubles = npt.NDArray[np.float64]

NAN = np.float16(np.nan)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call for key/value heads [begin, end): H and G are `heads` and `kv_heads`, D is `dim`.

    Shapes: qkv [M, (H + 2 G) D], keys and values [G, C, D], cos and sin [P, pairs]. `window` and `softcap` are the
    operator's attributes, 0 for none.
    """

    qkv: Floats
    keys: Halves
    values: Halves
    cos: Floats
    sin: Floats
    past: int
    heads: int
    scale: float
    begin: int = 0
    end: int
    window: int = 0
    softcap: float = 0.0

    @property
    def kv_heads(self) -> int:
        return int(self.keys.shape[0])

    @property
    def dim(self) -> int:
        return int(self.keys.shape[2])

    def split(self) -> tuple[Doubles, Doubles, Doubles]:
        """Return queries [M, H, D], keys and values [M, G, D]."""
        parts = self.qkv.astype(np.float64).reshape(len(self.qkv), -1, self.dim)
        q, k, v = np.split(parts, [self.heads, self.heads + self.kv_heads], axis=1)
        return q, k, v

    def rotated(self, x: Doubles) -> Doubles:
        """Return x [M, heads, D] with its first ``2 pairs`` elements rotated in halves."""
        pairs = self.cos.shape[1]
        new = slice(self.past, self.past + len(x))
        cos, sin = (table[new, None].astype(np.float64) for table in (self.cos, self.sin))
        a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    def to_bytes(self, kernel: str) -> bytes:
        """Return the case as `attention_driver.c` reads it."""
        G, C, D = self.keys.shape
        numbers = D, len(self.qkv), self.past, C, self.heads, G, *self.cos.shape, self.begin, self.end
        arrays = self.qkv, self.keys, self.values, self.cos, self.sin
        window = self.window or 2**31 - 1
        header = struct.pack("64sff11i", kernel.encode(), self.scale, self.softcap, window, *numbers)
        return b"".join([header, *(array.tobytes() for array in arrays)])


@dataclass(frozen=True)
class Result:
    """What a call leaves: y [M, H, D], keys and values [G, C, D]."""

    y: Floats
    keys: Halves
    values: Halves


def random_case(
    dim: int, heads: int, kv_heads: int, M: int, past: int, pairs: int, *, size: float = 1.0, seed: int = 0
) -> Case:
    """Return a case with standard normal numbers, NaN in the cache behind the past, and a cache longer than needed.

    Queries are `size` times as large, and so are scores.
    """
    rng = np.random.default_rng(seed)
    capacity = past + M + 3
    keys, values = rng.standard_normal((2, kv_heads, capacity, dim)).astype(np.float16)
    keys[:, past:], values[:, past:] = NAN, NAN
    qkv = rng.standard_normal((M, (heads + 2 * kv_heads) * dim)).astype(np.float32)
    qkv[:, : heads * dim] *= np.float32(size)
    angles = rng.uniform(-np.pi, np.pi, (capacity, pairs))
    return Case(
        qkv=qkv,
        keys=keys,
        values=values,
        cos=np.cos(angles).astype(np.float32),
        sin=np.sin(angles).astype(np.float32),
        past=past,
        heads=heads,
        scale=dim**-0.5,
        end=kv_heads,
    )


def check(case: Case, result: Result, *, heads: slice = slice(None)) -> None:
    """Hold a call to the definition: keys off by a unit in the last place at most, values exact, y within a bound.

    Of y: terms of a score see `D / 4 + 16` roundings at most, tanh is off by 4e-7, exp2 by 3e-6, and sums over T
    positions by T roundings, all relative to the largest magnitudes that occur.
    """
    q, k, v = case.split()
    M, T = len(q), case.past + len(q)
    new, rest = slice(case.past, T), slice(T, None)
    for made, before, added, ulps in (
        (result.keys, case.keys, case.rotated(k), 1),
        (result.values, case.values, v, 0),
    ):
        np.testing.assert_array_equal(made[heads, : case.past], before[heads, : case.past])
        np.testing.assert_array_equal(made[heads, rest], before[heads, rest])
        want = added.astype(np.float16).transpose(1, 0, 2)[heads]
        if ulps:
            np.testing.assert_array_max_ulp(made[heads, new] + np.float16(0), want + np.float16(0), ulps)
        else:
            np.testing.assert_array_equal(made[heads, new], want)
    u = 2.0**-24
    q = case.rotated(q) * case.scale
    distance = case.past + np.arange(M)[:, None] - np.arange(T)
    visible = (distance >= 0) & (distance < (case.window or T))
    group = case.heads // case.kv_heads
    for head in range(case.heads)[heads.start and heads.start * group : heads.stop and heads.stop * group]:
        keys, values = (x[head // group, :T].astype(np.float64) for x in (result.keys, result.values))
        scores = q[:, head] @ keys.T
        if case.softcap:
            scores = case.softcap * np.tanh(scores / case.softcap)
        off = 4e-7 * np.abs(scores).max() if case.softcap else 0.0
        scores = np.where(visible, scores, -np.inf)
        magnitude = np.where(visible, np.abs(q[:, head]) @ np.abs(keys).T, 0).max(axis=1, keepdims=True)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        want = weights / weights.sum(axis=1, keepdims=True) @ values
        bound = np.abs(values).max() * (2 * (case.dim / 4 + 16) * u * magnitude + 2 * off + 1e-5 + 2 * T * u)
        assert (np.abs(result.y[:, head] - want) <= bound).all(), (
            f"head {head}: {np.abs(result.y[:, head] - want).max()}"
        )
