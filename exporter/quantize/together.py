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
from pmpd.exporter.quantize.base import NestedCodes
from pmpd.exporter.quantize.descent import Doubles, by_code, expanded, gradient, product, solved
from pmpd.exporter.quantize.tiles import Floats

__all__ = ["Together"]


class Together:
    """The rows of a layer, their codes and codebooks, which `descend` improves.

    Args:
        weight: float32 ``[N, K]``.
        H: float32 ``[K, K]``, symmetric and positive definite.
        B: float32 ``[N, N]``, symmetric and positive definite.
        parent: P, bits of the codes.
        start: codes and codebooks, one a row.

    Attributes:
        norm: what the losses would be if all codebooks were zeros.
    """

    def __init__(self, weight: Floats, H: Floats, B: Floats, parent: int, start: NestedCodes) -> None:
        self.weight, self.H, self.B, self.parent = weight, H, B, parent
        self.codes = start.codes.copy()
        self.codebooks = {p: book[:, 0].astype(np.float32) for p, book in start.codebooks.items()}
        self._target = product(weight, H)  # [N, K]
        self.norm = float(np.einsum("nk,nk->", product(B, self._target), weight, dtype=np.float64))
        self._products = np.stack([product(errors, H) for errors in self._errors(slice(None))])  # [p, N, K]

    @property
    def nested(self) -> NestedCodes:
        """The codes and codebooks as they are now."""
        return NestedCodes(self.codes, {p: book[:, None].astype(np.float16) for p, book in self.codebooks.items()})

    def losses(self) -> Doubles:
        """Return the loss at each precision, ``[p]``."""
        errors = self._errors(slice(None))
        pairs = zip(errors, self._products, strict=True)
        return np.array([np.einsum("rk,rk->", product(self.B, g), e, dtype=np.float64) for e, g in pairs])

    def descend(self, importance: Floats, *, tile: int, passes: int) -> None:
        """Lower the sum of the losses, each times its `importance` ``[p]``, tile after tile.

        In each tile of as many rows, `passes` over the columns change codes, then codebooks follow. Its rows lie far
        apart: neighbours, such as those of one head, have most to do with each other.
        """
        stride = -(-len(self.weight) // tile)
        for first in range(stride):
            self._descend(slice(first, None, stride), importance, passes)

    def _descend(self, rows: slice, importance: Floats, passes: int) -> None:
        codes = np.ascontiguousarray(self.codes[rows])
        books = {p: book[rows] for p, book in self.codebooks.items()}
        target = self._target[rows]
        products = np.ascontiguousarray(self._products[:, rows])  # [p, R, K]
        # What a row's gradient takes of the products of the tile's other rows, and of all rows elsewhere.
        scale = self.B.diagonal()[rows]
        between = self.B[rows, rows] / scale[:, None]
        np.fill_diagonal(between, 0)
        elsewhere = self.B[rows] / scale[:, None]
        elsewhere[:, rows] = 0
        far = np.stack([product(elsewhere, p) for p in self._products])  # [p, R, K]

        def near(gradients: Floats) -> Floats:
            return np.stack([product(between, g) for g in gradients])

        def loss(errors: Floats, gradients: Floats) -> float:
            whole = gradients + near(gradients) + 2 * far
            return float(np.einsum("p,r,prk,prk->", importance, scale, errors, whole, dtype=np.float64))

        before = loss(self._errors(rows), products)
        values = np.stack([expanded(book, self.parent) for book in books.values()])
        start = products + near(products) + far
        slopes = start.copy()
        weight = np.repeat(importance[:, None], len(codes), 1)
        for _ in range(passes):
            if not native.descend(codes, self.H, values, weight, slopes, between, start):
                break
        lines, pairs = native.sums(codes, self.H, 2**self.parent)
        products = gradient(values, lines, target)
        around = near(products) + far
        changed = {}
        for i, (p, book) in enumerate(books.items()):
            # Each row's best codebook is the best if no other changes; of the way there, as much as is best for all.
            step = solved(pairs, by_code(codes, target - around[i], 2**self.parent), book) - book
            values = expanded(step, self.parent)  # [R, 2**P]
            errors = np.take_along_axis(values, codes.astype(np.intp), 1)
            along = np.matmul(values[:, None], lines)[:, 0]  # [R, K], what the step adds to the products
            curvature = np.einsum("r,rk,rk->", scale, errors, along + product(between, along), dtype=np.float64)
            slope = np.einsum("r,rk,rk->", scale, errors, products[i] + around[i], dtype=np.float64)
            length = np.clip(-slope / curvature, 0, 1) if curvature > 0 else 0.0
            changed[p] = (book + np.float32(length) * step).astype(np.float16).astype(np.float32)
        values = np.stack([expanded(book, self.parent) for book in changed.values()])
        products = gradient(values, lines, target)
        errors = np.take_along_axis(values, codes.astype(np.intp)[None], 2) - self.weight[rows]
        if loss(errors, products) < before:
            self.codes[rows], self._products[:, rows] = codes, products
            for p, book in changed.items():
                self.codebooks[p][rows] = book

    def _errors(self, rows: slice) -> Floats:
        """Return what quantization changes, ``[p, R, K]``."""
        codes = self.codes[rows].astype(np.intp)
        values = [np.take_along_axis(expanded(book[rows], self.parent), codes, 1) for book in self.codebooks.values()]
        return np.stack(values) - self.weight[rows]
