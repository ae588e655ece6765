"""Evenly spaced levels per row and group of columns, nested by truncating codes: what `rtn`, `hqq` and `gptq` share.

A code of p bits stands for a run of ``2**(P - p)`` neighbouring levels of the parent. The parent's values are its
levels. Below it a grid of one's own would do no better: the middles of the runs are evenly spaced too, and closer than
the levels of a p-bit grid from the least to the greatest weight, because they need not hit these two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize.tiles import FLOAT16_MAX, Codes, Floats

__all__ = ["Grid", "means"]

TILE = 1 << 17
"""Weights that a thread works on at once, with some 5 MB of temporaries."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Evenly spaced levels of some rows: level i of row r is ``low[r] + step[r] * i``.

    Attributes:
        low: float32 ``[R, 1]``.
        step: float32 ``[R, 1]``, at least 0.
        bits: P; there are ``2**P`` levels.
    """

    low: Floats
    step: Floats
    bits: int

    @classmethod
    def spanning(cls, values: Floats, bits: int) -> Grid:
        """Return the grid from the least to the greatest value of each row of ``[R, k]``."""
        low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
        return cls(low, (high - low) / np.float32(2**bits - 1), bits)

    def positions(self, values: Floats) -> Floats:
        """Return where values ``[R, k]`` are, in steps from the lowest level."""
        divisor = np.where(self.step > 0, self.step, np.float32(1))
        return ((values - self.low) / divisor).astype(np.float32, copy=False)

    def codes(self, values: Floats) -> Codes:
        """Return the numbers of the nearest levels."""
        return np.rint(self.positions(values)).clip(0, 2**self.bits - 1).astype(np.uint8)

    def levels(self, p: int) -> Floats:
        """Return the middle of each run of levels that a code of p bits stands for, ``[R, 2**p]``."""
        run = 2 ** (self.bits - p)
        middles = run * np.arange(2**p, dtype=np.float32) + np.float32((run - 1) / 2)
        levels: Floats = (self.low + self.step * middles).clip(-FLOAT16_MAX, FLOAT16_MAX)
        return levels


def means(
    values: Floats, codes: npt.NDArray[np.integer], otherwise: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """Return the mean of the values ``[R, k]`` that have each code; of unused codes, `otherwise` ``[R, L]``."""
    R, L = otherwise.shape
    places = (codes + np.arange(R)[:, None] * L).ravel()
    count = np.bincount(places, minlength=R * L).reshape(R, L)
    total = np.bincount(places, values.ravel(), minlength=R * L).reshape(R, L)
    return np.where(count > 0, total / np.maximum(count, 1), otherwise)
