"""Phi-3: Phi-3 and 3.5 (mini, medium), Phi-4 and Phi-4-mini."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pmpd.exporter.arch.gated import GatedFamily, GatedLayer
from pmpd.exporter.arch.reading import read_number, read_table, read_windows
from pmpd.exporter.nn import HeadLayout, LinearFactory, LongRopeScaling, fused
from pmpd.runtime.errors import PmpdError

__all__ = ["Phi3", "Phi3Layer"]

# The first releases called it by other names.
_LONGROPE = ("longrope", "su", "yarn")
_FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


class Phi3Layer(GatedLayer):
    """The checkpoint has queries, keys and values in one layer, and gate and up in another; perhaps a window."""

    def __init__(self, family: Phi3, linear: LinearFactory, index: int) -> None:
        super().__init__(family, fused(linear, _FUSED), index)

    def attention_options(self, family: Phi3, index: int) -> dict[str, Any]:
        """Return the window."""
        return {"window": family.windows[index]}


@dataclass(frozen=True, kw_only=True)
class Phi3(GatedFamily):
    """The Phi-3 family (Abdin et al., 2024): Llama with fused projections, partial rotation, LongRoPE.

    A model with LongRoPE has two lists of rotary factors. Transformers takes the short ones for a text within the
    original context and the long ones for a text that has grown beyond it, whose older keys then keep the rotation of
    the short ones. Here the context of the export decides once: up to the original context, which is the default,
    the factors are the short ones.
    """

    model_type = "phi3"
    layer = Phi3Layer
    windows: tuple[int | None, ...]
    rotary_note: str | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, context_length: int | None) -> Phi3:
        """Read `config.json`."""
        scaling = read_table(config, "rope_parameters") or read_table(config, "rope_scaling")
        longrope = (scaling.get("rope_type") or scaling.get("type")) in _LONGROPE
        if longrope:
            longest = int(read_number(config, "max_position_embeddings", 4096))
            original = int(read_number({**scaling, **config}, "original_max_position_embeddings", 4096))
            context_length = context_length or min(original, longest)
            config = {**config, "rope_parameters": {**scaling, "rope_type": "default"}}
        common = cls.common(config, context_length=context_length, default_epsilon=1e-5)
        shape, note = common["shape"], None
        if longrope:
            kind = "short" if shape.context_length <= original else "long"
            factors = _read_factors(scaling, f"{kind}_factor", shape.head.rotary.dim // 2)
            growth = read_number(scaling, "factor", longest / original)
            default = math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0
            magnitude = read_number(scaling, "attention_factor", default)
            rotary = replace(shape.head.rotary, scaling=LongRopeScaling(factors, magnitude))
            common["shape"] = replace(shape, head=HeadLayout(shape.head.size, rotary))
            note = _note(kind, original, longest)
        windows = read_windows(
            ["sliding_attention"] * shape.layers, shape.layers, config.get("sliding_window"), shape.context_length
        )
        return cls(**common, windows=windows, rotary_note=note)

    def describe(self) -> list[str]:
        """Say which rotary factors the graphs have."""
        return [] if self.rotary_note is None else [f"rotary    {self.rotary_note}"]

    def reference_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a configuration that has no other rotary factors than the graphs."""
        rotary = self.shape.head.rotary
        if rotary is None or not isinstance(rotary.scaling, LongRopeScaling):
            return config
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        factors = list(rotary.scaling.factors)
        return {**config, key: {**config[key], "short_factor": factors, "long_factor": factors}}


def _read_factors(scaling: Mapping[str, Any], name: str, pairs: int) -> tuple[float, ...]:
    """Read a factor for each pair."""
    factors = scaling.get(name)
    if not isinstance(factors, Sequence) or len(factors) != pairs:
        raise PmpdError(f"config.json: {name} must be {pairs} numbers above 0, got {factors!r:.60}: correct it")
    return tuple(read_number({name: factor}, name) for factor in factors)


def _note(kind: str, original: int, longest: int) -> str:
    if kind == "long":
        return f"LongRoPE's long factors for all texts: as transformers for texts of more than {original} tokens"
    return f"LongRoPE's short factors, for the original context; --context-length up to {longest} takes the long ones"
