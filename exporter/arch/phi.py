"""Phi: phi-1, phi-1.5, phi-2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.exporter.arch.decoder import DecoderLayer, DecoderShape, Family
from pmpd.exporter.arch.reading import read_activation, read_flag, read_number, read_shape
from pmpd.exporter.nn import Attention, HeadNorm, LayerNorm, LinearFactory, Mlp

__all__ = ["Phi", "PhiLayer"]


class PhiLayer(DecoderLayer):
    """Attention and MLP side by side behind one norm."""

    def __init__(self, family: Phi, linear: LinearFactory, index: int) -> None:
        super().__init__(family, linear, index)
        shape, epsilon = family.shape, family.norm_epsilon

        def head_norm(name: str, heads: int) -> tuple[str, HeadNorm] | None:
            if not family.qk_norm:
                return None
            return name, HeadNorm(heads, shape.head, epsilon=epsilon, bias=True, per_head=False)

        self.input_layernorm = LayerNorm(shape.hidden_size, epsilon=epsilon)
        self.self_attn = Attention(
            shape.hidden_size,
            shape.heads,
            shape.kv_heads,
            shape.head,
            linear,
            qkv_bias=True,
            output="dense",
            output_bias=True,
            q_norm=head_norm("q_layernorm", shape.heads),
            k_norm=head_norm("k_layernorm", shape.kv_heads),
        )
        self.post_attention_layernorm = None
        self.mlp = Mlp(shape.hidden_size, shape.intermediate_size, linear, activation=family.activation, bias=True)


@dataclass(frozen=True)
class Phi(Family):
    """The Phi family (Li et al., 2023): partial rotary embedding, parallel blocks, biases everywhere."""

    model_type = "phi"
    layer = PhiLayer
    norm = LayerNorm
    last_norm = "final_layernorm"
    head_bias = True
    shape: DecoderShape
    norm_epsilon: float
    activation: str
    qk_norm: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Phi:
        """Read `config.json`."""
        return cls(
            shape=read_shape(config, context_length=context_length, default_rotary_share=0.5),
            norm_epsilon=read_number(config, "layer_norm_eps", 1e-5),
            activation=read_activation(config, "gelu_new"),
            qk_norm=read_flag(config, "qk_layernorm"),
        )
