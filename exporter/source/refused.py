"""Architectures that people have and that are not exported, with the reason in a line."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

__all__ = ["REFUSED", "refusal"]

_DELTA = "its linear attention (Gated DeltaNet) has a recurrent state, for which there is no operator"
_CONVOLUTION = "its short convolutions have a state, and a bundle keeps keys and values alone"
_MAMBA = "it has Mamba layers, whose recurrent state has no operator"
_EXPERTS = "it is a mixture of experts, and only dense MLPs can be exported"
_GEMMA_3N = "its per-layer embeddings and shared key-value caches cannot be exported"
_GEMMA_4 = "its heads differ in size from layer to layer, and a bundle has one size for all"
_ENCODER = "it is an encoder, which generates no text"
_BOTH = "it is an encoder with a decoder, and only decoders can be exported"
_OLD = "it has learned position embeddings, and only rotary ones can be exported"
_ALIBI = "it has ALiBi position biases, and only rotary embeddings can be exported"
_RECURRENT = "it is recurrent, and only attention with a cache of keys and values can be exported"
_LATENT = "its latent attention (MLA) and mixture of experts cannot be exported"
_LATENT_DENSE = "its latent attention (MLA) cannot be exported"
_CHUNKED = "it has attention in chunks and a mixture of experts, which cannot be exported"
_EXAONE_4 = "no family here has both norms behind attention and MLP alone and layers without rotation"

# By `model_type`.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), _DELTA),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _GEMMA_3N),
    **dict.fromkeys(("gemma4", "gemma4_text"), _GEMMA_4),
    **dict.fromkeys(("granitemoehybrid", "jamba", "falcon_h1", "nemotron_h", "bamba", "zamba", "zamba2"), _MAMBA),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _CONVOLUTION),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), _MAMBA),
    **dict.fromkeys(("rwkv", "rwkv7", "recurrent_gemma", "xlstm"), _RECURRENT),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "phimoe", "granitemoe"), _EXPERTS),
    **dict.fromkeys(("granitemoeshared", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "dbrx"), _EXPERTS),
    **dict.fromkeys(("minimax", "minimax_m2", "smallthinker", "flex_olmo", "deepseek"), _EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"), _LATENT),
    "minicpm3": _LATENT_DENSE,
    **dict.fromkeys(("llama4", "llama4_text"), _CHUNKED),
    "exaone4": _EXAONE_4,
    **dict.fromkeys(("bert", "roberta", "distilbert", "modernbert", "xlm-roberta", "deberta-v2", "electra"), _ENCODER),
    **dict.fromkeys(("t5", "t5gemma", "t5gemma2", "mt5", "umt5", "bart", "mbart", "marian", "whisper"), _BOTH),
    **dict.fromkeys(("gpt2", "gpt_neo", "opt", "gpt_bigcode", "xglm", "biogpt"), _OLD),
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
}
_OTHER_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "RewardModel")


def refusal(config: Mapping[str, Any], supported: Container[object]) -> str | None:
    """Return why a model with this `config.json` cannot be exported, if that is known; None otherwise.

    Args:
        config: the configuration.
        supported: the values of `model_type` that can be exported.
    """
    kind = config.get("model_type")
    names = config.get("architectures")
    name = next(iter(names), kind) if isinstance(names, list) else kind
    if kind in supported:
        if str(name).endswith(_OTHER_TASKS):
            return f"the model {name} has no output layer for text: give a model for causal language modelling"
        return None
    if isinstance(kind, str) and kind in REFUSED:
        return f"the architecture {kind!r} cannot be exported: {REFUSED[kind]}"
    if any(key in config for key in ("vision_config", "audio_config", "vision_tower", "vit_config")):
        return f"the architecture {kind!r} cannot be exported: it reads images or sound as well as text"
    if "auto_map" in config:
        return f"the architecture {kind!r} cannot be exported: it needs code of its repository, which is never run"
    return None
