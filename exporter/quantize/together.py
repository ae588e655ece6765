"""Joint descent over all rows of a layer: their errors meet again in the outputs that the rest of the model reads.

The loss of a layer is the sum over precisions p of λ_p Σ_rs B_rs (w_p - w)_r H (w_p - w)_sᵀ, with H the second moments
of the layer's inputs and B those of the loss's gradients at its outputs, the Kronecker factors of the Hessian (K-FAC,
Martens and Grosse, ICML 2015; for quantization *YAQA*, Tseng et al., 2025). `descent.py` is the case of a diagonal B.

Tile by tile of rows, codes and then codebooks are changed while all other rows stay. What the others contribute to a
row's gradient is a constant then, and rows of a tile tell each other at once, so no step can raise the loss.
"""

from __future__ import annotations

import numpy as np

from pmpd.exporter.quantize import native
from pmpd.exporter.quantize.descent import Rows, by_code, expanded, gradient, product, solved
from pmpd.exporter.quantize.tiles import Floats

__all__ = ["Together"]


class Together:
    """The rows of a layer, their codes and codebooks, which `descend` improves.

    Args:
        rows: all of them, as they are by themselves.
        B: float32 ``[N, N]``, symmetric and positive definite.
    """

    def __init__(self, rows: Rows, B: Floats) -> None:
        self.rows, self.B = rows, B

    def descend(self, importance: Floats, *, tile: int, passes: int) -> None:
        """Lower the sum of the losses, each times its `importance` ``[p]``, tile after tile.

        In each tile of as many rows, `passes` over the columns change codes, then codebooks follow. Its rows lie far
        apart: neighbours, such as those of one head, have most to do with each other.
        """
        stride = -(-len(self.rows.weight) // tile)
        for first in range(stride):
            self._descend(slice(first, None, stride), importance, passes)

    def _descend(self, where: slice, importance: Floats, passes: int) -> None:
        tile = self.rows.part(where)
        # What a row's gradient takes of the products of the tile's other rows, and of all rows elsewhere.
        scale = self.B.diagonal()[where]
        between = self.B[where, where] / scale[:, None]
        np.fill_diagonal(between, 0)
        elsewhere = self.B[where] / scale[:, None]
        elsewhere[:, where] = 0
        far = np.stack([product(elsewhere, p) for p in self.rows.products])  # [p, R, K]

        def near(gradients: Floats) -> Floats:
            return np.stack([product(between, g) for g in gradients])

        def loss(slopes: Floats) -> float:
            return float(np.einsum("p,r,prk,prk->", importance, scale, tile.errors, slopes + far, dtype=np.float64))

        start = tile.products + near(tile.products) + far
        before = loss(start)
        slopes, to_others = start.copy(), np.ascontiguousarray(between.T)
        weight = np.repeat(importance[:, None], len(scale), 1)
        for remaining in reversed(range(passes)):
            last = not remaining
            if not native.descend(tile.codes, tile.H, tile.values, weight, slopes, to_others, start, last=last):
                break
        lines, pairs = native.sums(tile.codes, tile.H, 2**tile.parent)
        products = gradient(tile.values, lines, tile.target)
        around = near(products) + far
        for i, (p, book) in enumerate(tile.codebooks.items()):
            # Each row's best codebook is the best if no other changes; of the way there, as much as is best for all.
            step = solved(pairs, by_code(tile.codes, tile.target - around[i], 2**tile.parent), book) - book
            values = expanded(step, tile.parent)  # [R, 2**P]
            errors = np.take_along_axis(values, tile.codes.astype(np.intp), 1)
            along = np.matmul(values[:, None], lines)[:, 0]  # [R, K], what the step adds to the products
            curvature = np.einsum("r,rk,rk->", scale, errors, along + product(between, along), dtype=np.float64)
            slope = np.einsum("r,rk,rk->", scale, errors, products[i] + around[i], dtype=np.float64)
            length = np.clip(-slope / curvature, 0, 1) if curvature > 0 else 0.0
            tile.codebooks[p] = (book + np.float32(length) * step).astype(np.float16).astype(np.float32)
        tile.products = gradient(tile.values, lines, tile.target)
        if loss(tile.products + near(tile.products) + far) < before:
            self.rows.put(where, tile)
