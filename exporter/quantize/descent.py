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

__all__ = ["Rows", "by_code", "expanded", "gradient", "product", "solved"]

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
        self._target = product(self.weight, self.H)  # [R, K]
        self.norms: Doubles = np.einsum("rk,rk->r", self.weight, self._target, dtype=np.float64)
        self._add_up()

    def losses(self) -> Doubles:
        """Return each row's loss at each precision, ``[p, R]``."""
        losses = []
        for p, book in self.codebooks.items():
            matrix, right = _system(self._pairs, self._right, 2**p)
            quadratic = np.einsum("ra,rab,rb->r", book, matrix, book, dtype=np.float64)
            losses.append(quadratic - 2 * np.einsum("ra,ra->r", right, book, dtype=np.float64) + self.norms)
        return np.stack(losses).clip(0)

    def descend(self, importance: Floats, *, rounds: int, passes: int) -> None:
        """Lower the sum of the losses, each times its `importance` ``[p, R]``.

        In each of the `rounds`, `passes` over the columns change codes, then codebooks follow.
        """
        self._fit()
        for _ in range(rounds):
            values = np.stack([expanded(book, self.parent) for book in self.codebooks.values()])  # [p, R, 2**P]
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
        self._right = by_code(self.codes, self._target, levels)

    def _gradient(self, values: Floats) -> Floats:
        return gradient(values, self._lines, self._target)

    def _fit(self) -> None:
        """Solve for the codebooks of all precisions."""
        self.codebooks = {p: solved(self._pairs, self._right, book) for p, book in self.codebooks.items()}


def expanded(book: Floats, parent: int) -> Floats:
    """Return what each code of `parent` bits stands for, by the codebook of a lower precision: ``[R, 2**P]``."""
    return np.repeat(book, 2**parent // book.shape[1], axis=1)


def by_code(codes: npt.NDArray[np.uint8], values: Floats, levels: int) -> Doubles:
    """Add up values ``[R, K]`` by the codes that stand in their places: ``[R, levels]``."""
    return np.stack([np.bincount(c, v, levels) for c, v in zip(codes, values, strict=True)])


def gradient(values: Floats, lines: Floats, target: Floats) -> Floats:
    """Return the product of H with what quantization changes, ``[p, R, K]``.

    Args:
        values: what each parent code stands for at each precision, ``[p, R, 2**P]``.
        lines: those of H added up by code, ``[R, 2**P, K]``.
        target: the product of the weight with H, ``[R, K]``.
    """
    products = np.matmul(values.swapaxes(0, 1), lines)  # [R, p, K]
    return np.ascontiguousarray((products - target[:, None]).swapaxes(0, 1))


def _system(pairs: Doubles, right: Doubles, levels: int) -> tuple[Doubles, Doubles]:
    """Return the least-squares problem of codebooks of so many values: ``[R, levels, levels]`` and ``[R, levels]``."""
    rows, run = len(right), right.shape[1] // levels
    matrix = pairs.reshape(rows, levels, run, levels, run).sum((2, 4))
    return matrix, right.reshape(rows, levels, run).sum(2)


def solved(pairs: Doubles, right: Doubles, book: Floats) -> Floats:
    """Return the codebooks of least loss, in place of others ``[R, levels]``, as values that float16 holds.

    Args:
        pairs: H added up by pairs of parent codes, ``[R, 2**P, 2**P]``.
        right: the product of H with the rows that are wanted, added up by parent code, ``[R, 2**P]``.
    """
    levels = book.shape[1]
    matrix, sums = _system(pairs, right, levels)
    ridge = RIDGE * matrix.diagonal(0, 1, 2).mean(1)  # [R]
    matrix += ridge[:, None, None] * np.eye(levels)
    sums += ridge[:, None] * book
    return np.linalg.solve(matrix, sums[..., None])[..., 0].astype(np.float16).astype(np.float32)


def product(rows: Floats, H: Floats) -> Floats:
    """Return ``rows [..., K] @ H [K, K]``, on as many threads as torch is set to."""
    import torch  # not at the top: a skeleton needs the names of methods alone, and no torch

    product: Floats = (torch.from_numpy(rows) @ torch.from_numpy(H)).numpy()
    return product
