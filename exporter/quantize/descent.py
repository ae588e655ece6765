"""Joint descent: codes and codebooks that lower the output error of all precisions at once.

The loss of a row w is the sum over precisions p of λ_p (w_p - w)ᵀ H (w_p - w), where w_p is what its codes stand for
at p bits and H the second moments of the layer's inputs. Two steps take turns, and neither can raise it:

- codebooks, all else fixed, are the solution of a least-squares problem. The sums of H over pairs of parent codes, one
  small matrix a row, hold it for every precision: a code of fewer bits is a run of parent codes;
- codes are changed one column after another to the parent code of least loss, which counts at all precisions.

This is LNQ (Kim et al., *GuidedQuant*, ICML 2025) for several nested precisions at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize import native
from pmpd.exporter.quantize.moments import RIDGE
from pmpd.exporter.quantize.tiles import Floats

__all__ = ["Rows"]

Doubles = npt.NDArray[np.float64]


@dataclass
class Rows:
    """Some rows of a layer, their codes and codebooks, which `descend` improves.

    Attributes:
        weight: float32 ``[R, K]``.
        H: float32 ``[K, K]``, symmetric and positive definite.
        parent: P, bits of the codes.
        codes: uint8 ``[R, K]``.
        codebooks: by precision p, float32 ``[R, 2**p]`` of values that float16 holds.
        norms: what the losses would be if all codebooks were zeros, ``[R]``.
    """

    weight: Floats
    H: Floats
    parent: int
    codes: npt.NDArray[np.uint8]
    codebooks: Mapping[int, Floats]

    def __post_init__(self) -> None:
        self._target = _product(self.weight, self.H)  # [R, K]
        self.norms: Doubles = np.einsum("rk,rk->r", self.weight, self._target, dtype=np.float64)
        self._add_up()

    def losses(self) -> Doubles:
        """Return each row's loss at each precision, ``[p, R]``."""
        losses = []
        for p, book in self.codebooks.items():
            matrix, right = self._system(p)
            quadratic = np.einsum("ra,rab,rb->r", book, matrix, book, dtype=np.float64)
            losses.append(quadratic - 2 * np.einsum("ra,ra->r", right, book, dtype=np.float64) + self.norms)
        return np.stack(losses).clip(0)

    def descend(self, importance: Floats, *, rounds: int, passes: int) -> None:
        """Lower the sum of the losses, each times its `importance` ``[p, R]``.

        In each of the `rounds`, `passes` over the columns change codes, then codebooks follow.
        """
        self._fit()
        for _ in range(rounds):
            values = np.stack([self._expanded(p) for p in self.codebooks])  # [p, R, 2**P]
            gradient = self._gradient(values)
            codes = self.codes.copy()
            for _ in range(passes):
                if not native.descend(codes, self.H, values, importance, gradient):
                    break
            self.codes = codes
            self._add_up()
            self._fit()

    def _add_up(self) -> None:
        """Add up what the losses and their gradients are made of, by parent code."""
        levels = 2**self.parent
        self._lines, self._pairs = native.sums(self.codes, self.H, levels)  # [R, levels, K], [R, levels, levels]
        rows = zip(self.codes, self._target, strict=True)
        self._right = np.stack([np.bincount(c, t, levels) for c, t in rows])  # [R, levels]

    def _expanded(self, p: int) -> Floats:
        """Return what each parent code stands for at p bits, ``[R, 2**P]``."""
        return np.repeat(self.codebooks[p], 2 ** (self.parent - p), axis=1)

    def _gradient(self, values: Floats) -> Floats:
        """Return the product of H with what quantization changes, ``[p, R, K]``."""
        products = np.matmul(values.swapaxes(0, 1), self._lines)  # [R, p, K]
        return np.ascontiguousarray((products - self._target[:, None]).swapaxes(0, 1))

    def _system(self, p: int) -> tuple[Doubles, Doubles]:
        """Return the least-squares problem of the codebooks: ``[R, 2**p, 2**p]`` and ``[R, 2**p]``."""
        rows, run = len(self.codes), 2 ** (self.parent - p)
        matrix = self._pairs.reshape(rows, 2**p, run, 2**p, run).sum((2, 4))
        return matrix, self._right.reshape(rows, 2**p, run).sum(2)

    def _fit(self) -> None:
        """Solve for the codebooks of all precisions."""
        self.codebooks = {p: self._solved(p) for p in self.codebooks}

    def _solved(self, p: int) -> Floats:
        matrix, right = self._system(p)
        ridge = RIDGE * matrix.diagonal(0, 1, 2).mean(1)  # [R]
        matrix += ridge[:, None, None] * np.eye(2**p)
        right += ridge[:, None] * self.codebooks[p]
        return np.linalg.solve(matrix, right[..., None])[..., 0].astype(np.float16).astype(np.float32)


def _product(rows: Floats, H: Floats) -> Floats:
    """Return ``rows [..., K] @ H [K, K]``, on as many threads as torch is set to."""
    import torch  # not at the top: a skeleton needs the names of methods alone, and no torch

    product: Floats = (torch.from_numpy(rows) @ torch.from_numpy(H)).numpy()
    return product
