"""Any-Precision LLM's method: weighted k-means at a seed precision, then clusters cut in two, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize.base import MethodOptions, NestedCodes
from pmpd.exporter.quantize.kmeans import GRID, SortedRows
from pmpd.exporter.quantize.tiles import Books, Codes, Floats, Tile, checked, quantize_tiles
from pmpd.runtime.format.bitplanes import group_size

__all__ = ["AnyPrecision"]

TILE = 1 << 17
"""Weights that a thread works on at once, with some 15 MB of temporaries."""

FLOAT32_MAX = float(np.finfo(np.float32).max)

SENSITIVITY_FLOOR = 2.0**-20
"""Added to sensitivities whose mean is one: every weight counts for something, and all zeros become uniform."""


@dataclass(frozen=True, kw_only=True)
class AnyPrecision(MethodOptions):
    """Nested non-uniform quantization by incremental upscaling (Any-Precision LLM, Park et al., ICML 2024, Section 4).

    Per row and group of columns: sensitivity-weighted one-dimensional k-means at the seed precision, then each cluster
    is cut in two where that leaves the least error, bit by bit up to the parent. A precision below the seed merges
    neighbouring clusters. Each codebook holds the weighted means of the weights that have its codes.

    Attributes: those of `MethodOptions`; `seed` is the bits of the k-means that the cuts start from.

    Raises:
        PmpdError: as `MethodOptions`.
    """

    name: ClassVar[str] = "anyprecision"
    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})
    requires: ClassVar[frozenset[str]] = frozenset()

    def quantize(
        self, weight: npt.NDArray[np.floating], statistics: Mapping[str, npt.NDArray[np.floating]] | None = None
    ) -> NestedCodes:
        """Quantize one linear layer, on all cores; the result does not depend on how many there are.

        Args:
            weight: ``[N, K]``, any floating dtype; taken as float32.
            statistics: ``fisher`` ``[N, K]``, at least 0: how much an error of each weight matters. Without it, or
                where it is zero all over a row and group, all weights count alike.

        Raises:
            PmpdError: a weight that is not finite or too large for float16; a sensitivity negative or not finite.
            ValueError: the weight is not a matrix, or there is not one sensitivity per weight.
        """
        sensitivity = (statistics or {}).get("fisher")
        if sensitivity is not None and sensitivity.shape != weight.shape:
            raise ValueError(f"sensitivity must be {list(weight.shape)} as the weight, got {list(sensitivity.shape)}")

        def quantize_tile(values: Floats, tile: Tile) -> tuple[Codes, Books]:
            weights = None
            if sensitivity is not None:
                weights = _relative(checked("sensitivity", sensitivity, tile, 0.0, FLOAT32_MAX))
            clusters = SortedRows(values, weights)
            boundaries = clusters.cluster(self.seed)
            for _ in range(self.parent - self.seed):
                boundaries = clusters.split(boundaries)
            codes = _assign(values, clusters.thresholds(boundaries))
            return codes, {p: clusters.means(boundaries[:, :: 2 ** (self.parent - p)]) for p in self.precisions}

        columns = max(1, group_size(weight.shape[-1], self.groups))
        rows = max(1, TILE // max(columns, min(columns, GRID) ** 2 // 2))
        return quantize_tiles(weight, self, quantize_tile, rows=rows)


def _relative(sensitivity: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return sensitivities ``[R, K]`` scaled to a mean of one per row, and all positive."""
    mean = sensitivity.mean(axis=1, keepdims=True, dtype=np.float64)
    return (sensitivity / np.where(mean > 0, mean, 1.0) + SENSITIVITY_FLOOR).astype(np.float32)


def _assign(values: npt.NDArray[np.float32], thresholds: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return for each value ``[R, K]`` how many of its row's thresholds ``[R, m - 1]`` it reaches."""
    codes = np.zeros(values.shape, dtype=np.uint8)
    reached = np.empty(values.shape, dtype=bool)
    for threshold in thresholds.T:
        np.greater_equal(values, threshold[:, None], out=reached)
        codes += reached.view(np.uint8)
    return codes
