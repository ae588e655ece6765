"""A weight, tile by tile over threads: some rows of one group of columns at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize.base import MethodOptions, NestedCodes
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bitplanes import group_size

__all__ = ["checked", "quantize_tiles"]

MAX_THREADS = 16

FLOAT16_MAX = float(np.finfo(np.float16).max)

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Books = dict[int, npt.NDArray[np.floating]]
Tile = tuple[slice, slice]


def quantize_tiles(
    weight: npt.NDArray[np.floating],
    options: MethodOptions,
    quantize_tile: Callable[[Floats, Tile], tuple[Codes, Books]],
    *,
    rows: int,
) -> NestedCodes:
    """Quantize a weight whose rows and groups of columns have nothing to do with each other, on all cores.

    Args:
        weight: ``[N, K]``, any floating dtype.
        options: say the precisions and groups.
        quantize_tile: takes a tile's values, float32 ``[R, k]``, and its place in the weight; returns codes ``[R, k]``
            and for each precision p a codebook ``[R, 2**p]``.
        rows: R, at most.

    Raises:
        PmpdError: a weight that is not finite or too large for float16, or as `quantize_tile`.
        ValueError: the weight is not a matrix.
    """
    if weight.ndim != 2 or not weight.size:
        raise ValueError(f"weight must be a matrix [N, K], got {list(weight.shape)}")
    N, K = weight.shape
    codes = np.empty((N, K), dtype=np.uint8)
    # An empty group keeps a codebook of zeros that no code refers to.
    codebooks = {p: np.zeros((N, options.groups, 2**p), dtype=np.float16) for p in options.precisions}
    columns = group_size(K, options.groups)

    def work(corner: tuple[int, int]) -> None:
        n, k = corner
        tile = np.s_[n : n + rows, k : k + columns]
        codes[tile], books = quantize_tile(checked("weight", weight, tile, -FLOAT16_MAX, FLOAT16_MAX), tile)
        for p, codebook in codebooks.items():
            codebook[n : n + rows, k // columns] = books[p]

    # Freed once, a block of this size makes glibc keep that much memory for the temporaries; by default it hands
    # every one of them back to the system, and page faults take as long as the arithmetic.
    np.empty(24 << 20, dtype=np.uint8)
    with ThreadPoolExecutor(min(available_threads(), MAX_THREADS)) as pool:
        list(pool.map(work, product(range(0, N, rows), range(0, K, columns))))
    return NestedCodes(codes, codebooks)


def checked(what: str, array: npt.NDArray[np.floating], tile: Tile, low: float, high: float) -> Floats:
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
