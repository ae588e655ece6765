"""Norms of queries and keys, over each head or all of them.

Where a head has another size than the fused attention takes, some of its slots have no element. They are zeros, and
stay so.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.nn.linear import Stored
from pmpd.exporter.nn.rotary import HeadLayout

__all__ = ["HeadNorm", "JointRMSHeadNorm", "OffsetRMSHeadNorm", "RMSHeadNorm"]


class HeadNorm(nn.Module):
    """A layer norm over each head: one weight for all heads, or one per head."""

    def __init__(self, heads: int, layout: HeadLayout, *, epsilon: float, bias: bool, per_head: bool) -> None:
        super().__init__()
        self.shape = (heads, layout.slots)
        self.element = [float(element >= 0) for element in layout.rotated()]
        self.epsilon = epsilon
        size = (heads, layout.slots) if per_head and heads > 1 else (layout.slots,)

        def stored(kind: str) -> Stored:
            sources = tuple(f"norms.{head}.{kind}" for head in range(heads)) if per_head else (kind,)
            return Stored(size, sources=sources, columns=layout.heads(layout.rotated(), 1))

        self.weight = stored("weight")
        self.bias = stored("bias") if bias else None

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """``[B, S, heads * slots]`` → the same, normalized."""
        heads, slots = self.shape
        x = op.Reshape(x, [0, 0, heads, slots])  # (B, S, heads, slots)
        x = self._normalized(op, x)
        x = op.Mul(x, self.weight)  # by (slots) or (heads, slots)
        if self.bias is not None:
            x = op.Add(x, self.bias)
        return op.Reshape(x, [0, 0, heads * slots])  # type: ignore[no-any-return]  # (B, S, heads * slots)

    def _normalized(self, op: Any, x: ir.Value) -> ir.Value:
        """``[B, S, heads, slots]`` → the same less its mean over its standard deviation."""
        slots, size = len(self.element), sum(self.element)
        if size == slots:
            return op.LayerNormalization(x, self.element, axis=-1, epsilon=self.epsilon)  # type: ignore[no-any-return]
        # Zeros in slots without an element make means smaller by `share`.
        share = size / slots
        mean = op.ReduceMean(x, [-1])  # (B, S, heads, 1)
        centered = op.Sub(x, op.Mul(mean, [element / share for element in self.element]))
        scale = [math.sqrt(share)] * slots
        return op.RMSNormalization(centered, scale, axis=-1, epsilon=self.epsilon * share)  # type: ignore[no-any-return]


class RMSHeadNorm(nn.Module):
    """A root-mean-square norm over each head, with one weight for all heads.

    Slots without an element are zeros: they make the mean square smaller by ``size / slots``, which epsilon and weight
    undo.
    """

    offset: ClassVar[float] = 0.0  # what the checkpoint's weight lacks

    def __init__(self, heads: int, layout: HeadLayout, *, epsilon: float) -> None:
        super().__init__()
        self.shape = (heads, layout.slots)
        share = layout.size / layout.slots
        self.epsilon = epsilon * share
        columns = layout.heads(layout.rotated(), 1)
        self.weight = Stored([layout.slots], columns=columns, offset=self.offset, scale=math.sqrt(share))

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """``[B, S, heads * slots]`` → the same, normalized."""
        heads, slots = self.shape
        x = op.Reshape(x, [0, 0, heads, slots])  # (B, S, heads, slots)
        x = op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.epsilon)
        return op.Reshape(x, [0, 0, heads * slots])  # type: ignore[no-any-return]  # (B, S, heads * slots)


class OffsetRMSHeadNorm(RMSHeadNorm):
    """A root-mean-square norm over each head, whose weight is one more than the checkpoint's (Gemma 3)."""

    offset = 1.0


class JointRMSHeadNorm(nn.Module):
    """A root-mean-square norm over all heads together, with a weight per element; zeros count as in `RMSHeadNorm`."""

    def __init__(self, heads: int, layout: HeadLayout, *, epsilon: float) -> None:
        super().__init__()
        share = layout.size / layout.slots
        self.epsilon = epsilon * share
        columns = layout.heads(layout.rotated(), heads)
        self.weight = Stored([heads * layout.slots], columns=columns, scale=math.sqrt(share))

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """``[B, S, heads * slots]`` → the same, normalized."""
        return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.epsilon)  # type: ignore[no-any-return]
