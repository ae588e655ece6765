"""Ministral 3, the text model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pmpd.exporter.arch.gated import GatedFamily, GatedLayer
from pmpd.exporter.arch.reading import read_number, read_table, read_windows
from pmpd.exporter.nn import EarlyRotation, HeadLayout, PositionScale
from pmpd.runtime.errors import PmpdError

__all__ = ["Ministral3", "Ministral3Layer", "ScaledMinistral3Layer"]


class Ministral3Layer(GatedLayer):
    """Perhaps a sliding window."""

    def attention_options(self, family: Ministral3, index: int) -> dict[str, Any]:
        """Return the window."""
        return {"window": family.window}


class ScaledMinistral3Layer(Ministral3Layer):
    """Queries grow with their position, beyond the original context."""

    attention = EarlyRotation

    def attention_options(self, family: Ministral3, index: int) -> dict[str, Any]:
        """Return window and layout of queries."""
        head = family.shape.head
        assert head.rotary is not None
        query = HeadLayout(head.size, replace(head.rotary, position_scale=family.query_scale))
        return {**super().attention_options(family, index), "query_layout": query}


@dataclass(frozen=True, kw_only=True)
class Ministral3(GatedFamily):
    """The Ministral 3 family (2025): YaRN, and queries that grow with their position."""

    model_type = "ministral3"
    layer = Ministral3Layer
    window: int | None
    query_scale: PositionScale | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Ministral3:
        """Read `config.json`."""
        common = cls.common(config, context_length=context_length, default_epsilon=1e-5, default_head_dim=128)
        shape = common["shape"]
        rope = read_table(config, "rope_parameters")
        if "llama_4_scaling_beta" not in rope or "original_max_position_embeddings" not in rope:
            raise PmpdError(
                "config.json: rope_parameters of ministral3 must have llama_4_scaling_beta and "
                "original_max_position_embeddings: is it a complete Hugging Face checkpoint?"
            )
        original = int(read_number(rope, "original_max_position_embeddings"))
        beta = read_number(rope, "llama_4_scaling_beta")
        longer = shape.context_length > original
        (window,) = read_windows(["sliding_attention"], 1, config.get("sliding_window"), shape.context_length)
        return cls(**common, window=window, query_scale=PositionScale(beta, original) if longer else None)

    def make_layer(self, linear: Any, index: int) -> GatedLayer:
        """Make a block; within the original context queries do not grow."""
        return (self.layer if self.query_scale is None else ScaledMinistral3Layer)(self, linear, index)
