"""Half-quadratic quantization: evenly spaced levels, moved to where few weights have large errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pmpd.exporter.quantize.rtn import Rtn
from pmpd.exporter.quantize.tiles import Floats
from pmpd.exporter.quantize.uniform import Grid

__all__ = ["Hqq"]

SMALLEST = np.float32(1e-6)
"""Error, in steps, below which the shrinkage's power is not taken: it has a pole at zero."""


@dataclass(frozen=True, kw_only=True)
class Hqq(Rtn):
    """Rounding to nearest with optimized zero-points (Half-Quadratic Quantization, Badri & Shaji, 2023).

    The steps of the grid stay those of `Rtn`; its place is chosen per row and group for the least sum of
    ``|error|**q``, with q below one, which forgives a few large errors. A half-quadratic solver splits the problem: a
    sparse part takes up the large errors, by shrinkage, and the mean of what is left moves the grid. As published, but
    for two things: errors count in steps, so that scaled weights get the same codes, and each row and group keeps the
    best place that it has seen.

    Attributes: those of `Rtn`, and

        norm: q.
        beta: how much an error of a step counts against the sparse part, at first.
        kappa: what beta is multiplied by, each time.
        iterations: how often the grid moves.

    Raises:
        PmpdError: as `MethodOptions`.
    """

    name: ClassVar[str] = "hqq"

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def _grid(self, values: Floats) -> Grid:
        start = Grid.spanning(values, self.parent)
        positions = start.positions(values)  # [R, k], in steps
        shift = np.zeros_like(start.low)  # [R, 1], of the grid, in steps
        best, least = shift, np.full(shift.shape, np.inf)
        for iteration in range(self.iterations + 1):
            codes = np.rint(positions - shift).clip(0, 2**self.parent - 1)
            errors = positions - shift - codes
            total = (np.abs(errors) ** np.float32(self.norm)).sum(axis=1, keepdims=True, dtype=np.float64)
            better = total < least
            best, least = np.where(better, shift, best), np.where(better, total, least)
            sparse = self._sparse(errors, self.beta * self.kappa**iteration)
            shift = (positions - sparse - codes).mean(axis=1, keepdims=True)
        return Grid(start.low + start.step * best, start.step, self.parent)

    def _sparse(self, errors: Floats, beta: float) -> Floats:
        """Return the sparse part of errors: what generalized soft thresholding leaves of them."""
        size = np.abs(errors)
        shrunk: Floats = size - np.maximum(size, SMALLEST) ** np.float32(self.norm - 1) / np.float32(beta)
        sparse: Floats = np.copysign(shrunk.clip(0), errors)
        return sparse
