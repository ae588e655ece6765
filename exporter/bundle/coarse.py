"""Coarse to fine in the output layer: the tensors of `pmpd::BitplaneLogits`, and its limits.

The first planes of a row, with a codebook of their own, give its logit up to ``x · r`` for a residual r: what the
other planes change of the row. Cauchy-Schwarz bounds it without reading r: ``|x · r| <= |x| |r|``, which is loose. But
half of the energy of activations before an output layer is in a few directions, where a residual has almost none of
its own. So the bound is taken in each group of directions of a basis, and added up: ``sum over g of |x_g| |r_g|``. Any
matrix may be the basis; a good one makes the bound sharp.

Rounding is part of the bound: that of 8-bit codebooks, whose residuals are other ones, and that of sums in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize import NestedCodes
from pmpd.runtime.format.bitplanes import row_stride

__all__ = ["basis_of", "bounds", "coarse_tensors", "direction_groups", "limits"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

U = 2.0**-24
ROWS = 4096  # worked on at a time
# Steps of an 8-bit codebook, by instruction set; None: none, in float kernels.
LEVELS = (None, 256, 128)
SMALLEST_RANGE = 1e-30  # of an 8-bit codebook
TIE = 1e-4  # of a step: more than the rounding of its position
LEAST_HALF = 2.0**-24  # the least positive float16


def direction_groups(directions: int) -> list[slice]:
    """Return the groups of a basis: its first direction, and up to the 4th, the 16th, and so on."""
    ends = [0, 1]
    while ends[-1] < directions:
        ends.append(min(4 * ends[-1], directions))
    return [slice(begin, end) for begin, end in pairwise(ends)]


def basis_of(activations: Floats, directions: int) -> Floats:
    """Return the directions ``[D, K]`` that hold most of the energy of activations ``[T, K]``, greatest first."""
    activations = activations[np.isfinite(activations).all(axis=1)].astype(np.float64)
    K = activations.shape[1]
    # The unit vectors fill up where there are fewer activations than directions.
    energy = activations.T @ activations + np.eye(K) * 1e-9 * max(float(np.square(activations).sum()) / K, 1e-30)
    values, vectors = np.linalg.eigh(energy)
    order = np.argsort(values)[::-1][:directions]
    return np.ascontiguousarray(vectors[:, order].T, dtype=np.float32)


def coarse_tensors(
    layer: str, quantized: NestedCodes, parent: int, bits: int, basis: Floats
) -> Iterator[tuple[str, npt.NDArray[np.float16] | Floats]]:
    """Yield the basis and the bound of a layer whose first `bits` of `parent` planes give coarse results."""
    yield f"{layer}.basis", basis
    yield f"{layer}.bound", bounds(quantized, parent, bits, basis)


def bounds(quantized: NestedCodes, parent: int, bits: int, basis: Floats) -> npt.NDArray[np.float16]:
    """Return how far coarse results may be from whole ones: float16 ``[B, N]`` for the groups of ``basis [D, K]``.

    A result is off by at most the sum over the groups of ``reach[g] bound[g, n]`` (`limits`), whether kernels compute
    in floats or in 8 bits.
    """
    N, K = quantized.codes.shape
    groups = direction_groups(len(basis))
    bound = np.zeros((len(groups) + 1, N))
    # What the basis lacks of being orthonormal.
    square = basis.astype(np.float64) @ basis.T.astype(np.float64)
    defect = float(np.linalg.norm(square - np.eye(len(basis))))
    for begin in range(0, N, ROWS):
        rows = slice(begin, begin + ROWS)
        codes = quantized.codes[rows].astype(np.intp)
        for levels in LEVELS:
            fine, fine_error = _as_computed(quantized.codebooks[parent][rows], levels, codes)
            coarse, coarse_error = _as_computed(quantized.codebooks[bits][rows], levels, codes >> (parent - bits))
            change = fine - np.repeat(coarse, 2 ** (parent - bits), axis=1)  # [n, 2^P]
            residual = np.take_along_axis(change.astype(np.float32), codes, axis=1)  # [n, K]
            parts = residual @ basis.T  # [n, D]
            remainder = residual - parts @ basis
            norms = [np.linalg.norm(parts[:, group].astype(np.float64), axis=1) for group in groups]
            norms.append(np.linalg.norm(remainder.astype(np.float64), axis=1))
            # float32 here, and the basis: x · r = (B x) · (B r) + x' · r' + (B x) · (B r') with B r' = (1 - B Bᵀ) B r.
            slack = (2 * defect + 4 * np.sqrt(K) * U) * np.linalg.norm(residual.astype(np.float64), axis=1)
            # The sum of all reaches is at least the norm of x, so what is added to every group bounds |x| times it.
            bound[:, rows] = np.maximum(bound[:, rows], np.stack(norms) + slack + fine_error + coarse_error)
    return _round_up(bound)


def limits(x: Doubles, basis: Floats, bound: npt.NDArray[np.float16]) -> Doubles:
    """Return the limits ``[M, N]``: how far coarse results for activations ``[M, K]`` may be from whole ones.

    `x` are the activations as kernels see them: those of 8-bit kernels are rounded.
    """
    parts = x @ basis.T.astype(np.float64)  # [M, D]
    remainder = x - parts @ basis.astype(np.float64)
    reach = [np.linalg.norm(parts[:, group], axis=1) for group in direction_groups(len(basis))]
    reach.append(np.linalg.norm(remainder, axis=1))
    limit: Doubles = np.stack(reach, axis=1) @ bound.astype(np.float64)
    return limit


def _as_computed(
    codebook: npt.NDArray[np.float16], levels: int | None, codes: npt.NDArray[np.intp]
) -> tuple[Doubles, Doubles]:
    """Return the values ``[n, 2^p]`` that kernels compute with, and how far their results may be off, over |x|.

    A sum in float32 is off by the additions that a term passes, times u, times the sum of magnitudes. Those of a kernel
    are at most the ones written here: tests/kernels/kernel_oracle.py has them by instruction set.
    """
    values = codebook[:, 0].astype(np.float64)
    K = codes.shape[1]
    S = row_stride(K)
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    if levels is None:
        largest = np.maximum(np.abs(low), np.abs(high))[:, 0]
        return values, (2 * S + 64) * U * np.sqrt(K) * largest
    step = np.maximum(high - low, SMALLEST_RANGE) / (levels - 1)
    position = (values - low) / step
    rounded = low + step * np.floor(position + 0.5)
    error = (S // 4 + S // 16 + 32) * U * np.sqrt(K) * (np.abs(low) + levels * step)[:, 0]
    # What is halfway between two steps may go either way: float32 decides.
    halfway = np.abs(position - np.floor(position) - 0.5) < TIE
    for row in np.flatnonzero(halfway.any(axis=1)):
        error[row] += step[row, 0] * np.sqrt(np.count_nonzero(halfway[row, codes[row]]))
    return rounded, error


def _round_up(values: Doubles) -> npt.NDArray[np.float16]:
    """Return positive numbers as float16, rounded up; beyond its range they are infinite."""
    with np.errstate(over="ignore"):
        halves = np.maximum(values, LEAST_HALF).astype(np.float16)
    low = halves.astype(np.float64) < values
    halves[low] = np.nextafter(halves[low], np.float16(np.inf))
    return halves
