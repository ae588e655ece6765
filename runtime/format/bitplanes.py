"""The nested weight layout: one parent code per weight, stored plane by plane, most significant bit first.

This is the contract that the exporter writes, every kernel reads and the tests hold all of them to; the functions here
are its reference implementation in numpy. The symbols are those of the format:

* ``N`` outputs (rows) and ``K`` inputs (columns) of a linear layer, parent precision ``P`` (1 to 8 bits);
* ``codes`` uint8 ``[N, K]``, each in ``[0, 2**P)``. The p-bit code is ``codes >> (P - p)``: the p-bit model is the top
  p bits of its parent (Any-Precision LLM, Park et al., ICML 2024; PMPD paper, Section 5 "Implementation details");
* ``planes`` uint8 ``[P, N, S]``: plane i holds bit ``P - 1 - i`` of every code, eight columns to a byte, column
  ``8 b + j`` in bit j of byte b. The row stride ``S`` is ``K / 8`` rounded up to whole 64-byte lines; padding bits are
  zero. The first p planes of the parent *are* the p-bit tensor ``[p, N, S]``;
* ``codebook`` float16 ``[N, G, 2**p]``: the value of each p-bit code, per row and group of columns. A group is
  ``group_size(K, G)`` columns, whole bytes of a plane; the last groups of a row may be short or empty.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "CACHE_LINE",
    "MAX_PRECISION",
    "bitplane_matmul",
    "dequantize",
    "group_size",
    "pack",
    "row_stride",
    "unpack",
]

CACHE_LINE = 64
MAX_PRECISION = 8


def row_stride(columns: int) -> int:
    """Return S, the bytes that one row of one plane takes: ``columns / 8`` rounded up to a multiple of 64."""
    return -(-columns // (8 * CACHE_LINE)) * CACHE_LINE


def group_size(columns: int, groups: int) -> int:
    """Return how many columns share one codebook: ``columns / groups`` rounded up to a multiple of 8."""
    return -(-columns // (8 * groups)) * 8


def pack(codes: npt.NDArray[np.uint8], precision: int) -> npt.NDArray[np.uint8]:
    """Pack codes ``[N, K]`` of `precision` bits into planes ``[precision, N, S]``.

    Raises:
        ValueError: the precision is not 1 to 8, or a code does not fit in it.
    """
    if not 1 <= precision <= MAX_PRECISION:
        raise ValueError(f"precision must be 1 to {MAX_PRECISION} bits, got {precision}")
    if codes.size and int(codes.max()) >> precision:
        raise ValueError(f"code {int(codes.max())} does not fit in {precision} bits")
    N, K = codes.shape
    planes = np.zeros((precision, N, row_stride(K)), dtype=np.uint8)
    for i in range(precision):
        bits = (codes >> (precision - 1 - i)) & 1
        planes[i, :, : -(-K // 8)] = np.packbits(bits, axis=1, bitorder="little")
    return planes


def unpack(planes: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.uint8]:
    """Return the codes ``[N, K]`` that planes ``[p, N, S]`` hold; fewer planes give the codes of a lower precision."""
    _, N, _ = planes.shape
    codes = np.zeros((N, columns), dtype=np.uint8)
    for plane in planes:
        codes <<= 1
        codes |= np.unpackbits(plane, axis=1, count=columns, bitorder="little")
    return codes


def dequantize(
    planes: npt.NDArray[np.uint8], codebook: npt.NDArray[np.float16], columns: int
) -> npt.NDArray[np.float32]:
    """Return the float32 weights ``[N, K]`` of planes ``[p, N, S]`` under their codebook ``[N, G, 2**p]``."""
    N, G, levels = codebook.shape
    groups = np.arange(columns) // group_size(columns, G)
    entries = unpack(planes, columns) + (groups * levels).astype(np.intp)  # (N, K): places in a row's table
    entries += np.arange(N)[:, None] * (G * levels)  # places in all of them
    weights: npt.NDArray[np.float32] = np.take(codebook.astype(np.float32).reshape(-1), entries)
    return weights


def bitplane_matmul(
    x: npt.NDArray[np.float32],
    planes: npt.NDArray[np.uint8],
    codebook: npt.NDArray[np.float16],
    bias: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """Return ``x [..., M, K]`` times the transposed weights, plus `bias` ``[N]``: ``[..., M, N]``, in float32.

    The reference of the operator ``pmpd::BitplaneMatMul``: products and sums are taken in float64 and rounded once.
    """
    weight = dequantize(planes, codebook, x.shape[-1])
    y = x.astype(np.float64) @ weight.T.astype(np.float64)
    return (y if bias is None else y + bias).astype(np.float32)
