"""Self-attention with rotary embedding and KV cache: merged projection, one fused operator, output projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.graph.operators import GROUP_QUERY_ATTENTION, PMPD_DOMAIN
from pmpd.exporter.nn.head_norm import HeadNorm, JointRMSHeadNorm, RMSHeadNorm
from pmpd.exporter.nn.linear import LinearFactory, Part
from pmpd.exporter.nn.rotary import HeadLayout

__all__ = ["Attention", "Cache", "EarlyRotation"]


@dataclass(frozen=True)
class Cache:
    """What attention needs besides activations: this layer's past, lengths, and the rotary tables.

    `past_key` and `past_value` are ``[B, kv_heads, P, slots]``; `last_position` int32 ``[B]`` is the number of valid
    positions after this run, less one; `total` int32 the length of the mask; `first_position` int64 ``[B]`` the number
    of positions before this run, where a layer needs it; `rotary` cosines and sines ``[positions, pairs]`` of each
    layout that the network's layers ask for.
    """

    past_key: ir.Value
    past_value: ir.Value
    last_position: ir.Value
    total: ir.Value
    first_position: ir.Value | None
    rotary: Mapping[HeadLayout, tuple[ir.Value, ir.Value]]


class Attention(nn.Module):
    """Grouped-query self-attention over a KV cache that is extended in place.

    Heads are laid out and rotated as `layout` says; layers of one network may have different ones. Norms of queries and
    keys, named as in the checkpoint, come before the rotation.

    Args:
        hidden_size: H, of the residual stream.
        heads: heads of queries.
        kv_heads: heads of keys, and of values.
        layout: how heads are laid out and rotated.
        linear: makes the projections.
        qkv_bias: queries, keys and values have biases.
        output: the output projection's name in the checkpoint.
        output_bias: it has a bias.
        output_scale: its result is multiplied by this.
        q_norm: name and norm of queries.
        k_norm: name and norm of keys.
        scale: what scores are multiplied by; default one over the square root of a head's size.
        window: a token sees itself and the ``window - 1`` before it; None: all.
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
        output_scale: float = 1.0,
        q_norm: tuple[str, HeadNorm | RMSHeadNorm | JointRMSHeadNorm] | None = None,
        k_norm: tuple[str, HeadNorm | RMSHeadNorm | JointRMSHeadNorm] | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.layout = heads, kv_heads, layout
        self.scale = 1 / math.sqrt(layout.size) if scale is None else scale
        limits = {"window": window, "softcap": softcap}
        self.limits = {name: value for name, value in limits.items() if value is not None}
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
            [Part(output, hidden_size, scale=output_scale)],
            heads * layout.size,
            bias=output_bias,
            columns=layout.heads(plain, heads),
        )
        self.norm_names = (q_norm[0], k_norm[0]) if q_norm is not None and k_norm is not None else None
        for norm in (q_norm, k_norm):
            if norm is not None:
                setattr(self, *norm)
        self.operator_layout = layout

    @property
    def tables(self) -> tuple[HeadLayout, ...]:
        """The layouts whose cosines and sines it reads."""
        return (self.operator_layout,)

    def forward(self, op: Any, x: ir.Value, cache: Cache) -> tuple[ir.Value, ir.Value, ir.Value]:
        """``x [B, S, H]`` → the block's output ``[B, S, H]``, and the present key and value."""
        qkv = self.prepared(op, self.qkv_proj(op, x), cache)  # (B, S, (heads + 2 kv_heads) * slots)
        cos, sin = cache.rotary[self.operator_layout]
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
            scale=self.scale,
            **self.limits,
            _domain=PMPD_DOMAIN,
            _outputs=3,
        )  # y (B, S, heads * slots), presents (B, kv_heads, P, slots)
        return self.o_proj(op, y), present_key, present_value  # (B, S, H)

    def prepared(self, op: Any, qkv: ir.Value, cache: Cache) -> ir.Value:
        """Return ``qkv [B, S, (heads + 2 kv_heads) * slots]`` as the operator takes it: with norms, if there are."""
        if self.norm_names is None:
            return qkv
        q, k, v = self.split(op, qkv)
        return op.Concat(*self.normalized(op, q, k), v, axis=-1)  # type: ignore[no-any-return]

    def split(self, op: Any, qkv: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return queries ``[B, S, heads * slots]``, keys and values ``[B, S, kv_heads * slots]``."""
        sizes = [count * self.layout.slots for count in (self.heads, self.kv_heads, self.kv_heads)]
        return op.Split(qkv, sizes, axis=-1, _outputs=3)  # type: ignore[no-any-return]

    def normalized(self, op: Any, q: ir.Value, k: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return queries and keys behind their norms, if they have some."""
        if self.norm_names is None:
            return q, k
        q_norm, k_norm = (getattr(self, name) for name in self.norm_names)
        return q_norm(op, q), k_norm(op, k)


class EarlyRotation(Attention):
    """Attention whose queries and keys are rotated before their norms, or not by the same table.

    The operator then has nothing to rotate. `query_layout` is that of queries, where it is another than that of keys.
    """

    def __init__(self, *args: Any, query_layout: HeadLayout | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.query_layout = query_layout or self.layout
        self.operator_layout = HeadLayout(self.layout.size, None)

    @property
    def tables(self) -> tuple[HeadLayout, ...]:
        """The layouts whose cosines and sines it reads."""
        return (self.query_layout, self.layout, self.operator_layout)

    def prepared(self, op: Any, qkv: ir.Value, cache: Cache) -> ir.Value:
        """Return ``qkv [B, S, (heads + 2 kv_heads) * slots]`` with queries and keys rotated, then normalized."""
        q, k, v = self.split(op, qkv)
        q = self._rotated(op, q, cache, self.query_layout, self.heads)
        k = self._rotated(op, k, cache, self.layout, self.kv_heads)
        return op.Concat(*self.normalized(op, q, k), v, axis=-1)  # type: ignore[no-any-return]

    def _rotated(self, op: Any, x: ir.Value, cache: Cache, layout: HeadLayout, heads: int) -> ir.Value:
        cos, sin = cache.rotary[layout]
        return op.RotaryEmbedding(  # type: ignore[no-any-return]  # (B, S, heads * slots)
            x,
            cache.first_position,
            cos,
            sin,
            num_heads=heads,
            rotary_embedding_dim=2 * layout.pairs,
            _domain="com.microsoft",
        )
