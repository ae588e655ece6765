"""Mistral: Mistral 7B, Nemo, Small (text), and models of its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.exporter.arch.gated import GatedFamily, GatedLayer
from pmpd.exporter.arch.reading import read_windows

__all__ = ["Ministral", "Mistral", "MistralLayer"]


class MistralLayer(GatedLayer):
    """Perhaps a sliding window."""

    def attention_options(self, family: Mistral, index: int) -> dict[str, Any]:
        """Return the window."""
        return {"window": family.windows[index]}


@dataclass(frozen=True, kw_only=True)
class Mistral(GatedFamily):
    """The Mistral family (Jiang et al., 2023): heads of a size of their own, one window for all layers or none."""

    model_type = "mistral"
    layer = MistralLayer
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Mistral:
        """Read `config.json`."""
        common = cls.common(config, context_length=context_length)
        shape = common["shape"]
        kinds = ["sliding_attention"] * shape.layers  # without regard to `layer_types`, as in transformers
        window = config.get("sliding_window", 4096)
        return cls(**common, windows=read_windows(kinds, shape.layers, window, shape.context_length))


@dataclass(frozen=True, kw_only=True)
class Ministral(Mistral):
    """Ministral 8B of 2024: a window in some layers."""

    model_type = "ministral"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Ministral:
        """Read `config.json`."""
        common = cls.common(config, context_length=context_length)
        shape = common["shape"]
        kinds = config.get("layer_types") or ["sliding_attention"] * shape.layers
        window = config.get("sliding_window", 4096)
        return cls(**common, windows=read_windows(kinds, shape.layers, window, shape.context_length))
