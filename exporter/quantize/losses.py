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

TILE = 1 << 21
"""Weights that are looked at together."""


def predicted_losses(
    weight: npt.NDArray[np.floating],
    nested: NestedCodes,
    parent: int,
    statistics: Mapping[str, npt.NDArray[np.floating]],
) -> dict[int, float]:
    """Return what each codebook of a layer adds to the loss, by its bits; in units that all layers share.

    With the errors d of a row and its Hessian H, it is ``d H dᵀ``, summed over the rows. ``guided`` statistics are H of
    all rows, ``fisher`` of each row the diagonal.

    Args:
        weight: ``[N, K]``.
        nested: the weight quantized.
        parent: bits of its codes.
        statistics: ``guided`` ``[K, K]`` or ``fisher`` ``[N, K]``.

    Raises:
        PmpdError: there are neither.
    """
    known = next((name for name in ("guided", "fisher") if name in statistics), None)
    if known is None:
        raise PmpdError("no statistics say what its errors cost: choose whole precisions")
    measure, (N, K) = statistics[known], weight.shape
    tile, losses = max(1, TILE // K), dict.fromkeys(nested.codebooks, 0.0)
    for rows in (slice(n, n + tile) for n in range(0, N, tile)):
        for bits, book in nested.codebooks.items():
            groups = np.arange(K) // group_size(K, book.shape[1])
            codes = nested.codes[rows] >> (parent - bits)
            errors = book[rows][np.arange(len(codes))[:, None], groups, codes] - weight[rows].astype(np.float32)
            costs = errors @ measure * errors if known == "guided" else measure[rows] * errors**2
            losses[bits] += float(costs.sum(dtype=np.float64))
    return losses
