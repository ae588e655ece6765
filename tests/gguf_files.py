"""GGUF files of tiny checkpoints, written as llama.cpp's conversion writes them, by the package `gguf`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

# By `model_type`: architecture in GGUF, whether rows of heads are put in pairs, and what is added to norms.
CONVERSIONS: dict[str, tuple[str, bool, float]] = {
    "llama": ("llama", True, 0.0),
    "qwen2": ("qwen2", False, 0.0),
    "qwen3": ("qwen3", False, 0.0),
    "smollm3": ("smollm3", True, 0.0),
    "granite": ("granite", True, 0.0),
    "hunyuan_v1_dense": ("hunyuan-dense", False, 0.0),
    "gemma": ("gemma", False, 1.0),
    "gemma2": ("gemma2", False, 1.0),
    "gemma3_text": ("gemma3", False, 1.0),
    "phi": ("phi2", False, 0.0),
    "phi3": ("phi3", False, 0.0),
    "stablelm": ("stablelm", False, 0.0),
    "olmo2": ("olmo2", False, 0.0),
    "olmo3": ("olmo2", False, 0.0),
    "ministral3": ("mistral3", True, 0.0),
}
# Numbers of `config.json` by the end of their key in the metadata.
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "use_parallel_residual": "use_parallel_residual",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray[Any, Any] | tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]],
    *,
    architecture: str = "llama",
    **options: Any,
) -> Path:
    """Write a file of metadata (plain Python values) and tensors (arrays, or bytes ``[rows, bytes]`` with a type)."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, tensor in tensors.items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(
    folder: Path,
    path: Path,
    *,
    kind: str = "F32",
    tokenizer: Mapping[str, Any] | None = None,
    stacked: bool = False,
    **options: Any,
) -> Path:
    """Write the checkpoint in `folder` as a GGUF file whose matrices have the type `kind`.

    With `stacked`, queries, keys and values are one tensor.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config.to_dict()
    architecture, pairs, offset = CONVERSIONS[config["model_type"]]
    metadata = {f"{architecture}.{key}": config[field] for key, field in KEYS.items() if config.get(field) is not None}
    if config["model_type"] == "olmo3":
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        metadata["olmo2.attention.sliding_window_pattern"] = slides
    rope, extra = rope_of(model, config, architecture)
    names = gguf.get_tensor_name_map(arch_of(architecture), config["num_hidden_layers"])
    tensors: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if offset and name.endswith("norm.weight"):
            weight = weight + offset
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if pairs and f".{part}." in name:
                weight = in_pairs(weight, config[heads])
        stem, _, suffix = name.rpartition(".")
        array = weight.numpy()
        quantized = gguf.GGMLQuantizationType[kind]
        if array.ndim > 1 and kind != "F32":
            tensors[f"{names.get_name(stem)}.{suffix}"] = (gguf.quants.quantize(array, quantized), quantized)
        else:
            tensors[f"{names.get_name(stem)}.{suffix}"] = array
    if stacked:
        tensors = stack_attention(tensors)
    return write_gguf(
        path, metadata | rope | dict(tokenizer or {}), tensors | extra, architecture=architecture, **options
    )


def stack_attention(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Put queries, keys and values of each block into one tensor, as the first conversions of phi-2 did."""
    stacks: dict[str, Any] = {}
    for name, tensor in tensors.items():
        stack, found = re.subn(r"attn_[qkv]\.", "attn_qkv.", name)
        if not found or stack not in stacks:
            stacks[stack] = tensor
        elif isinstance(tensor, tuple):
            stacks[stack] = (np.concatenate([stacks[stack][0], tensor[0]]), tensor[1])
        else:
            stacks[stack] = np.concatenate([stacks[stack], tensor])
    return stacks


def arch_of(architecture: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Put rows ``[heads * head_dim, …]`` that lie in halves into pairs."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def rope_of(model: Any, config: Mapping[str, Any], architecture: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return metadata and tensors of the rotary embedding."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = {**scaling, **scaling.get("full_attention", {})}
    theta = float(config.get("rope_theta") or scaling["rope_theta"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    share = config.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1
    metadata: dict[str, Any] = {"rope.dimension_count": int(head * share), "rope.freq_base": theta}
    tensors: dict[str, Any] = {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    elif kind == "yarn":
        metadata |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling["factor"])}
        metadata["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        for name in ("beta_fast", "beta_slow"):
            if scaling.get(name):
                metadata[f"rope.scaling.yarn_{name}"] = float(scaling[name])
        if beta := scaling.get("llama_4_scaling_beta"):
            metadata["attention.temperature_scale"] = float(beta)
            metadata["rope.scaling.yarn_log_multiplier"] = float(scaling["mscale_all_dim"])
    elif kind == "llama3":
        plain = theta ** -(np.arange(0, head, 2) / head)
        tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    elif kind == "longrope":
        metadata["rope.scaling.original_context_length"] = config["original_max_position_embeddings"]
        for length in ("long", "short"):
            tensors[f"rope_factors_{length}.weight"] = np.array(scaling[f"{length}_factor"], np.float32)
    elif alpha := scaling.get("alpha"):
        metadata["rope.freq_base"] = theta * alpha ** (head / (head - 2))
    if architecture == "gemma3":
        sliding = scaling.get("sliding_attention", {})
        metadata["rope.freq_base_swa"] = float(config.get("rope_local_base_freq") or sliding["rope_theta"])
    return {f"{architecture}.{key}": value for key, value in metadata.items()}, tensors


def tokenizer_metadata(tokens: Sequence[str], types: Sequence[int], *, model: str, **fields: Any) -> dict[str, Any]:
    """Return the metadata of a tokenizer."""
    given = {"model": model, "tokens": list(tokens), "token_type": list(types), **fields}
    return {f"tokenizer.ggml.{key}": value for key, value in given.items()}
