"""Llama: Llama 2 and 3, Vicuna, MobileLLaMA, LongChat, TinyLlama, SmolLM and SmolLM2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.exporter.arch.gated import GatedFamily, GatedLayer
from pmpd.exporter.arch.reading import read_flag

__all__ = ["Llama", "LlamaLayer"]


class LlamaLayer(GatedLayer):
    """Optional biases."""

    def attention_options(self, family: Llama, index: int) -> dict[str, Any]:
        """Return where the attention has biases."""
        return {"qkv_bias": family.attention_bias, "output_bias": family.attention_bias}

    def mlp_options(self, family: Llama) -> dict[str, Any]:
        """Return where the MLP has biases."""
        return {"bias": family.mlp_bias}


@dataclass(frozen=True, kw_only=True)
class Llama(GatedFamily):
    """The Llama family (Touvron et al., 2023), with grouped-query attention and optional biases."""

    model_type = "llama"
    layer = LlamaLayer
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Llama:
        """Read `config.json`."""
        return cls(
            **cls.common(config, context_length=context_length),
            attention_bias=read_flag(config, "attention_bias"),
            mlp_bias=read_flag(config, "mlp_bias"),
        )
