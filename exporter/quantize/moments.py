"""What methods do with second moments H of a layer's inputs: damp them, factor them, fit codebooks to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize.tiles import Floats
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bitplanes import group_size

__all__ = ["RIDGE", "damped", "feedback", "fitted", "one_thread_each"]

RIDGE = 1e-6
"""Pulls a codebook to what it was, by this share of its mean diagonal: what no weight refers to stays."""


def damped(H: npt.NDArray[np.floating], columns: int, damping: float) -> Floats:
    """Return moments ``[K, K]`` with a mean of one on the diagonal, and `damping` added there.

    Raises:
        PmpdError: the moments are not finite.
        ValueError: they are not those of so many columns.
    """
    if H.shape != (columns, columns):
        raise ValueError(
            f"statistics must be [{columns}, {columns}] for weights of {columns} columns, got {list(H.shape)}"
        )
    if not np.isfinite(H).all():
        raise PmpdError("the statistics are not finite: delete those of this model and export again")
    mean = H.diagonal().mean(dtype=np.float64)
    scaled = H.astype(np.float32) / np.float32(mean if mean > 0 else 1.0)
    scaled[np.diag_indices(columns)] += np.float32(damping)
    return scaled


def feedback(H: Floats) -> Floats:
    """Return the upper triangular U with ``Uᵀ U = H⁻¹``, for H positive definite.

    Moments of a few huge inputs, rounded to float32, may be indefinite all the same (Qwen2.5-0.5B). Then the diagonal
    gets 0.01 of its mean more, then 0.1, and so on.

    Rounding errors of column j are made up for in the columns after it by ``U[j, j + 1:] / U[j, j]`` (GPTQ, Step 3).
    With ``H = R Rᵀ`` for an upper triangular R, U is its inverse; R is the Cholesky factor of H from the last column to
    the first.
    """
    import torch  # not at the top: a skeleton needs the names of methods alone, and no torch

    backwards = torch.from_numpy(H).double().flip(0, 1)
    more = max(0.01 * float(backwards.diagonal().mean()), 1e-9)
    while (attempt := torch.linalg.cholesky_ex(backwards)).info:
        backwards.diagonal().add_(more)
        more *= 10
    factor = attempt.L.flip(0, 1)
    inverse: Floats = torch.linalg.solve_triangular(factor, torch.eye(len(H)).double(), upper=True).float().numpy()
    return inverse


def fitted(
    weight: Floats, H: Floats, codes: npt.NDArray[np.integer], start: Mapping[int, Floats]
) -> dict[int, npt.NDArray[np.float64]]:
    """Return the codebooks of least output error ``(w_p - w)ᵀ H (w_p - w)`` for given codes, row by row.

    Args:
        weight: ``[R, K]``.
        H: ``[K, K]``, positive definite.
        codes: ``[R, K]``, of as many bits as the highest precision of `start` has.
        start: by precision p, codebooks ``[R, G, 2**p]``; values that no code refers to stay as they are here.
    """
    import torch

    bits = max(start)
    (R, K), (_, G, L) = codes.shape, start[bits].shape
    size = group_size(K, G)
    extra = G * size - K
    moments = torch.nn.functional.pad(torch.from_numpy(H), (0, extra, 0, extra))
    chosen = torch.zeros(R, G * size, L)
    chosen[:, :K].scatter_(2, torch.from_numpy(codes.astype(np.int64))[..., None], 1)
    by_group = chosen.view(R, G, size, L).transpose(2, 3)  # [R, G, L, size]
    # Sums of H over pairs of codes hold the problem of every precision: a lower code is a run of higher ones.
    gram = torch.empty(R, G, L, G, L, dtype=torch.float64)
    for g in range(G):
        columns = slice(g * size, (g + 1) * size)
        sums = moments[:, columns] @ chosen[:, columns].transpose(0, 1).reshape(size, R * L)  # [G size, R L]
        gram[:, :, :, g] = by_group @ sums.view(G, size, R, L).permute(2, 0, 1, 3)
    target = torch.nn.functional.pad(torch.from_numpy(weight) @ torch.from_numpy(H), (0, extra))
    right = (by_group @ target.view(R, G, size, 1))[..., 0].double()  # [R, G, L]
    codebooks = {}
    for p, before in start.items():
        run, levels = 2 ** (bits - p), G * 2**p
        matrix = gram.view(R, G, 2**p, run, G, 2**p, run).sum((3, 6)).view(R, levels, levels)
        ridge = RIDGE * matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None]  # [R, 1]
        matrix += ridge[..., None] * torch.eye(levels)
        sums = right.view(R, levels, run).sum(2) + ridge * torch.from_numpy(before).double().view(R, levels)
        codebooks[p] = torch.linalg.solve(matrix, sums).view(R, G, 2**p).numpy()
    return codebooks


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads that compute alone: a product may depend on how many threads torch splits it for."""
    import torch

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
