"""Hunyuan, the dense ones (Hunyuan 0.5B to 7B, Hunyuan-MT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pmpd.exporter.arch.gated import GatedFamily, GatedLayer
from pmpd.exporter.arch.reading import read_flag, read_number, read_table
from pmpd.exporter.nn import EarlyRotation, HeadLayout, NtkScaling, RMSHeadNorm

__all__ = ["Hunyuan", "HunyuanLayer"]


class HunyuanLayer(GatedLayer):
    """Norms of queries and keys over each head, behind the rotation."""

    attention = EarlyRotation

    def attention_options(self, family: Hunyuan, index: int) -> dict[str, Any]:
        """Return norms and biases."""
        shape, epsilon = family.shape, family.norm_epsilon
        return {
            "qkv_bias": family.attention_bias,
            "output_bias": family.attention_bias,
            "q_norm": ("query_layernorm", RMSHeadNorm(shape.heads, shape.head, epsilon=epsilon)),
            "k_norm": ("key_layernorm", RMSHeadNorm(shape.kv_heads, shape.head, epsilon=epsilon)),
        }


@dataclass(frozen=True, kw_only=True)
class Hunyuan(GatedFamily):
    """The dense Hunyuan family (Tencent, 2025): norms behind the rotation, a rotary base stretched by a constant."""

    model_type = "hunyuan_v1_dense"
    layer = HunyuanLayer
    attention_bias: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Hunyuan:
        """Read `config.json`."""
        common = cls.common(config, context_length=context_length, default_epsilon=1e-5)
        shape = common["shape"]
        scaling = read_table(config, "rope_parameters") or read_table(config, "rope_scaling")
        if scaling.get("alpha") and "dynamic" in (scaling.get("rope_type"), scaling.get("type")):
            rotary = replace(shape.head.rotary, scaling=NtkScaling(read_number(scaling, "alpha")))
            common["shape"] = replace(shape, head=HeadLayout(shape.head.size, rotary))
        return cls(**common, attention_bias=read_flag(config, "attention_bias"))
