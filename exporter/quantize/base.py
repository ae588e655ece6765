"""Quantization methods: the contract of one, its options, and what it returns. Each method is in another file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bitplanes import MAX_PRECISION

__all__ = ["Method", "MethodOptions", "NestedCodes"]


@dataclass(frozen=True, eq=False)
class NestedCodes:
    """The nested form of one linear layer's weight ``[N, K]``, as ``pmpd.runtime.format.bitplanes`` defines it.

    Attributes:
        codes: uint8 ``[N, K]``, parent codes in ``[0, 2**P)``. The p-bit code is the top p bits, ``codes >> (P - p)``.
        codebooks: for each exported precision p, float16 ``[N, G, 2**p]``: the value that each p-bit code stands for in
            row n and group g. Group g holds the columns ``[g * size, (g + 1) * size)`` with
            ``size = pmpd.runtime.format.bitplanes.group_size(K, G)``; the last groups of a row may be short or empty.

    Raises:
        ValueError: an array's dtype or shape breaks this contract.
    """

    codes: npt.NDArray[np.uint8]
    codebooks: dict[int, npt.NDArray[np.float16]]

    def __post_init__(self) -> None:
        if self.codes.dtype != np.uint8 or self.codes.ndim != 2:
            raise ValueError(f"codes must be uint8 [N, K], got {self.codes.dtype} {list(self.codes.shape)}")
        rows = self.codes.shape[0]
        groups = {codebook.shape[1:2] for codebook in self.codebooks.values()}
        for p, codebook in self.codebooks.items():
            if codebook.dtype != np.float16 or codebook.shape[::2] != (rows, 2**p) or len(groups) != 1:
                got = f"{codebook.dtype} {list(codebook.shape)}"
                raise ValueError(f"the {p}-bit codebook must be float16 [{rows}, G, {2**p}] with one G, got {got}")

    @classmethod
    def stack(cls, parts: Sequence[NestedCodes]) -> NestedCodes:
        """Put the rows of several layers of one kind below each other."""
        books = {p: np.concatenate([part.codebooks[p] for part in parts]) for p in parts[0].codebooks}
        return cls(np.concatenate([part.codes for part in parts]), books)


class Method(Protocol):
    """A post-training quantization method whose codes are nested. An instance quantizes layers of one kind.

    Attributes:
        name: as in ``pmpd-export --method``.
        needs: the statistics it uses, by their names in `pmpd.exporter.calibrate.STATISTICS`.
        requires: those of them that it cannot do without. The others are missing from an export without calibration.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    requires: ClassVar[frozenset[str]]

    def __init__(self, *, precisions: tuple[int, ...], parent: int, seed: int, groups: int) -> None:
        """Prepare for layers of one kind.

        Args:
            precisions: bits to make codebooks for, each 1 to `parent`.
            parent: P, bits of the codes, 1 to 8.
            seed: bits of the first clustering, for methods that refine one bit by bit, 1 to `parent`.
            groups: G, runs of columns of a row with codebooks of their own.

        Raises:
            pmpd.runtime.errors.PmpdError: a value that the method cannot work with.
        """

    def quantize(
        self, weight: npt.NDArray[np.floating], statistics: Mapping[str, npt.NDArray[np.floating]]
    ) -> NestedCodes:
        """Quantize one linear layer.

        Args:
            weight: ``[N, K]``, N outputs and K inputs, any floating dtype.
            statistics: those of `needs` that there are, each in the shape that its docstring gives.

        Raises:
            pmpd.runtime.errors.PmpdError: a weight or a statistic that cannot be quantized with.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What every method is made with. A method that subclasses this has its options checked.

    Attributes:
        precisions: bits of the codebooks to make, each 1 to `parent`.
        parent: bits of the codes, 1 to 8.
        seed: bits of the first clustering, 1 to `parent`; most methods have none.
        groups: G, runs of columns per row; each has its own codebook.

    Raises:
        PmpdError: a value out of its range, or a precision that is listed twice.
    """

    precisions: tuple[int, ...] = (4, 3, 2)
    parent: int = 4
    seed: int = 2
    groups: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.parent <= MAX_PRECISION:
            raise PmpdError(f"parent precision must be 1 to {MAX_PRECISION} bits, got {self.parent}")
        for name, bits in (("seed precision", self.seed), *(("precision", p) for p in self.precisions)):
            if not 1 <= bits <= self.parent:
                raise PmpdError(f"{name} must be 1 to {self.parent} bits (the parent precision), got {bits}")
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise PmpdError(f"precisions must be one or more, without repeats, got {list(self.precisions)}")
        if self.groups < 1:
            raise PmpdError(f"groups must be 1 or more, got {self.groups}")
