"""Self-attention with rotary embedding and KV cache: merged projection, one fused operator, output projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.graph.operators import GROUP_QUERY_ATTENTION, PMPD_DOMAIN
from pmpd.exporter.nn.linear import LinearFactory, Part, Stored
from pmpd.exporter.nn.rotary import HeadLayout

__all__ = ["Attention", "Cache", "HeadNorm"]


@dataclass(frozen=True)
class Cache:
    """What attention needs besides activations: this layer's past, lengths, and the rotary tables.

    `past_key` and `past_value` are ``[B, kv_heads, P, slots]``; `last_position` int32 ``[B]`` is the number of valid
    positions after this run, less one; `total` int32 the length of the mask; `rotary` cosines and sines
    ``[positions, pairs]`` of each layout that the network's layers ask for.
    """

    past_key: ir.Value
    past_value: ir.Value
    last_position: ir.Value
    total: ir.Value
    rotary: Mapping[HeadLayout, tuple[ir.Value, ir.Value]]


class HeadNorm(nn.Module):
    """A layer norm over each head, before the rotation: one weight for all heads, or one per head."""

    def __init__(self, heads: int, layout: HeadLayout, *, epsilon: float, bias: bool, per_head: bool) -> None:
        super().__init__()
        self.shape = (heads, layout.slots)
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
        x = op.LayerNormalization(x, [1.0] * slots, axis=-1, epsilon=self.epsilon)
        x = op.Mul(x, self.weight)  # by (slots) or (heads, slots)
        if self.bias is not None:
            x = op.Add(x, self.bias)
        return op.Reshape(x, [0, 0, heads * slots])  # type: ignore[no-any-return]  # (B, S, heads * slots)


class Attention(nn.Module):
    """Grouped-query self-attention over a KV cache that is extended in place.

    Heads are laid out and rotated as `layout` says; layers of one network may have different ones.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        layout: HeadLayout,
        linear: LinearFactory,
        *,
        qkv_bias: bool,
        output: str,
        output_bias: bool,
        q_norm: HeadNorm | None = None,
        k_norm: HeadNorm | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.layout = heads, kv_heads, layout
        rotated, plain = layout.rotated(), layout.plain()
        self.qkv_proj = linear(
            [
                Part("q_proj", heads * layout.size, layout.heads(rotated, heads)),
                Part("k_proj", kv_heads * layout.size, layout.heads(rotated, kv_heads)),
                Part("v_proj", kv_heads * layout.size, layout.heads(plain, kv_heads)),
            ],
            hidden_size,
            bias=qkv_bias,
        )
        self.o_proj = linear(
            [Part(output, hidden_size)], heads * layout.size, bias=output_bias, columns=layout.heads(plain, heads)
        )
        self.q_layernorm, self.k_layernorm = q_norm, k_norm
        self.tables = (layout,)

    def forward(self, op: Any, x: ir.Value, cache: Cache) -> tuple[ir.Value, ir.Value, ir.Value]:
        """``x [B, S, H]`` → the block's output ``[B, S, H]``, and the present key and value."""
        qkv = self.qkv_proj(op, x)  # (B, S, (heads + 2 kv_heads) * slots)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            sizes = [count * self.layout.slots for count in (self.heads, self.kv_heads, self.kv_heads)]
            q, k, v = op.Split(qkv, sizes, axis=-1, _outputs=3)  # (B, S, heads * slots), twice (B, S, kv_heads * slots)
            q, k = self.q_layernorm(op, q), self.k_layernorm(op, k)
            qkv = op.Concat(q, k, v, axis=-1)  # (B, S, (heads + 2 kv_heads) * slots)
        cos, sin = cache.rotary[self.layout]
        y, present_key, present_value = getattr(op, GROUP_QUERY_ATTENTION)(
            qkv,
            cache.past_key,
            cache.past_value,
            cache.last_position,
            cache.total,
            cos,
            sin,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            scale=1 / math.sqrt(self.layout.size),
            _domain=PMPD_DOMAIN,
            _outputs=3,
        )  # y (B, S, heads * slots), presents (B, kv_heads, P, slots)
        return self.o_proj(op, y), present_key, present_value  # (B, S, H)
