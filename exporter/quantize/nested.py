"""What every quantizer of the exporter returns: one parent code per weight, and a codebook per precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["NestedCodes", "Quantizer"]


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


class Quantizer(Protocol):
    """A post-training quantization method whose codes are nested."""

    def quantize(self, weight: npt.NDArray[np.floating], sensitivity: npt.NDArray[np.floating] | None) -> NestedCodes:
        """Quantize one linear layer.

        Args:
            weight: ``[N, K]``, N outputs and K inputs, any floating dtype.
            sensitivity: ``[N, K]``, how much an error of each weight matters, at least 0; None: all the same.

        Raises:
            pmpd.runtime.errors.PmpdError: a weight or a sensitivity that cannot be quantized.
        """
        ...
