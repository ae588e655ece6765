"""Weighted one-dimensional k-means of many rows at once.

In one dimension the clusters of k-means are contiguous ranges of the sorted values, so a clustering is a list of
boundaries, and prefix sums give the error of any range. Rows are independent and equally long; all operations are
vectorized over them.

A clustering of R rows into m clusters is an integer array of boundaries ``[R, m + 1]``: cluster j of row r holds the
sorted positions ``[b[r, j], b[r, j + 1])``; the first boundary is 0, the last K, and empty clusters are allowed.
Boundaries never fall between equal values.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["SortedRows"]

Boundaries: TypeAlias = npt.NDArray[np.intp]

GRID = 64
"""Places per row where the coarse search may cut: rows of up to 64 values are clustered exactly (to 4 bits)."""

FINE_BITS = 2
"""With up to ``2**FINE_BITS`` clusters the error of the best boundaries on the grid is within 0.3 % of the least."""

COARSE_BITS = 4
"""With more than ``2**COARSE_BITS`` clusters the grid would be too coarse to start from."""

TINY = np.finfo(np.float64).tiny


class SortedRows:
    """R rows of K values, sorted once, with the prefix sums that every clustering of them needs.

    Args:
        values: float32 ``[R, K]``, finite, K >= 1.
        weights: float32 ``[R, K]``, all positive, with a mean of about 1 per row; None for all 1.
    """

    def __init__(self, values: npt.NDArray[np.float32], weights: npt.NDArray[np.float32] | None = None) -> None:
        R, K = values.shape
        self._sum = np.zeros((R, K + 1))  # of weight * value over the first i sorted values
        if weights is None:
            self._values = np.sort(values, axis=1)
            self._weights = None
            self._mass = np.broadcast_to(np.arange(K + 1.0), (R, K + 1))  # the sum of weights
            products = self._values.astype(np.float64)
        else:
            self._values, self._weights = _sort_pairs(values, weights)
            self._mass = np.zeros((R, K + 1))
            np.cumsum(self._weights.astype(np.float64), axis=1, out=self._mass[:, 1:])
            products = self._values.astype(np.float64)
            products *= self._weights
        np.cumsum(products, axis=1, out=self._sum[:, 1:])
        # The most that a boundary before each value may gain: nothing between equal values.
        self._ceiling = np.full((R, K), np.inf)
        self._ceiling[:, 1:] = np.where(self._values[:, 1:] == self._values[:, :-1], -1.0, np.inf)
        self._row_start = np.arange(R)[:, None] * K

    def cluster(self, bits: int) -> Boundaries:
        """Return boundaries ``[R, 2**bits + 1]`` of nearly least weighted squared error.

        Dynamic programming over a grid of places finds the region of the optimum, where Lloyd's iterations from a
        heuristic start would settle in a local one. Where the grid is coarse for so many clusters, each boundary in
        turn is then put at its exact optimum between its neighbours.
        """
        b = self._cluster_on_grid(min(bits, COARSE_BITS))
        for _ in range(bits - COARSE_BITS):
            b = self.split(b)
        if bits > FINE_BITS:
            between_odd = np.concatenate([b[:, :1], b[:, 1::2], b[:, -1:]], axis=1)
            b[:, 2:-1:2] = self._best_splits(between_odd)[:, 1:-1]
            b[:, 1::2] = self._best_splits(b[:, ::2])
        return b

    def split(self, boundaries: Boundaries) -> Boundaries:
        """Return boundaries ``[R, 2 m + 1]``: each of the m clusters cut in two where the error is least.

        A cluster without two distinct values leaves its lower half empty.
        """
        R, count = boundaries.shape
        halves = np.empty((R, 2 * count - 1), dtype=np.intp)
        halves[:, ::2] = boundaries
        halves[:, 1::2] = self._best_splits(boundaries)
        return halves

    def means(self, boundaries: Boundaries) -> npt.NDArray[np.float64]:
        """Return the weighted mean of each cluster, ``[R, m]``, ascending.

        An empty cluster stands at the first value after it (the last of the row, if there is none).
        """
        first = np.minimum(boundaries[:, :-1], self._values.shape[1] - 1)
        last = np.maximum(boundaries[:, 1:] - 1, first)
        mass = np.diff(np.take_along_axis(self._mass, boundaries, axis=1))
        total = np.diff(np.take_along_axis(self._sum, boundaries, axis=1))
        # The clip keeps rounding from breaking the order, and gives an empty cluster its place.
        lower, upper = (np.take_along_axis(self._values, i, axis=1) for i in (first, last))
        return np.clip(total / np.maximum(mass, TINY), lower, upper)

    def thresholds(self, boundaries: Boundaries) -> npt.NDArray[np.float32]:
        """Return ``[R, m - 1]``: a value's cluster is the number of thresholds it reaches."""
        K = self._values.shape[1]
        inner = boundaries[:, 1:-1]
        first = np.take_along_axis(self._values, np.minimum(inner, K - 1), axis=1)
        return np.where(inner < K, first, np.float32(np.inf))

    def _best_splits(self, boundaries: Boundaries) -> Boundaries:
        """Return the place ``[R, m]`` in each cluster where cutting it in two leaves the least error.

        Cutting a cluster of weight W and mean u at i lowers its error by ``d**2 * W / (w * (W - w))``, where w is the
        weight below the cut and d = (sum below the cut) - u * w. Every place of every cluster is tried.
        """
        R, K = self._values.shape
        mass, total = (np.take_along_axis(a, boundaries, axis=1) for a in (self._mass, self._sum))
        mean = np.diff(total) / np.maximum(np.diff(mass), TINY)
        length = np.diff(boundaries).ravel()

        def spread(per_cluster: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return np.repeat(per_cluster.ravel(), length).reshape(R, K)

        # In place throughout: fresh pages would cost more than the arithmetic.
        gain = spread(mean)
        gain *= self._mass[:, :-1]
        np.subtract(self._sum[:, :-1], gain, out=gain)
        gain -= spread(total[:, :-1] - mean * mass[:, :-1])
        gain *= gain
        below = spread(mass[:, :-1])
        np.subtract(self._mass[:, :-1], below, out=below)
        above = spread(mass[:, 1:])
        above -= self._mass[:, :-1]
        below *= above
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 at the start of a cluster, overwritten next
            gain /= below
        start = (boundaries[:, :-1] + self._row_start).ravel()
        occupied = np.flatnonzero(length)
        flat = gain.ravel()
        flat[start[occupied]] = -1.0
        np.minimum(gain, self._ceiling, out=gain)
        best = np.maximum.reduceat(flat, start[occupied])
        hits = np.flatnonzero(flat == np.repeat(best, length[occupied]))
        clusters = occupied[np.searchsorted(start[occupied], hits, side="right") - 1]
        # Backwards, so that the first of equals stays; a cluster that cannot be cut keeps its start.
        start[clusters[::-1]] = hits[::-1]
        places: Boundaries = start.reshape(R, -1) - self._row_start
        return places

    def _cluster_on_grid(self, bits: int) -> Boundaries:
        """Return the boundaries ``[R, 2**bits + 1]`` of least error among those on the grid (dynamic programming)."""
        grid = self._grid()
        R, places = grid.shape
        mass, total = (np.take_along_axis(a, grid, axis=1) for a in (self._mass, self._sum))
        total -= mass * (total[:, -1:] / mass[:, -1:])  # about the row's mean, against cancellation
        # gain[r, j, i] = (sum of weight * value)**2 / (sum of weight) of the run [i, j): what a cluster explains.
        gain = total[:, :, None] - total[:, None, :]
        gain *= gain
        run_mass = mass[:, :, None] - mass[:, None, :]
        with np.errstate(over="ignore"):  # where i > j, overwritten next
            gain /= np.maximum(run_mass, TINY, out=run_mass)
        np.minimum(gain, np.where(np.tri(places, dtype=bool), np.inf, -np.inf), out=gain)
        explained = gain[:, :, 0]  # by one cluster over [0, j)
        previous = []  # per further cluster and end j: where it starts
        for _ in range(2**bits - 2):
            np.add(gain, explained[:, None, :], out=run_mass)
            previous.append(run_mass.argmax(axis=2))
            explained = np.take_along_axis(run_mass, previous[-1][:, :, None], axis=2)[:, :, 0]
        path = [np.full((R, 1), places - 1)]
        path.append((gain[:, -1] + explained).argmax(axis=1, keepdims=True))
        for start in reversed(previous):
            path.append(np.take_along_axis(start, path[-1], axis=1))
        path.append(np.zeros((R, 1), dtype=np.intp))
        return np.take_along_axis(grid, np.concatenate(path[::-1], axis=1), axis=1)

    def _grid(self) -> Boundaries:
        """Return ascending candidate boundaries ``[R, min(K, GRID) + 1]``, from 0 to K.

        A long row is cut into stretches of equal ``sum(sqrt((weight + 1) * gap to the value before))``: short ones
        where values are dense, matter, or lie far out. The 1 sees to values whose copies weigh much, but not the first.
        """
        R, K = self._values.shape
        end = np.full((R, 1), K)
        if K <= GRID:
            run_start = np.maximum.accumulate(np.where(self._ceiling < 0, 0, np.arange(K)), axis=1)
            return np.concatenate([run_start, end], axis=1)
        length = np.zeros((R, K))
        np.subtract(self._values[:, 1:], self._values[:, :-1], out=length[:, 1:])
        if self._weights is not None:
            length *= self._weights + 1
        np.sqrt(length, out=length)
        np.cumsum(length, axis=1, out=length)
        # Rows on one ascending scale, GRID apart, so that one search serves them all.
        length *= GRID * (1 - 1e-9) / np.maximum(length[:, -1:], 1e-100)
        length += np.arange(R)[:, None] * float(GRID)
        cuts = np.searchsorted(length.ravel(), np.arange(R * GRID, dtype=np.float64)).reshape(R, GRID)
        return np.concatenate([cuts - self._row_start, end], axis=1)


def _sort_pairs(
    values: npt.NDArray[np.float32], weights: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Sort each row by value, then weight, and return both in that order.

    Each pair is one 64-bit key, which sorts faster than an index and leaves nothing to the sort's stability.
    """
    keys = _ordered_bits(values.view(np.int32)).astype(np.int64) << 32
    keys |= weights.view(np.int32)  # positive, so their bits ascend as they do
    keys.sort(axis=1)
    return _ordered_bits((keys >> 32).astype(np.int32)).view(np.float32), keys.astype(np.int32).view(np.float32)


def _ordered_bits(bits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Map the bits of float32 to integers in the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
