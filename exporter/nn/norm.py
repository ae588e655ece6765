"""Norms of the residual stream, to which they first add the output of the block before them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.nn.linear import Stored

__all__ = ["LayerNorm", "Norm", "OffsetRMSNorm", "RMSNorm"]


class Norm(nn.Module):
    """Adds a block's output to the residual stream and normalizes the sum.

    Two standard operators: ONNX Runtime's fused ones are slower on CPUs (1.31, 2048 elements: LayerNorm 10.7 µs fused,
    2.2 in two; RMSNorm 2.7 and 1.5; with 128 rows and 2 threads 1317 and 96, 143 and 64).
    """

    def forward(self, op: Any, stream: ir.Value, block: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
        """Return the normalized sum and the sum itself, both ``[B, S, H]``. Without `block` the stream is the sum."""
        total = stream if block is None else op.Add(stream, block)
        return self.normalize(op, total), total

    @abstractmethod
    def normalize(self, op: Any, x: ir.Value) -> ir.Value:
        """Add the operator."""


class RMSNorm(Norm):
    """Root-mean-square norm (Llama), its result times `scale`."""

    offset: ClassVar[float] = 0.0  # what the checkpoint's weight lacks

    def __init__(self, size: int, *, epsilon: float, scale: float = 1.0) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = Stored([size], offset=self.offset, scale=scale)

    def normalize(self, op: Any, x: ir.Value) -> ir.Value:
        """Add the operator."""
        return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.epsilon)  # type: ignore[no-any-return]


class OffsetRMSNorm(RMSNorm):
    """Root-mean-square norm whose weight is one more than the checkpoint's (Gemma)."""

    offset = 1.0


class LayerNorm(Norm):
    """Mean-and-variance norm with weight and bias (Phi, StableLM)."""

    def __init__(self, size: int, *, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = Stored([size])
        self.bias = Stored([size])

    def normalize(self, op: Any, x: ir.Value) -> ir.Value:
        """Add the operator."""
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.epsilon)  # type: ignore[no-any-return]
