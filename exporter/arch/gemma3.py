"""Gemma 3, the text model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pmpd.exporter.arch.gemma import GemmaFamily
from pmpd.exporter.arch.gemma2 import SandwichLayer
from pmpd.exporter.arch.reading import read_layouts, read_number, read_softcap, read_table, read_windows
from pmpd.exporter.nn import HeadLayout, OffsetRMSHeadNorm
from pmpd.runtime.errors import PmpdError

__all__ = ["Gemma3", "Gemma3Layer"]

_FULL, _SLIDING = "full_attention", "sliding_attention"
# What transformers takes for numbers that published configurations leave out.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}


class Gemma3Layer(SandwichLayer):
    """Norms of queries and keys before the rotation, which depends on whether the layer has a window."""

    def attention_options(self, family: Any, index: int) -> dict[str, Any]:
        """Return biases, scale, window, layout and norms."""
        shape, epsilon, layout = family.shape, family.norm_epsilon, family.layouts[index]
        return {
            **super().attention_options(family, index),
            "layout": layout,
            "q_norm": ("q_norm", OffsetRMSHeadNorm(shape.heads, layout, epsilon=epsilon)),
            "k_norm": ("k_norm", OffsetRMSHeadNorm(shape.kv_heads, layout, epsilon=epsilon)),
        }


@dataclass(frozen=True, kw_only=True)
class Gemma3(GemmaFamily):
    """The Gemma 3 family (2025): norms on both sides, norms of queries and keys, two rotations, many windows."""

    model_type = "gemma3_text"
    layer = Gemma3Layer
    attention_scale: float
    attention_softcap: float | None = None  # transformers reads `attn_logit_softcapping` and does not use it
    logits_softcap: float | None
    windows: tuple[int | None, ...]
    layouts: tuple[HeadLayout, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Gemma3:
        """Read `config.json`."""
        config = _DEFAULTS | {name: value for name, value in config.items() if value is not None}
        config["rope_parameters"] = _rope_parameters(config)
        common = cls.gemma_common(config, context_length=context_length, activation=config.get("hidden_activation"))
        shape, dim = common["shape"], common["shape"].head.size
        kinds = config.get("layer_types") or _layer_types(config, shape.layers)
        windows = read_windows(kinds, shape.layers, config.get("sliding_window", 4096), shape.context_length)
        full, *layouts = read_layouts(config, [_FULL, *kinds], dim)
        return cls(
            **common | {"shape": replace(shape, head=full)},
            attention_scale=read_number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
            logits_softcap=read_softcap(config, "final_logit_softcapping"),
            windows=windows,
            layouts=tuple(layouts),
        )


def _layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """Return the kinds of layers as `sliding_window_pattern` says: every so many layers one sees all."""
    period = config.get("sliding_window_pattern", 6)
    if type(period) is not int or period < 1:
        raise PmpdError(f"config.json: sliding_window_pattern must be a whole number of 1 or more, got {period!r}")
    return [_SLIDING if (index + 1) % period else _FULL for index in range(layers)]


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rotary settings of each kind of layer as transformers 5 writes them, whichever version did."""
    parameters = read_table(config, "rope_parameters")
    full, sliding = (read_table(parameters, kind) for kind in (_FULL, _SLIDING))
    return {
        _FULL: {"rope_theta": config.get("rope_theta", 1e6), **read_table(config, "rope_scaling"), **full},
        _SLIDING: {"rope_theta": config.get("rope_local_base_freq", 1e4), **sliding},
    }
