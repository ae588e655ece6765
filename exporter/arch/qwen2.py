"""Qwen2: Qwen1.5 to Qwen2.5 (Coder and Math too), the distillations of DeepSeek-R1 into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.exporter.arch.gated import GatedFamily, GatedLayer
from pmpd.exporter.arch.reading import read_flag, read_windows

__all__ = ["Qwen2", "Qwen2Layer", "read_qwen_windows"]


class Qwen2Layer(GatedLayer):
    """Biases of queries, keys and values; some layers may have a sliding window."""

    def attention_options(self, family: Qwen2, index: int) -> dict[str, Any]:
        """Return biases and window."""
        return {"qkv_bias": True, "window": family.windows[index]}


@dataclass(frozen=True, kw_only=True)
class Qwen2(GatedFamily):
    """The Qwen2 family (Yang et al., 2024): Llama with biases of queries, keys and values."""

    model_type = "qwen2"
    layer = Qwen2Layer
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Qwen2:
        """Read `config.json`."""
        common = cls.common(config, context_length=context_length)
        return cls(**common, windows=read_qwen_windows(config, common["shape"].layers, common["shape"].context_length))


def read_qwen_windows(config: Mapping[str, Any], layers: int, context_length: int) -> tuple[int | None, ...]:
    """Read each layer's window: only with `use_sliding_window`, and then of the layers from `max_window_layers` on."""
    first = config.get("max_window_layers", 28)
    default_kinds = ["sliding_attention" if index >= first else "full_attention" for index in range(layers)]
    kinds = config.get("layer_types") or default_kinds
    window = config.get("sliding_window", 4096) if read_flag(config, "use_sliding_window") else None
    return read_windows(kinds, layers, window, context_length)
