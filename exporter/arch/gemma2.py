"""Gemma 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from pmpd.exporter.arch.gemma import GemmaFamily, GemmaLayer
from pmpd.exporter.arch.reading import read_number, read_softcap, read_windows
from pmpd.exporter.nn import Cache, LinearFactory

__all__ = ["Gemma2", "SandwichLayer"]


class SandwichLayer(GemmaLayer):
    """Attention and MLP each between two norms, of what they read and of what they add to the stream."""

    def __init__(self, family: Any, linear: LinearFactory, index: int) -> None:
        super().__init__(family, linear, index)
        size, epsilon = family.shape.hidden_size, family.norm_epsilon
        self.pre_feedforward_layernorm = family.norm(size, epsilon=epsilon)
        self.post_feedforward_layernorm = family.norm(size, epsilon=epsilon)

    def attention_options(self, family: Any, index: int) -> dict[str, Any]:
        """Return biases, scale and limits."""
        return {
            **super().attention_options(family, index),
            "scale": family.attention_scale,
            "window": family.windows[index],
            "softcap": family.attention_softcap,
        }

    def forward(
        self, op: Any, stream: ir.Value, block: ir.Value | None, cache: Cache
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Return the stream and this block's output ``[B, S, H]``, and the present key and value."""
        x, stream = self.input_layernorm(op, stream, block)
        attended, key, value = self.self_attn(op, x, cache)
        attended, _ = self.post_attention_layernorm(op, attended)
        x, stream = self.pre_feedforward_layernorm(op, stream, attended)
        y, _ = self.post_feedforward_layernorm(op, self.mlp(op, x))
        return stream, y, key, value


@dataclass(frozen=True, kw_only=True)
class Gemma2(GemmaFamily):
    """The Gemma 2 family (2024): norms on both sides, softcaps of scores and logits, windows in every other layer."""

    model_type = "gemma2"
    layer = SandwichLayer
    attention_scale: float
    attention_softcap: float | None
    logits_softcap: float | None
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Gemma2:
        """Read `config.json`."""
        common = cls.gemma_common(config, context_length=context_length, activation=config.get("hidden_activation"))
        shape = common["shape"]
        kinds = config.get("layer_types") or [
            "full_attention" if index % 2 else "sliding_attention" for index in range(shape.layers)
        ]
        window = config.get("sliding_window", 4096)
        return cls(
            **common,
            attention_scale=read_number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
            attention_softcap=read_softcap(config, "attn_logit_softcapping", 50.0),
            logits_softcap=read_softcap(config, "final_logit_softcapping", 30.0),
            windows=read_windows(kinds, shape.layers, window, shape.context_length),
        )
