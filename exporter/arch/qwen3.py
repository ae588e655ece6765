"""Qwen3, the dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.exporter.arch.gated import GatedFamily, GatedLayer
from pmpd.exporter.arch.qwen2 import read_qwen_windows
from pmpd.exporter.arch.reading import read_flag
from pmpd.exporter.nn import RMSHeadNorm

__all__ = ["Qwen3", "Qwen3Layer"]


class Qwen3Layer(GatedLayer):
    """Norms of queries and keys over each head, before the rotation."""

    def attention_options(self, family: Qwen3, index: int) -> dict[str, Any]:
        """Return norms, biases and window."""
        shape, epsilon = family.shape, family.norm_epsilon
        return {
            "qkv_bias": family.attention_bias,
            "output_bias": family.attention_bias,
            "q_norm": ("q_norm", RMSHeadNorm(shape.heads, shape.head, epsilon=epsilon)),
            "k_norm": ("k_norm", RMSHeadNorm(shape.kv_heads, shape.head, epsilon=epsilon)),
            "window": family.windows[index],
        }


@dataclass(frozen=True, kw_only=True)
class Qwen3(GatedFamily):
    """The Qwen3 family (Yang et al., 2025): norms of queries and keys, heads of a size of their own."""

    model_type = "qwen3"
    layer = Qwen3Layer
    attention_bias: bool
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Qwen3:
        """Read `config.json`."""
        common = cls.common(config, context_length=context_length, default_head_dim=128)
        return cls(
            **common,
            attention_bias=read_flag(config, "attention_bias"),
            windows=read_qwen_windows(config, common["shape"].layers, common["shape"].context_length),
        )
