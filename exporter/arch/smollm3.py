"""SmolLM3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.exporter.arch.gated import GatedFamily, GatedLayer
from pmpd.exporter.arch.reading import read_flag, read_windows
from pmpd.exporter.nn import HeadLayout
from pmpd.runtime.errors import PmpdError

__all__ = ["SmolLM3", "SmolLM3Layer"]


class SmolLM3Layer(GatedLayer):
    """Every so many layers one does not rotate its heads."""

    def attention_options(self, family: SmolLM3, index: int) -> dict[str, Any]:
        """Return layout, biases and window."""
        head = family.shape.head
        return {
            "layout": head if family.rotated[index] else HeadLayout(head.size, None),
            "qkv_bias": family.attention_bias,
            "output_bias": family.attention_bias,
            "window": family.windows[index],
        }

    def mlp_options(self, family: SmolLM3) -> dict[str, Any]:
        """Return where the MLP has biases."""
        return {"bias": family.mlp_bias}


@dataclass(frozen=True, kw_only=True)
class SmolLM3(GatedFamily):
    """The SmolLM3 family (Bakouch et al., 2025): Llama with layers that have no position embedding."""

    model_type = "smollm3"
    layer = SmolLM3Layer
    rotated: tuple[bool, ...]
    attention_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> SmolLM3:
        """Read `config.json`."""
        common = cls.common({"rope_theta": 2e6, **config}, context_length=context_length, default_tied=True)
        shape = common["shape"]
        rotated = _read_rotated(config, shape.layers)
        # Windows, which no published model has, are those of the layers without rotation.
        default_kinds = ["full_attention" if rotates else "sliding_attention" for rotates in rotated]
        kinds = config.get("layer_types") or default_kinds
        window = config.get("sliding_window") if read_flag(config, "use_sliding_window") else None
        return cls(
            **common,
            rotated=rotated,
            attention_bias=read_flag(config, "attention_bias"),
            mlp_bias=read_flag(config, "mlp_bias"),
            windows=read_windows(kinds, shape.layers, window, shape.context_length),
        )


def _read_rotated(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Read which layers rotate: 1 in `no_rope_layers` means that a layer does."""
    interval = config.get("no_rope_layer_interval") or 4
    rotated = config.get("no_rope_layers")
    if rotated is None:
        rotated = [int((index + 1) % interval != 0) for index in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers or not set(rotated) <= {0, 1}:
        raise PmpdError(f"config.json: no_rope_layers must be {layers} times 0 or 1, got {rotated!r:.60}: correct it")
    return tuple(bool(flag) for flag in rotated[:layers])
