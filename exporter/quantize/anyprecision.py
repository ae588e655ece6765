"""Any-Precision LLM's method: weighted k-means at a seed precision, then clusters cut in two, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize.base import NestedCodes
from pmpd.exporter.quantize.kmeans import GRID, SortedRows
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bitplanes import MAX_PRECISION, group_size

__all__ = ["AnyPrecision"]

TILE = 1 << 17
"""Weights that a thread works on at once, with some 15 MB of temporaries."""

MAX_THREADS = 16

FLOAT16_MAX = float(np.finfo(np.float16).max)
FLOAT32_MAX = float(np.finfo(np.float32).max)

SENSITIVITY_FLOOR = 2.0**-20
"""Added to sensitivities whose mean is one: every weight counts for something, and all zeros become uniform."""


@dataclass(frozen=True, kw_only=True)
class AnyPrecision:
    """Nested non-uniform quantization by incremental upscaling (Any-Precision LLM, Park et al., ICML 2024, Section 4).

    Per row and group of columns: sensitivity-weighted one-dimensional k-means at the seed precision, then each cluster
    is cut in two where that leaves the least error, bit by bit up to the parent. A precision below the seed merges
    neighbouring clusters. Each codebook holds the weighted means of the weights that have its codes.

    Attributes:
        precisions: bits of the codebooks to make, each 1 to `parent`.
        parent: bits of the codes, 1 to 8.
        seed: bits of the k-means that the cuts start from, 1 to `parent`.
        groups: G, runs of columns per row; each has its own codebook.

    Raises:
        PmpdError: a value out of its range, or a precision that is listed twice.
    """

    name: ClassVar[str] = "anyprecision"
    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})
    requires: ClassVar[frozenset[str]] = frozenset()

    precisions: tuple[int, ...] = (4, 3, 2)
    parent: int = 4
    seed: int = 2
    groups: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.parent <= MAX_PRECISION:
            raise PmpdError(f"parent precision must be 1 to {MAX_PRECISION} bits, got {self.parent}")
        for name, bits in (("seed precision", self.seed), *(("precision", p) for p in self.precisions)):
            if not 1 <= bits <= self.parent:
                raise PmpdError(f"{name} must be 1 to {self.parent} bits (the parent precision), got {bits}")
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise PmpdError(f"precisions must be one or more, without repeats, got {list(self.precisions)}")
        if self.groups < 1:
            raise PmpdError(f"groups must be 1 or more, got {self.groups}")

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
        if weight.ndim != 2 or not weight.size:
            raise ValueError(f"weight must be a matrix [N, K], got {list(weight.shape)}")
        sensitivity = (statistics or {}).get("fisher")
        if sensitivity is not None and sensitivity.shape != weight.shape:
            raise ValueError(f"sensitivity must be {list(weight.shape)} as the weight, got {list(sensitivity.shape)}")
        N, K = weight.shape
        codes = np.empty((N, K), dtype=np.uint8)
        # An empty group keeps a codebook of zeros that no code refers to.
        codebooks = {p: np.zeros((N, self.groups, 2**p), dtype=np.float16) for p in self.precisions}
        columns = group_size(K, self.groups)
        rows = max(1, TILE // max(columns, min(columns, GRID) ** 2 // 2))

        def quantize_tile(corner: tuple[int, int]) -> None:
            n, k = corner
            tile = np.s_[n : n + rows, k : k + columns]
            values = _checked("weight", weight, tile, -FLOAT16_MAX, FLOAT16_MAX)
            weights = None
            if sensitivity is not None:
                weights = _relative(_checked("sensitivity", sensitivity, tile, 0.0, FLOAT32_MAX))
            clusters = SortedRows(values, weights)
            boundaries = clusters.cluster(self.seed)
            for _ in range(self.parent - self.seed):
                boundaries = clusters.split(boundaries)
            codes[tile] = _assign(values, clusters.thresholds(boundaries))
            for p, codebook in codebooks.items():
                codebook[n : n + rows, k // columns] = clusters.means(boundaries[:, :: 2 ** (self.parent - p)])

        # Freed once, a block of this size makes glibc keep that much memory for the temporaries; by default it hands
        # every one of them back to the system, and page faults take as long as the arithmetic.
        np.empty(24 << 20, dtype=np.uint8)
        with ThreadPoolExecutor(min(available_threads(), MAX_THREADS)) as pool:
            list(pool.map(quantize_tile, product(range(0, N, rows), range(0, K, columns))))
        return NestedCodes(codes, codebooks)


def _checked(
    what: str, array: npt.NDArray[np.floating], tile: tuple[slice, slice], low: float, high: float
) -> npt.NDArray[np.float32]:
    """Return a tile as float32, or raise PmpdError about its first value that is not a number from `low` to `high`."""
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array[tile], dtype=np.float32)
    good = (values >= low) & (values <= high)
    if not good.all():
        row, column = (int(i) + side.start for i, side in zip(np.argwhere(~good)[0], tile, strict=True))
        raise PmpdError(
            f"{what} [{row}, {column}] is {array[row, column]}, not a number from {low:g} to {high:g}: "
            "check where it comes from"
        )
    return values


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
