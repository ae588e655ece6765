"""Joint descent: codes and codebooks that lower the output error of all precisions at once.

The loss of a row w is the sum over precisions p of λ_p (w_p - w)ᵀ H (w_p - w), where w_p is what its codes stand for
at p bits and H the second moments of the layer's inputs. Two steps take turns, and neither can raise it:

- codebooks, all else fixed, are the solution of a least-squares problem. The sums of H over pairs of parent codes, one
  small matrix a row, hold it for every precision: a code of fewer bits is a run of parent codes;
- codes are changed one column after another to the parent code of least loss, which counts at all precisions.

This is LNQ (Kim et al., *GuidedQuant*, ICML 2025) for several nested precisions at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Self

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize import native
from pmpd.exporter.quantize.base import NestedCodes
from pmpd.exporter.quantize.moments import RIDGE
from pmpd.exporter.quantize.tiles import Floats

__all__ = ["Rows", "by_code", "expanded", "gradient", "product", "solved"]

Doubles = npt.NDArray[np.float64]


class Rows:
    """Some rows of a layer, their codes and codebooks, which `descend` improves.

    Args:
        weight: float32 ``[R, K]``.
        H: float32 ``[K, K]``, symmetric and positive definite.
        parent: P, bits of the codes.
        start: codes and codebooks, one a row.

    Attributes:
        codes: uint8 ``[R, K]``.
        codebooks: by precision p, float32 ``[R, 2**p]`` of values that float16 holds.
        target: the product of the weight with H, ``[R, K]``.
        products: those of H with what quantization changes, ``[p, R, K]``.
    """

    def __init__(self, weight: Floats, H: Floats, parent: int, start: NestedCodes) -> None:
        self.weight, self.H, self.parent = weight, H, parent
        self.codes = np.ascontiguousarray(start.codes)
        self.codebooks = {p: book[:, 0].astype(np.float32) for p, book in start.codebooks.items()}
        self.target = product(weight, H)
        self._sums: tuple[Floats, Doubles] | None = native.sums(self.codes, H, 2**parent)
        self.products = gradient(self.values, self._sums[0], self.target)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return all rows of several parts of a layer."""
        whole = copy(parts[0])
        whole.weight, whole.codes, whole.target = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("weight", "codes", "target")
        )
        whole.codebooks = {p: np.concatenate([part.codebooks[p] for part in parts]) for p in whole.codebooks}
        whole.products = np.concatenate([part.products for part in parts], axis=1)
        return whole

    def part(self, which: slice) -> Self:
        """Return a copy of some of the rows."""
        part = copy(self)
        part.weight, part.target = self.weight[which], self.target[which]
        part.codes, part.products = self.codes[which].copy(), self.products[:, which].copy()
        part.codebooks = {p: book[which] for p, book in self.codebooks.items()}
        return part

    def put(self, which: slice, part: Self) -> None:
        """Take some of the rows from a part."""
        self.codes[which], self.products[:, which] = part.codes, part.products
        for p, book in part.codebooks.items():
            self.codebooks[p][which] = book

    @property
    def nested(self) -> NestedCodes:
        """The codes and codebooks as they are now."""
        return NestedCodes(self.codes, {p: book[:, None].astype(np.float16) for p, book in self.codebooks.items()})

    @property
    def norms(self) -> Doubles:
        """What the losses would be if all codebooks were zeros, ``[R]``."""
        norms: Doubles = np.einsum("rk,rk->r", self.weight, self.target, dtype=np.float64)
        return norms

    @property
    def values(self) -> Floats:
        """What each parent code stands for at each precision, ``[p, R, 2**P]``."""
        return np.stack([expanded(book, self.parent) for book in self.codebooks.values()])

    @property
    def errors(self) -> Floats:
        """What quantization changes, ``[p, R, K]``."""
        return np.take_along_axis(self.values, self.codes.astype(np.intp)[None], 2) - self.weight

    def losses(self) -> Doubles:
        """Return each row's loss at each precision, ``[p, R]``."""
        losses: Doubles = np.einsum("prk,prk->pr", self.errors, self.products, dtype=np.float64)
        return losses.clip(0)

    def fit(self) -> None:
        """Solve for the codebooks of all precisions, all codes fixed."""
        lines, pairs = self._sums or native.sums(self.codes, self.H, 2**self.parent)
        self._sums = None
        right = by_code(self.codes, self.target, 2**self.parent)
        self.codebooks = {p: solved(pairs, right, book) for p, book in self.codebooks.items()}
        self.products = gradient(self.values, lines, self.target)

    def descend(self, importance: Floats, *, passes: int) -> None:
        """Change codes in `passes` over the columns; each precision's loss counts by its `importance` ``[p, R]``."""
        self._sums = None
        self.codes, self.products = self.codes.copy(), self.products.copy()
        for _ in range(passes):
            if not native.descend(self.codes, self.H, self.values, importance, self.products):
                break

    def keep(self, earlier: Self, which: npt.NDArray[np.bool_]) -> None:
        """Take some rows ``[R]`` as they were before."""
        self._sums = None
        rows = which[:, None]
        self.codes = np.where(rows, earlier.codes, self.codes)
        self.codebooks = {p: np.where(rows, earlier.codebooks[p], book) for p, book in self.codebooks.items()}
        self.products = np.where(rows, earlier.products, self.products)


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
