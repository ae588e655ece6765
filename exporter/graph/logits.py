"""The operator `BitplaneLogits` as an ONNX function: an output layer of which only what can matter need be finished."""

from __future__ import annotations

import onnx

__all__ = ["BITPLANE_LOGITS", "MARGIN", "bitplane_logits"]

BITPLANE_LOGITS = "BitplaneLogits"
# The graph's input for the margin; its default is infinity, so that all logits are finished unless a caller asks.
MARGIN = "logits_margin"

_LOGITS_BODY = """
<domain: "pmpd", opset_import: ["": 23, "pmpd": 1]>
BitplaneLogits <K> (X, planes, codebook, coarse_codebook, basis, bound, margin, bias) => (Y)
{
  Y = pmpd.BitplaneMatMul <K: int = @K> (X, planes, codebook, bias)  # [..., M, N]
}
"""


def bitplane_logits() -> onnx.FunctionProto:
    """Return ``BitplaneLogits(X, planes, codebook, coarse_codebook, basis, bound, margin, bias?) → Y[..., M, N]``.

    The product of `bitplane_matmul` for an output layer, of which only what can matter need be finished. Besides the
    inputs of that one, with one group (G = 1), there are

    * coarse_codebook float16 ``[N, 1, 2^c]``, c < p: values of the codes of the first c planes;
    * basis float32 ``[D, K]``: directions of activations; bound float16 ``[B, N]``: how far the coarse product of row n
      may be from the whole one, for each group of directions: at most ``sum over g of reach[g] bound[g, n]``. The reach
      of group g < B - 1 is the norm of ``x basis[4^(g - 1) : 4^g]ᵀ`` (of the first one ``basis[0]``; the last one ends
      at D), and of group B - 1 that of what is left, ``x - x basisᵀ basis``;
    * margin float32 ``[1]``: with M = 1, each row whose coarse value plus its limit is at least the greatest value less
      the margin has the value that `bitplane_matmul` gives it; any other row may have its coarse value, which is within
      its limit. So the greatest value is in its place. With an infinite margin or M > 1 all rows are finished.

    That allows to finish all of them, which is what this definition does.
    """
    return onnx.parser.parse_function(_LOGITS_BODY)
