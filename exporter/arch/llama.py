"""Llama: Vicuna, MobileLLaMA, Llama 3, LongChat, TinyLlama, SmolLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.exporter.arch.decoder import DecoderLayer, DecoderShape, Family
from pmpd.exporter.arch.reading import read_activation, read_flag, read_number, read_shape
from pmpd.exporter.nn import Attention, GatedMlp, LinearFactory, RMSNorm

__all__ = ["Llama", "LlamaLayer"]


class LlamaLayer(DecoderLayer):
    """Attention, then a gated MLP, each behind an RMS norm."""

    def __init__(self, family: Llama, linear: LinearFactory, index: int) -> None:
        super().__init__(family, linear, index)
        shape, epsilon = family.shape, family.norm_epsilon
        self.input_layernorm = RMSNorm(shape.hidden_size, epsilon=epsilon)
        self.self_attn = Attention(
            shape.hidden_size,
            shape.heads,
            shape.kv_heads,
            shape.head,
            linear,
            qkv_bias=family.attention_bias,
            output="o_proj",
            output_bias=family.attention_bias,
        )
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, epsilon=epsilon)
        self.mlp = GatedMlp(
            shape.hidden_size,
            shape.intermediate_size,
            linear,
            activation=family.activation,
            bias=family.mlp_bias,
        )


@dataclass(frozen=True)
class Llama(Family):
    """The Llama family (Touvron et al., 2023), with grouped-query attention and optional biases."""

    model_type = "llama"
    layer = LlamaLayer
    norm = RMSNorm
    shape: DecoderShape
    norm_epsilon: float
    activation: str
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Llama:
        """Read `config.json`."""
        return cls(
            shape=read_shape(config, context_length=context_length),
            norm_epsilon=read_number(config, "rms_norm_eps", 1e-6),
            activation=read_activation(config, "silu"),
            attention_bias=read_flag(config, "attention_bias"),
            mlp_bias=read_flag(config, "mlp_bias"),
        )
