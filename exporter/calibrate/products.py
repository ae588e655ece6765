"""Sums of products that more than one statistic needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["SecondMoments"]

BLOCK = 1024
"""Rows of the sum that are computed at once: few enough to leave out most of the upper triangle."""


class SecondMoments:
    """The sum over tokens of ``x xᵀ``, which is symmetric: half of it is computed.

    Products are of the tokens' type. What bfloat16 adds to a sum over many tokens is far below what the sum differs by
    from one text to another.

    Args:
        size: K, of x.
    """

    def __init__(self, size: int) -> None:
        self._lower = torch.zeros(size, size)

    def add(self, tokens: torch.Tensor) -> None:
        """Add those of as many tokens, ``[T, K]``."""
        for first in range(0, len(self._lower), BLOCK):
            rows, columns = slice(first, first + BLOCK), slice(0, first + BLOCK)
            self._lower[rows, columns] += tokens[:, rows].T @ tokens[:, columns]

    def total(self) -> npt.NDArray[np.float32]:
        """Return the sum, ``[K, K]``, after which nothing can be added."""
        total: npt.NDArray[np.float32] = self._lower.numpy()
        for first in range(0, len(total), BLOCK):
            rows = slice(first, first + BLOCK)
            corner = np.tril(total[rows, rows])
            total[rows, rows] = corner + np.tril(corner, -1).T
            total[rows, first + BLOCK :] = total[first + BLOCK :, rows].T
        return total
