"""Architecture families: one file each. A new one is a `Family` subclass and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmpd.exporter.arch.decoder import Decoder, DecoderShape, Family
from pmpd.exporter.arch.gemma import Gemma
from pmpd.exporter.arch.gemma2 import Gemma2
from pmpd.exporter.arch.gemma3 import Gemma3
from pmpd.exporter.arch.granite import Granite
from pmpd.exporter.arch.hunyuan import Hunyuan
from pmpd.exporter.arch.llama import Llama
from pmpd.exporter.arch.ministral3 import Ministral3
from pmpd.exporter.arch.mistral import Ministral, Mistral
from pmpd.exporter.arch.olmo import Olmo2, Olmo3
from pmpd.exporter.arch.phi import Phi
from pmpd.exporter.arch.phi3 import Phi3
from pmpd.exporter.arch.qwen2 import Qwen2
from pmpd.exporter.arch.qwen3 import Qwen3
from pmpd.exporter.arch.smollm3 import SmolLM3
from pmpd.exporter.arch.stablelm import StableLM
from pmpd.exporter.source.refused import refusal
from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["FAMILIES", "Decoder", "DecoderShape", "Family", "read_family"]

FAMILIES: dict[str, type[Family]] = {
    family.model_type: family
    for family in (
        *(Llama, Qwen2, Qwen3, SmolLM3, Mistral, Ministral, Ministral3, Granite, Hunyuan),
        *(Gemma, Gemma2, Gemma3, Olmo2, Olmo3, Phi, Phi3, StableLM),
    )
}


def read_family(config: Mapping[str, Any], *, context_length: int | None = None) -> Family:
    """Return the family of a checkpoint's `config.json`.

    `context_length` shortens the longest text the exported model takes; default what the checkpoint allows.

    Raises:
        PmpdError: an architecture, a kind of rope scaling, an activation or a quantization that cannot be exported.
    """
    model_type = config.get("model_type")
    if reason := refusal(config, FAMILIES):
        raise PmpdError(f"config.json: {reason}")
    if model_type not in FAMILIES:
        raise PmpdError(f"config.json: {unknown_choice('architecture', model_type, FAMILIES)}")
    if "quantization_config" in config:
        raise PmpdError("config.json has quantization_config: give the floating-point checkpoint, not a quantized one")
    return FAMILIES[model_type].from_config(config, context_length=context_length)
