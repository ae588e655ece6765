"""Architectures of GGUF files: their configuration and tensors in the terms of Hugging Face.

One line per architecture says how it differs from Llama. Names of metadata and tensors are those of the package `gguf`;
what the conversion to GGUF does to weights is undone: rows of rotated heads are put back in halves, and 1 is taken from
the weights of Gemma's norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pmpd.exporter.source.gguf.rope import read_scaling
from pmpd.exporter.source.refused import REFUSED
from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["ARCHITECTURES", "Architecture", "read_architecture"]

Get = Callable[..., Any]

# Of the last part of a block's tensor name in `config.json`'s world: its name in GGUF.
_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Architecture:
    """What a GGUF architecture is called and made of.

    Attributes:
        model_type: its name in `config.json`.
        block: names of a block's tensors that differ from Llama's.
        last_norm: name of the last norm.
        halves: whether rows of the query and key projections lie in pairs in GGUF, and in halves here.
        norm_offset: what the conversion has added to weights of norms.
        fields: gives the fields of `config.json` that Llama has not.
    """

    model_type: str
    block: Mapping[str, str] = field(default_factory=dict)
    last_norm: str = "norm"
    halves: bool = False
    norm_offset: float = 0.0
    fields: Callable[[Get], dict[str, Any]] = lambda _: {}

    def stored_name(self, name: str) -> str | None:
        """Return the name in the file of a tensor by its name in transformers; None if there is no such tensor."""
        stem, _, suffix = name.rpartition(".")
        tops = {
            "model.embed_tokens": "token_embd",
            f"model.{self.last_norm}": "output_norm",
            "lm_head": "output",
        }
        if stem in tops:
            return f"{tops[stem]}.{suffix}"
        number, _, part = stem.removeprefix("model.layers.").partition(".")
        place = self.places.get(part)
        return None if place is None or not number.isdigit() else f"blk.{number}.{place}.{suffix}"

    @property
    def places(self) -> dict[str, str]:
        """Names of a block's tensors in the file, by what they are called within a layer of transformers."""
        return _BLOCK | dict(self.block)


_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(get: Get) -> dict[str, Any]:
    heads, layers = get("attention.head_count"), get("block_count")
    # The 27 B models alone scale by the width of a head in the stream; no metadata says so.
    large = layers in (46, 62)
    scale = get("embedding_length") // heads if large else get("attention.key_length", 256)
    return {
        **_GELU,
        "query_pre_attn_scalar": scale,
        "sliding_window": get("attention.sliding_window", 4096),
        "attn_logit_softcapping": get("attn_logit_softcapping", None),
        "final_logit_softcapping": get("final_logit_softcapping", None),
    }


def _gemma3(get: Get) -> dict[str, Any]:
    window, period = get("attention.sliding_window", 0), get("attention.sliding_window_pattern", 6)
    layers = range(get("block_count"))
    if not window:
        kinds = ["full_attention" for _ in layers]
    elif isinstance(period, list):
        kinds = ["sliding_attention" if slides else "full_attention" for slides in period]
    else:
        kinds = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in layers]
    return _gemma2(get) | {
        "sliding_window": window or None,
        "rope_local_base_freq": get("rope.freq_base_swa", 10000.0),
        "layer_types": kinds,
    }


def _granite(get: Get) -> dict[str, Any]:
    return {
        "embedding_multiplier": get("embedding_scale", 1.0),
        "attention_multiplier": get("attention.scale", 1.0),
        "residual_multiplier": get("residual_scale", 1.0),
        "logits_scaling": get("logit_scale", 1.0),
    }


def _partial_rotary(get: Get) -> dict[str, Any]:
    size = get("embedding_length") // get("attention.head_count")
    dim = get("rope.dimension_count", size)
    # The half is lost again where the share becomes a whole number: a quotient may be just below it.
    return {"partial_rotary_factor": min(1.0, (dim + 0.5) / size), "head_dim": None}


def _phi3(get: Get) -> dict[str, Any]:
    window = get("attention.sliding_window", 0)
    return {
        **_partial_rotary(get),
        "sliding_window": window or None,
        "original_max_position_embeddings": get("rope.scaling.original_context_length", get("context_length")),
    }


def _stablelm(get: Get) -> dict[str, Any]:
    return {**_partial_rotary(get), "use_parallel_residual": get("use_parallel_residual", False)}


def _olmo2(get: Get) -> dict[str, Any]:
    slides = get("attention.sliding_window_pattern", None)
    if slides is None:
        return {}
    kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return {"model_type": "olmo3", "layer_types": kinds, "sliding_window": get("attention.sliding_window")}


def _ministral3(get: Get) -> dict[str, Any]:
    beta = get("attention.temperature_scale", None)
    if beta is None:  # Mistral Small 3, which is as Llama
        return {"model_type": "llama"}
    scaling = read_scaling(get, get("context_length"))
    # Here the logarithm's weight is written as it is.
    magnitudes = {"mscale": 1.0, "mscale_all_dim": float(get("rope.scaling.yarn_log_multiplier", 1.0))}
    theta = {"rope_theta": float(get("rope.freq_base", 10000.0))}
    rope = {**(scaling or {}), **theta, **magnitudes, "llama_4_scaling_beta": float(beta)}
    return {"rope_scaling": None, "rope_parameters": rope}


_OLMO2 = {
    **_QK_NORM,
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_PHI2 = {
    "post_attention_layernorm": "ffn_norm",
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}

# By `general.architecture`.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", halves=True),
    "qwen2": Architecture("qwen2", fields=lambda _: {"use_sliding_window": False}),
    "qwen3": Architecture("qwen3", block=_QK_NORM, fields=lambda _: {"use_sliding_window": False}),
    "smollm3": Architecture("smollm3", halves=True, fields=lambda _: {"no_rope_layer_interval": 4}),
    "granite": Architecture("granite", halves=True, fields=_granite),
    "hunyuan-dense": Architecture(
        "hunyuan_v1_dense", block={"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"}
    ),
    "gemma": Architecture("gemma", norm_offset=1.0, fields=lambda _: dict(_GELU)),
    "gemma2": Architecture("gemma2", block=_SANDWICH, norm_offset=1.0, fields=_gemma2),
    "gemma3": Architecture("gemma3_text", block=_SANDWICH | _QK_NORM, norm_offset=1.0, fields=_gemma3),
    "mistral3": Architecture("ministral3", halves=True, fields=_ministral3),
    "olmo2": Architecture("olmo2", block=_OLMO2, fields=_olmo2),
    "phi2": Architecture("phi", block=_PHI2, last_norm="final_layernorm", fields=_partial_rotary),
    "phi3": Architecture("phi3", block={"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}, fields=_phi3),
    "stablelm": Architecture("stablelm", fields=_stablelm),
}

# What `config.json` calls architectures that are known and cannot be exported, where that is another name.
_REFUSED = {
    "falcon-h1": "falcon_h1",
    "gpt-oss": "gpt_oss",
    "granitehybrid": "granitemoehybrid",
    "hunyuan-moe": "hunyuan_v1_moe",
    "lfm2moe": "lfm2_moe",
    "modern-bert": "modernbert",
    "qwen2moe": "qwen2_moe",
    "qwen35": "qwen3_5",
    "qwen35moe": "qwen3_5_moe",
    "qwen3moe": "qwen3_moe",
    "qwen3next": "qwen3_next",
    "deepseek2": "deepseek_v2",
}


def read_architecture(
    metadata: Mapping[str, Any], vocab_size: int, *, tied: bool
) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture of a file and its `config.json`, without scalings that are kept in tensors.

    Args:
        metadata: the file's.
        vocab_size: rows of the embedding.
        tied: whether the output layer is the embedding.

    Raises:
        PmpdError: an unknown architecture, or one of its numbers is missing or makes no sense.
    """
    name = metadata.get("general.architecture")
    if reason := REFUSED.get(_REFUSED.get(str(name), str(name))):
        raise PmpdError(f"general.architecture: the architecture {name!r} cannot be exported: {reason}")
    if name not in ARCHITECTURES:
        raise PmpdError(f"general.architecture: {unknown_choice('architecture', name, ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]

    def get(key: str, *default: Any) -> Any:
        value = metadata.get(f"{name}.{key}")
        if value is None:
            if default:
                return default[0]
            raise PmpdError(f"the metadata lacks {name}.{key}: convert the model again")
        return _uniform(value, f"{name}.{key}") if key in _MAY_DIFFER_BY_LAYER else value

    try:
        return architecture, _config(architecture, get, metadata, vocab_size, tied=tied)
    except (TypeError, ZeroDivisionError, ArithmeticError, AttributeError) as error:
        raise PmpdError(f"a number of the metadata makes no sense ({error}): convert the model again") from None


_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
# Numbers that some architectures have as a list over layers.
_MAY_DIFFER_BY_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")


def _uniform(value: Any, key: str) -> Any:
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise PmpdError(f"{key} differs from layer to layer, which cannot be exported: give another model")
        return value[0]
    return value


def _config(
    architecture: Architecture, get: Get, metadata: Mapping[str, Any], vocab_size: int, *, tied: bool
) -> dict[str, Any]:
    heads, hidden_size, context = get("attention.head_count"), get("embedding_length"), get("context_length")
    if get("expert_count", 0):
        raise PmpdError(f"it has {get('expert_count')} experts, and only dense models can be exported: give another")
    if get("attention.key_length", 0) != get("attention.value_length", get("attention.key_length", 0)):
        raise PmpdError("keys and values have heads of different sizes, which cannot be exported: give another model")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden_size // heads),
        "max_position_embeddings": context,
        "rope_theta": float(get("rope.freq_base", 10000.0)),
        "rope_scaling": read_scaling(get, context),
        "tie_word_embeddings": tied,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", None),
        "layer_norm_eps": get("attention.layer_norm_epsilon", None),
        **architecture.fields(get),
    }
    config = {key: value for key, value in config.items() if value is not None}
    # None is said, because transformers has defaults that other vocabularies have no such tokens for.
    tokens = {f"{kind}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for kind, key in _TOKENS.items()}
    return config | tokens
