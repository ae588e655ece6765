"""What floating-point and 8-bit arithmetic may make of a node's result: references in float64, and error bounds.

A sum of n terms whose additions are rounded to float32 (u = 2^-24) is off by about ``sqrt(n) u`` of the sum of the
terms' magnitudes; by more than ``LAMBDA sqrt(n) u`` practically never, whatever the order of the additions (Higham and
Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41, 2019). The sum of magnitudes is
bounded by the product of the norms (Cauchy-Schwarz), so the bound follows from the node's own numbers: outliers raise
it, and the depth of the network does not.

8-bit kernels compute with other numbers than they are given, but exactly known ones: a row's codebook in equal steps
between its smallest and largest entry, and activations in steps of 1/127 of the largest of every 32 columns. The
reference is the product of those numbers, so that one wrong sign is not taken for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "HALF_U",
    "LAMBDA",
    "LEAST",
    "LEVELS",
    "Rounded",
    "U",
    "int8_product_bound",
    "moved",
    "product_bound",
    "round_activations",
    "round_codebook",
]

Doubles = npt.NDArray[np.float64]

U = 2.0**-24
HALF_U = 2.0**-11  # of float16
LAMBDA = 8.0
LEAST = 1e-30  # float32 numbers below it are subnormal, or nearly
GROUP = 32  # columns that share a scale
SMALLEST_RANGE = 1e-30  # narrower codebooks and smaller activations count as constant
# Steps of an 8-bit codebook: 128 where an instruction set adds products of bytes in 16 bits (AVX2), 256 elsewhere.
LEVELS = (256, 128)
# Numbers so near the middle between two steps may be rounded either way: float32 decides, in units of a step.
TIE = 1e-4


@dataclass(frozen=True)
class Rounded:
    """Numbers rounded to 8-bit steps.

    Attributes:
        values: the rounded numbers, in the shape of the originals.
        ties: per row, by how much rounding the other way where a number lies between two steps may change them in sum.
        scale: per row, what a kernel's float32 sums add up in magnitude, per unit of the other factor.
    """

    values: Doubles
    ties: Doubles
    scale: Doubles


def product_bound(columns: int, activations: Doubles, weights: Doubles, result: Doubles) -> Doubles:
    """Return how far float32 may be from ``y [M, N] = x Wᵀ + b``.

    Args:
        columns: terms of each sum.
        activations: norm of each row of x, ``[M]``.
        weights: norm of each row of W, ``[N]``.
        result: y.
    """
    sums: Doubles = LAMBDA * np.sqrt(columns) * U * activations[:, None] * weights
    return sums + 2 * U * np.abs(result) + LEAST


def int8_product_bound(columns: int, x: Rounded, codebook: Rounded, result: Doubles) -> Doubles:
    """Return how far float32 may be from the product ``y [M, N]`` of 8-bit steps.

    Sums within a group of columns are exact integers; over the groups they are floats, of codes and of activations.
    """
    additions = columns / GROUP + 32
    sums: Doubles = LAMBDA * np.sqrt(additions) * U * x.scale[:, None] * codebook.scale
    largest = np.abs(codebook.values).max(axis=(1, 2))
    ties = x.ties[:, None] * largest + x.scale[:, None] * codebook.ties
    bound: Doubles = sums + ties + 2 * U * np.abs(result) + LEAST
    return bound


def moved(weights: Mapping[str, npt.NDArray[np.float32]], size: float) -> dict[str, npt.NDArray[np.float32]]:
    """Return weights with random relative noise whose root mean square is `size`, always the same."""
    rng, reach = np.random.default_rng(0), math.sqrt(3) * size
    return {
        name: (weight * (1 + rng.uniform(-reach, reach, weight.shape))).astype(np.float32)
        for name, weight in weights.items()
    }


def round_codebook(codebook: npt.NDArray[np.float16], levels: int) -> Rounded:
    """Round a codebook ``[N, 1, 2^p]`` to `levels` equal steps of each row."""
    values = codebook[:, 0].astype(np.float64)
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    step = np.maximum(high - low, SMALLEST_RANGE) / (levels - 1)
    position = (values - low) / step
    ties = np.where(_halfway(position).any(axis=1), step[:, 0], 0.0)
    rounded = low + step * np.floor(position + 0.5)
    return Rounded(rounded[:, None], ties, (np.abs(low) + levels * step)[:, 0])


def round_activations(x: Doubles) -> Rounded:
    """Round activations ``[M, K]`` to -127 to 127 times the scale of their 32 columns."""
    M, K = x.shape
    padded = np.zeros((M, -(-K // GROUP) * GROUP))
    padded[:, :K] = x
    groups = padded.reshape(M, -1, GROUP)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    position = groups * (127 / np.maximum(largest, SMALLEST_RANGE))
    scale = largest / 127
    values = (np.rint(position) * scale).reshape(M, -1)[:, :K]
    ties = (_halfway(position) * scale).sum(axis=(1, 2))
    return Rounded(values, ties, np.abs(values).sum(axis=1))


def _halfway(position: Doubles) -> npt.NDArray[np.bool_]:
    near: npt.NDArray[np.bool_] = np.abs(position - np.floor(position) - 0.5) < TIE
    return near
