"""How families read a checkpoint's `config.json`: what several of them have, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pmpd.exporter.arch.decoder import DecoderShape
from pmpd.exporter.nn import ACTIVATIONS, HeadLayout, LinearScaling, Llama3Scaling, Rotary, YarnScaling
from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = [
    "read_activation",
    "read_flag",
    "read_layouts",
    "read_number",
    "read_rotary",
    "read_shape",
    "read_softcap",
    "read_table",
    "read_windows",
]

_LAYER_KINDS = ("full_attention", "sliding_attention")
_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def read_shape(
    config: Mapping[str, Any],
    *,
    context_length: int | None,
    default_rotary_share: float = 1.0,
    default_head_dim: int | None = None,
    default_tied: bool = False,
) -> DecoderShape:
    """Read the numbers every family has; defaults are those of a family."""
    rope = read_table(config, "rope_parameters")  # transformers 5 keeps the share there
    share = read_number({**config, **rope}, "partial_rotary_factor", default_rotary_share)

    def size(name: str, default: int | None = None) -> int:
        number = config[name] if default is None else config.get(name) or default
        if type(number) is not int or number < 1:
            raise PmpdError(f"config.json: {name} must be a whole number of 1 or more, got {number!r}: correct it")
        return number

    try:
        heads, hidden_size = size("num_attention_heads"), size("hidden_size")
        kv_heads = size("num_key_value_heads", heads)
        head_dim = size("head_dim", default_head_dim or hidden_size // heads or 1)
        if heads % kv_heads:
            raise PmpdError(f"config.json: {heads} attention heads cannot share {kv_heads} key and value heads")
        if share > 1:
            raise PmpdError(f"config.json: partial_rotary_factor must be above 0 and at most 1, got {share}")
        longest = size("max_position_embeddings")
        if context_length is not None and not 1 <= context_length <= longest:
            raise PmpdError(f"context length {context_length}: the model allows 1 to {longest}")
        return DecoderShape(
            layers=size("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=size("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head=HeadLayout(head_dim, read_rotary(config, int(head_dim * share))),
            vocab_size=size("vocab_size"),
            context_length=context_length or longest,
            tied_embeddings=read_flag(config, "tie_word_embeddings", default=default_tied),
        )
    except KeyError as error:
        raise PmpdError(f"config.json lacks {error}: is it a complete Hugging Face checkpoint?") from None


def read_rotary(config: Mapping[str, Any], dim: int, *, layer_type: str | None = None) -> Rotary:
    """Read the rotary embedding, as transformers 4 (`rope_scaling`) and 5 (`rope_parameters`) write it.

    `layer_type` chooses among the settings of a model whose kinds of layers have different ones. Raises as
    `read_number`.
    """
    scaling = read_table(config, "rope_parameters") or read_table(config, "rope_scaling")
    if layer_type is not None and layer_type in scaling:
        scaling = read_table(scaling, layer_type)
    theta = read_number({**config, **scaling}, "rope_theta", 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    match kind:
        # The base of "dynamic" changes beyond the longest text that the checkpoint allows; exports end there.
        case "default" | "dynamic":
            return Rotary(dim, theta)
        case "linear":
            return Rotary(dim, theta, LinearScaling(read_number(scaling, "factor")))
        case "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            factor, low, high, original = (read_number(scaling, name) for name in names)
            return Rotary(dim, theta, Llama3Scaling(factor, low, high, int(original)))
        case "yarn":
            return Rotary(dim, theta, _read_yarn(config, scaling))
    raise PmpdError(f"config.json: {unknown_choice('rope scaling', kind, _ROPE_KINDS)}")


def _read_yarn(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> YarnScaling:
    longest = read_number(config, "max_position_embeddings")
    original = read_number({**scaling, **config}, "original_max_position_embeddings", longest)
    factor = read_number(scaling, "factor", longest / original)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    default = magnitude(1.0)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        default = magnitude(read_number(scaling, "mscale")) / magnitude(read_number(scaling, "mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        original_context=int(original),
        attention_factor=read_number(scaling, "attention_factor", default),
        beta_fast=read_number(scaling, "beta_fast", 32.0),
        beta_slow=read_number(scaling, "beta_slow", 1.0),
        truncate=read_flag(scaling, "truncate", default=True),
    )


def read_softcap(config: Mapping[str, Any], name: str, default: float | None = None) -> float | None:
    """Read what values are softly limited to; what is absent has the default, null means no limit."""
    softcap = config.get(name, default)
    return None if softcap is None else read_number({name: softcap}, name)


def read_layouts(config: Mapping[str, Any], kinds: Sequence[str], dim: int) -> tuple[HeadLayout, ...]:
    """Read the layout of each layer's heads of `dim` elements, where kinds of layers rotate differently."""
    layouts = {kind: HeadLayout(dim, read_rotary(config, dim, layer_type=kind)) for kind in _LAYER_KINDS}
    return tuple(layouts[kind] for kind in kinds)


def read_windows(kinds: object, layers: int, window: object, context_length: int) -> tuple[int | None, ...]:
    """Return how many positions each layer sees, its own included; None for all.

    Args:
        kinds: a name for each layer, as in `layer_types`.
        layers: how many there are.
        window: what layers of the kind `sliding_attention` see; None for all.
        context_length: where texts end: no longer window changes anything.

    Raises:
        PmpdError: an unknown kind of layer, or a window that is not a number.
    """
    if not isinstance(kinds, Sequence) or len(kinds) != layers:
        raise PmpdError(f"config.json: layer_types must have a name for {layers} layers, got {kinds!r:.60}: correct it")
    for kind in kinds:
        if kind not in _LAYER_KINDS:
            raise PmpdError(f"config.json: {unknown_choice('kind of layer', kind, _LAYER_KINDS)}")
    if window is None or "sliding_attention" not in kinds:
        return (None,) * layers
    if type(window) is not int or window < 1:
        raise PmpdError(f"config.json: sliding_window must be a whole number of 1 or more, got {window!r}: correct it")
    if window >= context_length:
        return (None,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Read a positive number; what is absent or null has the default, if there is one.

    Raises:
        KeyError: it is absent and has no default.
        PmpdError: it is something else.
    """
    number = config[name] if default is None else config.get(name) or default
    if type(number) not in (int, float) or not 0 < number < math.inf:
        raise PmpdError(f"config.json: {name} must be a number above 0, got {number!r}: correct it")
    return number


def read_flag(config: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """Read true or false; what is absent or null has the default."""
    flag = config.get(name)
    if flag is None:
        return default
    if not isinstance(flag, bool):
        raise PmpdError(f"config.json: {name} must be true or false, got {flag!r}: correct it")
    return flag


def read_table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Read an object, without what is null in it; what is absent or null is empty."""
    table = config.get(name) or {}
    if not isinstance(table, Mapping):
        raise PmpdError(f"config.json: {name} must be an object, got {table!r}: correct it")
    return {key: value for key, value in table.items() if value is not None}


def read_activation(config: Mapping[str, Any], default: str) -> str:
    """Read `hidden_act`."""
    name = str(config.get("hidden_act", default))
    if name not in ACTIVATIONS:
        raise PmpdError(f"config.json: {unknown_choice('hidden_act', name, ACTIVATIONS)}")
    return name
