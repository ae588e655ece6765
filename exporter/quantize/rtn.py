"""Rounding to nearest: the baseline that needs nothing but the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize.base import MethodOptions, NestedCodes
from pmpd.exporter.quantize.tiles import Books, Codes, Floats, Tile, quantize_tiles
from pmpd.exporter.quantize.uniform import TILE, Grid, means
from pmpd.runtime.format.bitplanes import group_size

__all__ = ["Rtn"]


@dataclass(frozen=True, kw_only=True)
class Rtn(MethodOptions):
    """Evenly spaced levels from the least to the greatest weight of a row and group; each weight takes the nearest.

    This is what papers on quantization compare with as RTN (asymmetric, per output channel or group). Lower precisions
    truncate the parent's codes.

    Attributes: those of `MethodOptions` (`seed` changes nothing), and

        fitted: whether a code below the parent's precision stands for the mean of the weights that have it, which
            leaves less error, or for the middle of its run of levels.

    Raises:
        PmpdError: as `MethodOptions`.
    """

    name: ClassVar[str] = "rtn"
    needs: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()

    fitted: bool = True

    def quantize(
        self, weight: npt.NDArray[np.floating], statistics: Mapping[str, npt.NDArray[np.floating]] | None = None
    ) -> NestedCodes:
        """Quantize one linear layer, on all cores; the result does not depend on how many there are.

        Args:
            weight: ``[N, K]``, any floating dtype; taken as float32.
            statistics: not used.

        Raises:
            PmpdError: a weight that is not finite or too large for float16.
            ValueError: the weight is not a matrix.
        """

        def quantize_tile(values: Floats, _: Tile) -> tuple[Codes, Books]:
            grid = self._grid(values)
            codes = grid.codes(values)
            books: Books = {p: grid.levels(p) for p in self.precisions}
            if self.fitted:
                lower = [p for p in books if p < self.parent]
                books |= {p: means(values, codes >> (self.parent - p), books[p]) for p in lower}
            return codes, books

        columns = max(1, group_size(weight.shape[-1], self.groups))
        return quantize_tiles(weight, self, quantize_tile, rows=max(1, TILE // columns))

    def _grid(self, values: Floats) -> Grid:
        """Return the levels for the rows of a group ``[R, k]``."""
        return Grid.spanning(values, self.parent)
