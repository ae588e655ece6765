"""Dense-and-sparse: the weights that cost most stay floats (*SqueezeLLM*, Kim et al., ICML 2024).

A share of outliers buys any average number of bits: it is the baseline of the PMPD paper that has no precision to
switch. Here alone, as a simulation: a sparse product beside each dense one would take a kernel of its own, and bytes
spent on planes buy as much (`exporter/quantize/README.md`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.exporter.pipeline import Export
from pmpd.exporter.quantize import NestedCodes
from pmpd.runtime.format.bitplanes import row_stride

__all__ = ["Quantized", "dense_and_sparse", "quantized"]

OUTLIER_BITS = 16 + 16
"""A float16 and the number of its column. Where each row's begin takes 32 bits a row."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized layer, some weights of which may be floats.

    Attributes:
        layer: which one.
        codes: those of all its weights, outliers too.
        outliers: places of the floats in the flat weight, rising, ``[n]``.
        values: what they are, float16 ``[n]``.
    """

    layer: LinearLayer
    codes: NestedCodes
    outliers: npt.NDArray[np.intp]
    values: npt.NDArray[np.float16]

    def weight(self, bits: int) -> npt.NDArray[np.float32]:
        """Return what a precision stands for, ``[N, K]``."""
        book = self.codes.codebooks[bits].astype(np.float32)  # [N, groups, 2**bits]
        codes = (self.codes.codes >> (self.layer.parent - bits)).astype(np.intp)
        rows, groups, _ = book.shape
        weight: npt.NDArray[np.float32] = np.take_along_axis(book, codes.reshape(rows, groups, -1), 2)
        weight.reshape(-1)[self.outliers] = self.values
        return weight.reshape(codes.shape)

    def nbytes(self, bits: int) -> int:
        """Return the bytes that a step reads at a precision: planes as they lie in a bundle, codebook, outliers."""
        rows, columns = self.codes.codes.shape
        sparse: int = OUTLIER_BITS * len(self.outliers) + 32 * rows * bool(len(self.outliers))
        planes: int = bits * rows * row_stride(columns)
        return planes + self.codes.codebooks[bits].nbytes + sparse // 8


def quantized(export: Export, layer: LinearLayer, statistics: Any, **options: Any) -> Quantized:
    """Quantize a layer by the export's method, without outliers. Arguments and errors as of `Export.quantized`."""
    return Quantized(
        layer, export.quantized(layer, statistics, **options), np.empty(0, np.intp), np.empty(0, np.float16)
    )


def dense_and_sparse(
    export: Export, layer: LinearLayer, statistics: Any, *, outliers: float, **options: Any
) -> Quantized:
    """Quantize a layer but for a share of its weights.

    These are the weights of most squared error, times their sensitivities, at the lowest precision; the others are
    then clustered without them.

    Args:
        export: with method `anyprecision`.
        statistics: with ``fisher``, or None: all weights count alike.
        outliers: share of the weights that stay floats, 0 to 1.
        options: of the method.
    """
    first = quantized(export, layer, statistics, **options)
    lowest = min(first.codes.codebooks)
    weight = np.concatenate(
        [layer.part_weight(i, export.checkpoint.tensor(name)) for i, name in enumerate(layer.weight_names)]
    )
    parts = range(len(layer.weight_names))
    known = [{} if statistics is None else statistics.of(layer, part) for part in parts]
    sensitivity = np.concatenate([part["fisher"] for part in known]) if known[0] else np.ones_like(weight)
    loss = sensitivity * np.square(weight - first.weight(lowest))
    count = round(outliers * weight.size)
    if not count:
        return first
    places = np.sort(np.argpartition(loss.reshape(-1), weight.size - count)[weight.size - count :])
    sensitivity.reshape(-1)[places] = 0
    codes = export.method(layer, **options).quantize(weight, {"fisher": sensitivity})
    return Quantized(layer, codes, places, weight.reshape(-1)[places].astype(np.float16))
