"""StableLM: StableLM-Zephyr-3B and its siblings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.exporter.arch.decoder import DecoderLayer, DecoderShape, Family
from pmpd.exporter.arch.reading import read_activation, read_flag, read_number, read_shape
from pmpd.exporter.nn import Attention, GatedMlp, HeadNorm, LayerNorm, LinearFactory

__all__ = ["StableLM", "StableLMLayer"]


class StableLMLayer(DecoderLayer):
    """Attention, then a gated MLP; or both side by side behind one norm."""

    def __init__(self, family: StableLM, linear: LinearFactory, index: int) -> None:
        super().__init__(family, linear, index)
        shape, epsilon = family.shape, family.norm_epsilon

        def head_norm(name: str, heads: int) -> tuple[str, HeadNorm] | None:
            if not family.qk_norm:
                return None
            return name, HeadNorm(heads, shape.head, epsilon=epsilon, bias=False, per_head=True)

        self.input_layernorm = LayerNorm(shape.hidden_size, epsilon=epsilon)
        self.self_attn = Attention(
            shape.hidden_size,
            shape.heads,
            shape.kv_heads,
            shape.head,
            linear,
            qkv_bias=family.qkv_bias,
            output="o_proj",
            output_bias=False,
            q_norm=head_norm("q_layernorm", shape.heads),
            k_norm=head_norm("k_layernorm", shape.kv_heads),
        )
        self.post_attention_layernorm = None
        if not family.parallel_residual:
            self.post_attention_layernorm = LayerNorm(shape.hidden_size, epsilon=epsilon)
        self.mlp = GatedMlp(
            shape.hidden_size, shape.intermediate_size, linear, activation=family.activation, bias=False
        )


@dataclass(frozen=True)
class StableLM(Family):
    """The StableLM family: partial rotary embedding, layer norms with bias, gated MLP."""

    model_type = "stablelm"
    layer = StableLMLayer
    norm = LayerNorm
    shape: DecoderShape
    norm_epsilon: float
    activation: str
    qkv_bias: bool
    qk_norm: bool
    parallel_residual: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> StableLM:
        """Read `config.json`."""
        return cls(
            shape=read_shape(config, context_length=context_length, default_rotary_share=0.25),
            norm_epsilon=read_number(config, "layer_norm_eps", 1e-5),
            activation=read_activation(config, "silu"),
            qkv_bias=read_flag(config, "use_qkv_bias"),
            qk_norm=read_flag(config, "qk_layernorm"),
            parallel_residual=read_flag(config, "use_parallel_residual"),
        )
