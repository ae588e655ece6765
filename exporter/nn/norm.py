"""Layer norms that also add the residual: one fused operator each."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.nn.linear import Stored

__all__ = ["LayerNorm", "Norm", "RMSNorm"]

FUSED = "com.microsoft"


class Norm(nn.Module):
    """Adds a block's output to the residual stream and normalizes the sum."""

    @abstractmethod
    def forward(self, op: Any, stream: ir.Value, block: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
        """Return the normalized sum and the sum itself, both ``[B, S, H]``. Without `block` the stream is the sum."""


class RMSNorm(Norm):
    """Root-mean-square norm (Llama)."""

    def __init__(self, size: int, *, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = Stored([size])

    def forward(self, op: Any, stream: ir.Value, block: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
        """Add the operator."""
        if block is None:
            return op.RMSNormalization(stream, self.weight, axis=-1, epsilon=self.epsilon), stream
        y, _, _, total = op.SkipSimplifiedLayerNormalization(
            stream, block, self.weight, epsilon=self.epsilon, _domain=FUSED, _outputs=4
        )
        return y, total


class LayerNorm(Norm):
    """Mean-and-variance norm with weight and bias (Phi, StableLM)."""

    def __init__(self, size: int, *, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = Stored([size])
        self.bias = Stored([size])

    def forward(self, op: Any, stream: ir.Value, block: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
        """Add the operator."""
        if block is None:
            return op.LayerNormalization(stream, self.weight, self.bias, axis=-1, epsilon=self.epsilon), stream
        y, _, _, total = op.SkipLayerNormalization(
            stream, block, self.weight, self.bias, epsilon=self.epsilon, _domain=FUSED, _outputs=4
        )
        return y, total
