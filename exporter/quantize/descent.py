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

__all__ = ["Rows"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

RIDGE = 1e-6
"""Pulls a codebook to what it was, by this share of its mean diagonal: what no weight refers to stays."""


@dataclass
class Rows:
    """Some rows of a layer, their codes and codebooks, which `descend` improves.

    Attributes:
        weight: float32 ``[R, K]``.
        H: float32 ``[K, K]``, symmetric and positive definite.
        parent: P, bits of the codes.
        codes: uint8 ``[R, K]``.
        codebooks: by precision p, float32 ``[R, 2**p]`` of values that float16 holds.
    """

    weight: Floats
    H: Floats
    parent: int
    codes: npt.NDArray[np.uint8]
    codebooks: Mapping[int, Floats]

    def losses(self) -> Doubles:
        """Return each row's loss at each precision, ``[p, R]``."""
        errors = self._errors()
        losses: Doubles = np.einsum("prk,prk->pr", errors, _product(errors, self.H), dtype=np.float64)
        return losses.clip(0)

    def descend(self, importance: Floats, *, rounds: int, passes: int) -> None:
        """Lower the sum of the losses, each times its `importance` ``[p, R]``.

        In each of the `rounds`, `passes` over the columns change codes, then codebooks follow.
        """
        self._fit()
        for _ in range(rounds):
            gradient = _product(self._errors(), self.H)  # [p, R, K]
            values = np.stack([self._expanded(p) for p in self.codebooks])  # [p, R, 2**P]
            codes = self.codes.copy()
            for _ in range(passes):
                if not native.descend(codes, self.H, values, importance, gradient):
                    break
            self.codes = codes
            self._fit()

    def _errors(self) -> Floats:
        """Return what quantization changes at each precision, ``[p, R, K]``."""
        values = [np.take_along_axis(book, self.codes >> (self.parent - p), 1) for p, book in self.codebooks.items()]
        return np.stack(values) - self.weight

    def _expanded(self, p: int) -> Floats:
        """Return what each parent code stands for at p bits, ``[R, 2**P]``."""
        return np.repeat(self.codebooks[p], 2 ** (self.parent - p), axis=1)

    def _fit(self) -> None:
        """Solve for the codebooks of all precisions."""
        levels = 2**self.parent
        gram = native.gram(self.codes, self.H, levels)  # [R, levels, levels]
        target = _product(self.weight, self.H)  # [R, K]
        pairs = zip(self.codes, target, strict=True)
        sums: Doubles = np.stack([np.bincount(c, t, levels) for c, t in pairs]).astype(np.float64)  # [R, levels]
        self.codebooks = {p: self._solved(gram, sums, p) for p in self.codebooks}

    def _solved(self, gram: Doubles, sums: Doubles, p: int) -> Floats:
        rows, run = len(gram), 2 ** (self.parent - p)
        matrix = gram.reshape(rows, 2**p, run, 2**p, run).sum((2, 4))  # [R, 2**p, 2**p]
        ridge = RIDGE * matrix.diagonal(0, 1, 2).mean(1)  # [R]
        matrix += ridge[:, None, None] * np.eye(2**p)
        right = sums.reshape(rows, 2**p, run).sum(2) + ridge[:, None] * self.codebooks[p]
        return np.linalg.solve(matrix, right[..., None])[..., 0].astype(np.float16).astype(np.float32)


def _product(rows: Floats, H: Floats) -> Floats:
    """Return ``rows [..., K] @ H [K, K]``, on as many threads as torch is set to."""
    import torch  # not at the top: a skeleton needs the names of methods alone, and no torch

    product: Floats = (torch.from_numpy(rows) @ torch.from_numpy(H)).numpy()
    return product
