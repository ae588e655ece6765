"""What most families are: attention, then a gated MLP, each behind an RMS norm. They differ in parts of these."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pmpd.exporter.arch.decoder import DecoderLayer, DecoderShape, Family
from pmpd.exporter.arch.reading import read_activation, read_number, read_shape
from pmpd.exporter.nn import Attention, GatedMlp, LayerNorm, LinearFactory, Norm, RMSNorm

__all__ = ["GatedFamily", "GatedLayer"]


class GatedLayer(DecoderLayer):
    """Attention, then a gated MLP, each behind an RMS norm. A family's subclass says how the two are, if not plain."""

    attention: ClassVar[type[Attention]] = Attention
    post_attention_layernorm: Norm

    def __init__(self, family: Any, linear: LinearFactory, index: int) -> None:
        super().__init__(family, linear, index)
        shape, epsilon = family.shape, family.norm_epsilon
        attention = {"layout": shape.head, "qkv_bias": False, "output": "o_proj", "output_bias": False}
        self.input_layernorm = family.norm(shape.hidden_size, epsilon=epsilon)
        self.self_attn = self.attention(
            shape.hidden_size,
            shape.heads,
            shape.kv_heads,
            linear=linear,
            **(attention | self.attention_options(family, index)),
        )
        self.post_attention_layernorm = family.norm(shape.hidden_size, epsilon=epsilon)
        mlp = {"activation": family.activation, "bias": False}
        self.mlp = GatedMlp(shape.hidden_size, shape.intermediate_size, linear, **(mlp | self.mlp_options(family)))

    def attention_options(self, family: Any, index: int) -> dict[str, Any]:
        """Return what the attention of block number `index` has, as arguments of `Attention`."""
        return {}

    def mlp_options(self, family: Any) -> dict[str, Any]:
        """Return what the MLP has, as arguments of `GatedMlp`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class GatedFamily(Family, ABC):
    """A family of `GatedLayer`s."""

    norm: ClassVar[type[LayerNorm | RMSNorm]] = RMSNorm
    shape: DecoderShape
    norm_epsilon: float
    activation: str

    @classmethod
    def common(
        cls,
        config: Mapping[str, Any],
        *,
        context_length: int | None,
        default_epsilon: float = 1e-6,
        default_head_dim: int | None = None,
        default_tied: bool = False,
    ) -> dict[str, Any]:
        """Read what all these families have, as arguments of the class; defaults are those of a family."""
        return {
            "shape": read_shape(
                config, context_length=context_length, default_head_dim=default_head_dim, default_tied=default_tied
            ),
            "norm_epsilon": read_number(config, "rms_norm_eps", default_epsilon),
            "activation": read_activation(config, "silu"),
        }
