"""Granite 3, the dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.exporter.arch.gated import GatedFamily, GatedLayer
from pmpd.exporter.arch.reading import read_flag, read_number
from pmpd.exporter.nn import RMSNorm

__all__ = ["Granite", "GraniteLayer"]


class GraniteLayer(GatedLayer):
    """Multipliers of scores, and of what a block adds to the stream: these are folded into its last weights."""

    def attention_options(self, family: Granite, index: int) -> dict[str, Any]:
        """Return biases and multipliers."""
        return {
            "qkv_bias": family.attention_bias,
            "output_bias": family.attention_bias,
            "output_scale": family.residual_multiplier,
            "scale": family.attention_multiplier,
        }

    def mlp_options(self, family: Granite) -> dict[str, Any]:
        """Return biases and multiplier."""
        return {"bias": family.mlp_bias, "output_scale": family.residual_multiplier}


@dataclass(frozen=True, kw_only=True)
class Granite(GatedFamily):
    """The Granite family (IBM, 2024): Llama with multipliers."""

    model_type = "granite"
    layer = GraniteLayer
    embedding_scale: float
    attention_bias: bool
    mlp_bias: bool
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Granite:
        """Read `config.json`."""
        return cls(
            **cls.common(config, context_length=context_length),
            attention_bias=read_flag(config, "attention_bias"),
            mlp_bias=read_flag(config, "mlp_bias"),
            embedding_scale=read_number(config, "embedding_multiplier", 1.0),
            attention_multiplier=read_number(config, "attention_multiplier", 1.0),
            residual_multiplier=read_number(config, "residual_multiplier", 1.0),
            logits_scaling=read_number(config, "logits_scaling", 1.0),
        )

    def make_last_norm(self) -> RMSNorm:
        """Make the last norm, which divides the logits: the output layer's weights may be the embedding's too."""
        return RMSNorm(self.shape.hidden_size, epsilon=self.norm_epsilon, scale=1 / self.logits_scaling)
