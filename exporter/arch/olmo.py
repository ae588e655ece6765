"""OLMo 2 and OLMo 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from pmpd.exporter.arch.decoder import DecoderLayer
from pmpd.exporter.arch.gated import GatedFamily
from pmpd.exporter.arch.reading import read_flag, read_layouts, read_table, read_windows
from pmpd.exporter.nn import Attention, Cache, GatedMlp, HeadLayout, JointRMSHeadNorm, LinearFactory, Norm, RMSNorm

__all__ = ["Olmo2", "Olmo3", "OlmoLayer"]

_FULL, _SLIDING = "full_attention", "sliding_attention"


class OlmoLayer(DecoderLayer):
    """Attention, then a gated MLP, with norms of what the two add to the stream, and none of what they read."""

    post_attention_layernorm: Norm

    def __init__(self, family: Olmo2, linear: LinearFactory, index: int) -> None:
        super().__init__(family, linear, index)
        shape, epsilon, layout = family.shape, family.norm_epsilon, family.layouts[index]
        self.self_attn = Attention(
            shape.hidden_size,
            shape.heads,
            shape.kv_heads,
            layout,
            linear,
            qkv_bias=family.attention_bias,
            output="o_proj",
            output_bias=family.attention_bias,
            q_norm=("q_norm", JointRMSHeadNorm(shape.heads, layout, epsilon=epsilon)),
            k_norm=("k_norm", JointRMSHeadNorm(shape.kv_heads, layout, epsilon=epsilon)),
            window=family.windows[index],
        )
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, epsilon=epsilon)
        self.mlp = GatedMlp(
            shape.hidden_size, shape.intermediate_size, linear, activation=family.activation, bias=False
        )
        self.post_feedforward_layernorm = RMSNorm(shape.hidden_size, epsilon=epsilon)

    def forward(
        self, op: Any, stream: ir.Value, block: ir.Value | None, cache: Cache
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Return the stream and this block's output ``[B, S, H]``, and the present key and value."""
        stream = stream if block is None else op.Add(stream, block)
        attended, key, value = self.self_attn(op, stream, cache)
        attended, _ = self.post_attention_layernorm(op, attended)
        stream = op.Add(stream, attended)
        y, _ = self.post_feedforward_layernorm(op, self.mlp(op, stream))
        return stream, y, key, value


@dataclass(frozen=True, kw_only=True)
class Olmo2(GatedFamily):
    """The OLMo 2 family (OLMo et al., 2024): norms behind attention and MLP, and of all heads of queries or keys."""

    model_type = "olmo2"
    layer = OlmoLayer
    attention_bias: bool
    layouts: tuple[HeadLayout, ...]
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Olmo2:
        """Read `config.json`."""
        common = cls.common(config, context_length=context_length, default_epsilon=1e-5)
        shape = common["shape"]
        return cls(
            **common,
            attention_bias=read_flag(config, "attention_bias"),
            layouts=(shape.head,) * shape.layers,
            windows=(None,) * shape.layers,
        )


@dataclass(frozen=True, kw_only=True)
class Olmo3(Olmo2):
    """The OLMo 3 family (2025): windows in three of four layers, YaRN in the others."""

    model_type = "olmo3"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Olmo3:
        """Read `config.json`."""
        config = {"rope_theta": 5e5, **config, "rope_parameters": _rope_parameters(config)}
        common = cls.common(config, context_length=context_length, default_epsilon=1e-5)
        shape, dim = common["shape"], common["shape"].head.size
        kinds = config.get("layer_types") or [_FULL if index % 4 == 3 else _SLIDING for index in range(shape.layers)]
        windows = read_windows(kinds, shape.layers, config.get("sliding_window", 4096), shape.context_length)
        return cls(
            **common,
            attention_bias=read_flag(config, "attention_bias"),
            layouts=read_layouts(config, kinds, dim),
            windows=windows,
        )


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the rotary settings of each kind of layer: before transformers 5, a scaling is that of full attention."""
    settings = read_table(config, "rope_parameters") or {_FULL: read_table(config, "rope_scaling")}
    return {kind: {"rope_type": "default", **read_table(settings, kind)} for kind in (_FULL, _SLIDING)}
