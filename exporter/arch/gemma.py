"""Gemma, the first; and what the later ones have of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.exporter.arch.gated import GatedFamily, GatedLayer
from pmpd.exporter.arch.reading import read_flag
from pmpd.exporter.nn import OffsetRMSNorm
from pmpd.runtime.errors import PmpdError

__all__ = ["Gemma", "GemmaFamily", "GemmaLayer"]

_GELU = "gelu_pytorch_tanh"


class GemmaLayer(GatedLayer):
    """Optional biases."""

    def attention_options(self, family: Any, index: int) -> dict[str, Any]:
        """Return where the attention has biases."""
        return {"qkv_bias": family.attention_bias, "output_bias": family.attention_bias}


@dataclass(frozen=True, kw_only=True)
class GemmaFamily(GatedFamily):
    """What all Gemmas have: norms with an offset, embeddings times the root of their width, tied, wide heads."""

    norm = OffsetRMSNorm
    embedding_scale: float
    attention_bias: bool

    @classmethod
    def gemma_common(
        cls, config: Mapping[str, Any], *, context_length: int | None, activation: str | None
    ) -> dict[str, Any]:
        """Read what all of them have, as arguments of the class; the MLP has the `activation`, or Gemma's own."""
        if read_flag(config, "use_bidirectional_attention"):
            raise PmpdError(
                "config.json: use_bidirectional_attention: it attends to tokens that come later, and generates no text"
            )
        common = cls.common(
            {**config, "hidden_act": activation or _GELU},
            context_length=context_length,
            default_head_dim=256,
            default_tied=True,
        )
        return {
            **common,
            "embedding_scale": math.sqrt(common["shape"].hidden_size),
            "attention_bias": read_flag(config, "attention_bias"),
        }


@dataclass(frozen=True, kw_only=True)
class Gemma(GemmaFamily):
    """The Gemma family (2024)."""

    model_type = "gemma"
    layer = GemmaLayer

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Gemma:
        """Read `config.json`."""
        activation = config.get("hidden_activation") or config.get("hidden_act")
        # The first checkpoints say "gelu" and were trained with its approximation.
        activation = _GELU if activation == "gelu" else activation
        return cls(**cls.gemma_common(config, context_length=context_length, activation=activation))
