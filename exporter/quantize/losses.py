"""What quantizing a layer costs: how much it adds to the model's loss, as far as statistics foretell."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize.base import NestedCodes
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bitplanes import group_size

__all__ = ["MEASURES", "predicted_losses"]

MEASURES = frozenset({"guided", "fisher"})
"""The statistics that errors of different layers can be compared by: both weigh them by the loss's gradients."""


def predicted_losses(
    weight: npt.NDArray[np.floating],
    nested: NestedCodes,
    parent: int,
    statistics: Mapping[str, npt.NDArray[np.floating]],
) -> dict[int, float]:
    """Return what each codebook of a layer adds to the loss, by its bits; in units that all layers share.

    With the errors d of a row and its Hessian H, it is ``d H dᵀ``, summed over the rows. ``guided`` statistics are H of
    all rows, ``fisher`` of each row the diagonal. Where ``outputs`` B are known too, it is ``B_rs d_r H d_sᵀ``, summed
    over all pairs of rows of a block, with B scaled to a mean of one on its diagonal: rows may make up for each other.

    Args:
        weight: ``[N, K]``.
        nested: the weight quantized.
        parent: bits of its codes.
        statistics: ``guided`` ``[K, K]``, with or without ``outputs`` ``[blocks, n, n]``, or ``fisher`` ``[N, K]``.

    Raises:
        PmpdError: there are neither.
    """
    known = next((name for name in ("guided", "fisher") if name in statistics), None)
    if known is None:
        raise PmpdError("no statistics say what its errors cost: choose whole precisions")
    outputs = statistics.get("outputs")
    if outputs is not None:
        outputs = outputs / max(float(outputs.diagonal(0, 1, 2).mean()), 1e-30)
    (N, K), losses = weight.shape, dict[int, float]()
    for bits, book in nested.codebooks.items():
        groups = np.arange(K) // group_size(K, book.shape[1])
        codes = nested.codes >> (parent - bits)
        errors = book[np.arange(N)[:, None], groups, codes] - weight.astype(np.float32)
        products = errors @ statistics[known] if known == "guided" else statistics[known] * errors
        if outputs is not None:
            products = (outputs @ products.reshape(*outputs.shape[:2], K)).reshape(N, K)
        losses[bits] = float((products * errors).sum(dtype=np.float64))
    return losses
