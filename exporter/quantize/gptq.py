"""GPTQ: rounding to nearest, column by column, with each column's error made up for in those after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize.base import MethodOptions, NestedCodes
from pmpd.exporter.quantize.moments import damped, feedback, fitted, one_thread_each
from pmpd.exporter.quantize.rtn import Rtn
from pmpd.exporter.quantize.tiles import FLOAT16_MAX, MAX_THREADS, Codes, Floats, checked
from pmpd.exporter.quantize.uniform import Grid
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.format.bitplanes import group_size

__all__ = ["Gptq"]

BLOCK = 128
"""Columns whose errors reach the columns after them in one product."""

TILE = 512
"""Rows that a thread works on at once, at most."""

SCRATCH = 1 << 27
"""Bytes that the sums over codes of a thread's rows may take: many codes and columns leave fewer rows."""


@dataclass(frozen=True, kw_only=True)
class Gptq(MethodOptions):
    """GPTQ (Frantar et al., ICLR 2023) on the levels of `Rtn`, in the order of the columns.

    The parent's codebooks hold the levels, as published. Lower precisions truncate the codes, for which the feedback
    was not meant; their codebooks are fitted to the outputs by least squares, which makes up for much of that.

    Two things differ from the paper: the moments are those of the unquantized model's activations, not of a model whose
    blocks before this one are quantized; and the output layer, which the paper leaves alone and of which there are no
    moments, is quantized as by `Rtn`.

    Attributes: those of `MethodOptions` (`seed` changes nothing), and

        damping: share of the mean diagonal of H that is added to it.

    Raises:
        PmpdError: as `MethodOptions`.
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[str]] = frozenset({"moments"})
    requires: ClassVar[frozenset[str]] = frozenset({"moments"})

    damping: float = 0.01

    def quantize(
        self, weight: npt.NDArray[np.floating], statistics: Mapping[str, npt.NDArray[np.floating]]
    ) -> NestedCodes:
        """Quantize one linear layer, on all cores; the result does not depend on how many there are.

        Args:
            weight: ``[N, K]``, any floating dtype; taken as float32.
            statistics: ``moments`` ``[K, K]``, as `pmpd.exporter.calibrate.moments` makes it. Without it (of the output
                layer there is none), weights are rounded to nearest.

        Raises:
            PmpdError: a weight that is not finite or too large for float16, or statistics that are not finite.
            ValueError: shapes that do not fit.
        """
        if "moments" not in statistics:
            nearest = Rtn(precisions=self.precisions, parent=self.parent, seed=self.seed, groups=self.groups)
            return nearest.quantize(weight)
        N, K = weight.shape
        H = damped(statistics["moments"], K, self.damping)
        rows = max(1, min(TILE, SCRATCH // (4 * 2**self.parent * K)))

        def quantize_rows(n: int) -> NestedCodes:
            values = checked("weight", weight, np.s_[n : n + rows, 0:K], -FLOAT16_MAX, FLOAT16_MAX)
            return self._quantized(values, H, factor)

        with one_thread_each(min(available_threads(), MAX_THREADS)) as pool:
            factor = pool.submit(feedback, H).result()
            return NestedCodes.stack(list(pool.map(quantize_rows, range(0, N, rows))))

    def _quantized(self, weight: Floats, H: Floats, factor: Floats) -> NestedCodes:
        codes, grids = self._rounded(weight, factor)
        books: dict[int, npt.NDArray[np.floating]] = {}
        for p in self.precisions:
            books[p] = np.zeros((len(weight), self.groups, 2**p), dtype=np.float32)  # an empty group keeps its zeros
            books[p][:, : len(grids)] = np.stack([grid.levels(p) for grid in grids], axis=1)
        if lower := {p: book for p, book in books.items() if p < self.parent}:
            books |= fitted(weight, H, codes >> (self.parent - max(lower)), lower)
        limited = {p: book.clip(-FLOAT16_MAX, FLOAT16_MAX).astype(np.float16) for p, book in books.items()}
        return NestedCodes(codes, limited)

    def _rounded(self, weight: Floats, factor: Floats) -> tuple[Codes, list[Grid]]:
        """Return the codes ``[R, K]`` of weights, and the grids of their groups."""
        import torch  # not at the top: a skeleton needs the names of methods alone, and no torch

        K, size = weight.shape[1], group_size(weight.shape[1], self.groups)
        left = np.ascontiguousarray(weight.T)  # [K, R], what the columns should still give
        codes = np.empty(left.shape, dtype=np.uint8)
        grids = []
        for begin in range(0, K, size):
            end = min(begin + size, K)
            grid = Grid.spanning(left[begin:end].T, self.parent)
            grids.append(grid)
            levels = grid.levels(self.parent).astype(np.float16).astype(np.float32)  # [R, L], as the codebook has them
            for first in range(begin, end, BLOCK):
                last = min(first + BLOCK, end)
                errors = np.empty_like(left[first:last])
                for j in range(first, last):
                    codes[j] = grid.codes(left[j, :, None])[:, 0]
                    value = np.take_along_axis(levels, codes[j, :, None].astype(np.intp), axis=1)[:, 0]
                    error = (left[j] - value) / factor[j, j]
                    left[j + 1 : last] -= factor[j, j + 1 : last, None] * error
                    errors[j - first] = error
                later = torch.from_numpy(left[last:])
                later -= torch.from_numpy(factor[first:last, last:]).T @ torch.from_numpy(errors)
        return np.ascontiguousarray(codes.T), grids
