"""What a kernel may answer: the sum in float64 and how far float32 arithmetic may be from it.

A float32 operation is off by at most u = 2^-24 of its result, and a sum in which no term passes more than n additions
by at most about n u times the sum of the terms' magnitudes (Higham, Accuracy and Stability of Numerical Algorithms,
section 4.2). Below float32's least normal number every operation may be off by 2^-149 besides.

8-bit kernels compute with other numbers than they are given, but exactly known ones: `int8_codebook` and
`int8_activations` are their definition. The bound is that of the float32 operations around the integers, so that one
wrong weight is not taken for rounding. Values halfway between two steps may go either way; `off_ties` moves them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from kernel_programs import UNTOUCHED, Case

from pmpd.runtime.format.bitplanes import row_stride, unpack
from pmpd.tvm_kernels.ops.matmul.kernel import MatmulKernel

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

U, LEAST = 2.0**-24, 2.0**-149
GROUP = 32  # columns that share a scale
SMALLEST_RANGE = 1e-30  # narrower codebooks and smaller activations count as constant
TIE = 1e-3  # of a step: more than the rounding of the position, less than anything a test needs


def check(kernel: MatmulKernel | None, case: Case, y: Floats) -> None:
    """Hold y [M, N] to the oracle: near enough in rows [begin, end), and not written elsewhere. None is `pmpd_any`."""
    want, bound = expected(kernel, case)
    rows = slice(case.begin, case.end)
    written = y.view(np.uint32) != UNTOUCHED
    assert written[:, rows].all(), "a result is missing"
    assert written.sum() == written[:, rows].size, "a row outside of [begin, end) was written"
    error = np.abs(y[:, rows].astype(np.float64) - want[:, rows])
    wrong = np.argwhere(~(error <= bound[:, rows]))  # NaN too
    worst = (error / bound[:, rows]).max(initial=0.0)
    assert not len(wrong), f"off by {worst:.3g} of what rounding explains, first at {wrong[0]}"


def expected(kernel: MatmulKernel | None, case: Case) -> tuple[Doubles, Doubles]:
    """Return y [M, N] and how far float32 may be from it, for a kernel's order of summation; None is `pmpd_any`."""
    S = row_stride(case.x.shape[1])
    if kernel is None:  # 16 lanes and up to 15 columns of every line, lines, products
        (y, magnitude), additions = product(case), 512 // 16 + 4 + 15 + S // 64 + 2
    elif kernel.accuracy == "exact":  # a lane sums 1/words of the columns at most; lanes and stretches are added up
        (y, magnitude), additions = product(case), 8 * S // kernel.isa.words + 8
    else:  # groups of the row (the sum of x), vectors of it in every lane, and what is made of both
        (y, magnitude), additions = int8_product(case, kernel.isa.levels), S // 4 + S // kernel.isa.width + 32
    return y, additions * U * magnitude + case.x.shape[1] * LEAST


@lru_cache(maxsize=256)
def product(case: Case) -> tuple[Doubles, Doubles]:
    """Return y [M, N] and the sum of the magnitudes of its terms."""
    weight, x = case.weight.astype(np.float64).T, case.x.astype(np.float64)
    return x @ weight, np.abs(x) @ np.abs(weight)


@lru_cache(maxsize=256)
def int8_product(case: Case, levels: int) -> tuple[Doubles, Doubles]:
    """Return y [M, N] of 8-bit steps of weights and activations, and the magnitude that its sums may reach."""
    K = case.x.shape[1]
    low, step, codes = int8_codebook(case.codebook, levels)
    codes = np.take_along_axis(codes, unpack(case.planes, K).astype(np.intp), axis=1)
    steps, scale = int8_activations(case.x)
    x = (steps * scale[..., None]).reshape(len(case.x), -1)
    y = x[:, :K] @ (low + step * codes).T
    return y, np.abs(x).sum(axis=1)[:, None] * (np.abs(low) + levels * step).T


def int8_codebook(codebook: npt.NDArray[np.float16], levels: int) -> tuple[Doubles, Doubles, Doubles]:
    """Return low [N, 1], step [N, 1] and codes [N, 2^p]: the entries are low + step codes, in `levels` equal steps."""
    values = codebook[:, 0].astype(np.float64)
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    step = np.maximum(high - low, SMALLEST_RANGE) / (levels - 1)
    return low, step, np.floor((values - low) / step + 0.5)


def int8_activations(x: Floats) -> tuple[Doubles, Doubles]:
    """Return steps [M, groups, 32] from -127 to 127 and the scale [M, groups] of each: columns of a group share it."""
    padded = np.zeros((len(x), 8 * row_stride(x.shape[1])))
    padded[:, : x.shape[1]] = x
    groups = padded.reshape(len(x), -1, GROUP)
    largest = np.abs(groups).max(axis=2)
    return np.rint(groups * (127 / np.maximum(largest, SMALLEST_RANGE))[..., None]), largest / 127


def off_ties(case: Case) -> Case:
    """Move codebook entries and activations away from the middle between two steps, for 128 and for 256 levels."""
    codebook = case.codebook.copy()
    low, high = codebook.min(axis=2, keepdims=True), codebook.max(axis=2, keepdims=True)
    away = (high.astype(np.float64) - low) * TIE / 50  # out of a tie at one go, where float16 can do it
    while (ties := _codebook_ties(codebook)).any():
        codebook[ties] = np.nextafter((codebook + away)[ties].astype(np.float16), np.float16(np.inf))
    M, K = case.x.shape
    x = np.zeros((M, 8 * row_stride(K)), np.float32)
    x[:, :K] = case.x
    groups = x.reshape(M, -1, GROUP)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    groups[_half_way(groups * (127 / np.maximum(largest, SMALLEST_RANGE)))] *= np.float32(0.98)
    return replace(case, codebook=codebook, x=np.ascontiguousarray(x[:, :K]))


def _codebook_ties(codebook: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    ties = np.zeros(codebook.shape, dtype=bool)
    for levels in (128, 256):
        low, step, _ = int8_codebook(codebook, levels)
        ties[:, 0] |= _half_way((codebook[:, 0] - low) / step)
    return ties


def _half_way(positions: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = np.abs(positions - np.floor(positions) - 0.5) < TIE
    return found
