"""Tiny random checkpoints of every family, made on the fly: small enough to run in milliseconds, odd enough to fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

try:
    from transformers.initialization import no_init_weights  # 5
except ImportError:
    from transformers.modeling_utils import no_init_weights  # 4

from pmpd.exporter.demo import demo_model_path

# No size is a multiple of another, and none of 64.
BASE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 77,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.1,
}
GRANITE_MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
PHI3_IDS = {"pad_token_id": 4, "bos_token_id": 0, "eos_token_id": 1}


def longrope(pairs: int, *, original: int, longest: int) -> dict[str, Any]:
    """Return the options of a Phi-3 with LongRoPE, whose two lists of factors differ by much."""
    factors = {"short_factor": [1 + 0.1 * i for i in range(pairs)], "long_factor": [2 + 1.5 * i for i in range(pairs)]}
    return {
        "original_max_position_embeddings": original,
        "max_position_embeddings": longest,
        "rope_scaling": {"type": "longrope", **factors},
    }


SMOLLM3_IDS = {"pad_token_id": 4, "bos_token_id": 0, "eos_token_id": 1}
GEMMA_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


@dataclass(frozen=True)
class TinyModel:
    """A kind of tiny checkpoint: its `config.json` where that differs from `BASE`, and how its weights are stored."""

    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shard_size: str = "1GB"

    def config(self, **changes: Any) -> dict[str, Any]:
        """Return the contents of `config.json`, as the installed transformers writes it."""
        document: dict[str, Any] = self._config(**changes).to_dict()
        return document

    def save(self, folder: Path) -> Path:
        """Write a checkpoint with random weights, always the same, and return its folder."""
        with no_init_weights():  # transformers 4 trips over StableLM's norms without bias
            model = AutoModelForCausalLM.from_config(self._config())
        model.tie_weights()
        random = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            # Transformers' own small weights would give logits too alike to tell a wrong network by.
            noise = torch.randn(parameter.shape, generator=random)
            if "norm" in name:
                one = name.endswith("weight") and not self.family.startswith("gemma")  # Gemma adds the one itself
                parameter.data = one + 0.2 * noise
            else:
                parameter.data = noise * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
        model.to(self.dtype).save_pretrained(folder, max_shard_size=self.shard_size)
        return folder

    def _config(self, **changes: Any) -> Any:
        if self.family not in CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {self.family}")
        # A copy, because transformers 5 writes into what it is given.
        return AutoConfig.for_model(self.family, **deepcopy(BASE | dict(self.options)) | changes)


TINY_MODELS = {
    "llama": TinyModel("llama"),
    "llama-biases": TinyModel(
        "llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "hidden_act": "gelu"}
    ),
    "llama-tied-bfloat16": TinyModel("llama", {"tie_word_embeddings": True}, torch.bfloat16),
    "llama-odd": TinyModel("llama", {"hidden_size": 45, "head_dim": 20, "vocab_size": 97, "hidden_act": "relu"}),
    "llama-llama3-float16": TinyModel(
        "llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "rope_scaling": LLAMA3_SCALING},
        torch.float16,
    ),
    "llama-linear-sharded": TinyModel(
        "llama", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 5000.0}, shard_size="40KB"
    ),
    "phi": TinyModel("phi", {"partial_rotary_factor": 0.5}, torch.float16),
    "phi-qk-norm": TinyModel(
        "phi",
        {"hidden_size": 96, "num_key_value_heads": 1, "partial_rotary_factor": 0.4, "qk_layernorm": True},
    ),
    "phi-qk-norm-odd": TinyModel(
        "phi",
        {"hidden_size": 60, "num_key_value_heads": 1, "partial_rotary_factor": 0.4, "qk_layernorm": True},
    ),
    "stablelm-qk-norm-odd": TinyModel(
        "stablelm", {"hidden_size": 60, "partial_rotary_factor": 0.4, "qk_layernorm": True}
    ),
    "stablelm": TinyModel("stablelm", {"hidden_size": 240, "partial_rotary_factor": 0.25}, torch.bfloat16),
    "stablelm-biases": TinyModel(
        "stablelm", {"hidden_size": 240, "partial_rotary_factor": 0.25, "use_qkv_bias": True, "num_key_value_heads": 1}
    ),
    "stablelm-parallel": TinyModel(
        "stablelm",
        {"hidden_size": 240, "partial_rotary_factor": 0.25, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    "llama-one-kv-head-tied": TinyModel(
        "llama", {"num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True, "attention_bias": True}
    ),
    "llama-yarn": TinyModel("llama", {"rope_scaling": YARN_SCALING}),
    "qwen2": TinyModel("qwen2", {"num_key_value_heads": 1}, torch.bfloat16),
    "qwen2-tied-yarn": TinyModel("qwen2", {"tie_word_embeddings": True, "rope_scaling": YARN_SCALING}),
    "qwen3": TinyModel(
        "qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 1e6}, torch.bfloat16
    ),
    "qwen3-odd": TinyModel("qwen3", {"head_dim": 20, "attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": TinyModel("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True, **SMOLLM3_IDS}),
    "smollm3-biases": TinyModel(
        "smollm3",
        {
            "no_rope_layers": [0, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            **SMOLLM3_IDS,
        },
    ),
    "mistral": TinyModel("mistral", {"head_dim": 32, "num_key_value_heads": 1, "sliding_window": None}),
    "mistral-long-window": TinyModel("mistral", {"sliding_window": 64}, torch.bfloat16),
    "mistral-window": TinyModel("mistral", {"sliding_window": 7, "num_key_value_heads": 1}),
    "qwen3-window": TinyModel(
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "head_dim": 16,
        },
    ),
    "ministral": TinyModel("ministral", {"head_dim": 24, "layer_types": ["full_attention"] * 2}),
    "ministral3": TinyModel(
        "ministral3",
        {"head_dim": 32, "num_key_value_heads": 1, "rope_parameters": {**MINISTRAL3_ROPE, "llama_4_scaling_beta": 2.0}},
    ),
    "ministral3-short": TinyModel(
        "ministral3",
        {"head_dim": 20, "rope_parameters": {**MINISTRAL3_ROPE, "original_max_position_embeddings": 64}},
    ),
    "granite": TinyModel("granite", {"tie_word_embeddings": True, **GRANITE_MULTIPLIERS}, torch.bfloat16),
    "granite-biases": TinyModel("granite", {"attention_bias": True, "mlp_bias": True, **GRANITE_MULTIPLIERS}),
    "hunyuan": TinyModel(
        "hunyuan_v1_dense",
        {
            "head_dim": 32,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
        },
        torch.bfloat16,
    ),
    "phi3": TinyModel("phi3", {"num_key_value_heads": 1, "hidden_size": 60, **PHI3_IDS}, torch.bfloat16),
    "phi3-window": TinyModel("phi3", {"sliding_window": 7, **PHI3_IDS}),
    "phi3-longrope": TinyModel(
        "phi3",
        {
            **{"hidden_size": 96, "num_key_value_heads": 1, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
            **longrope(12, original=48, longest=256),
            **PHI3_IDS,
        },
    ),
    "olmo2": TinyModel("olmo2", {"num_key_value_heads": 1}, torch.bfloat16),
    "olmo2-odd": TinyModel("olmo2", {"hidden_size": 60, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo3": TinyModel(
        "olmo3",
        {"num_hidden_layers": 4, "sliding_window": 7, "rope_theta": 500000.0, "rope_scaling": YARN_SCALING},
    ),
    "hunyuan-odd": TinyModel("hunyuan_v1_dense", {"head_dim": 20, "attention_bias": True}),
    "gemma": TinyModel("gemma", {"head_dim": 32, "num_key_value_heads": 1, **GEMMA_IDS}, torch.bfloat16),
    "gemma-biases-untied": TinyModel(
        "gemma", {"head_dim": 20, "attention_bias": True, "tie_word_embeddings": False, **GEMMA_IDS}
    ),
    "gemma2": TinyModel(
        "gemma2",
        {
            "head_dim": 32,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 20,
            "sliding_window": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            **GEMMA_IDS,
        },
        torch.bfloat16,
    ),
    "gemma2-uncapped": TinyModel(
        "gemma2",
        {
            "head_dim": 20,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 16,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            **GEMMA_IDS,
        },
    ),
    "gemma3": TinyModel(
        "gemma3_text",
        {
            "head_dim": 32,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 20,
            "sliding_window": 7,
            "sliding_window_pattern": 2,
            "rope_theta": 500.0,
            "rope_local_base_freq": 20.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            **GEMMA_IDS,
        },
        torch.bfloat16,
    ),
    "gemma3-odd": TinyModel(
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "head_dim": 20,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 16,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 3.0,
            **GEMMA_IDS,
        },
    ),
}
WORDS = 400  # of the model with a tokenizer: each costs time in every export
FAMILIES = ("llama", "qwen3", "hunyuan_v1_dense", "phi", "stablelm")


def save_with_tokenizer(folder: Path) -> Path:
    """Write a tiny Llama that speaks the demo model's most common tokens, and return its folder."""
    TinyModel("llama", {"vocab_size": WORDS}).save(folder)
    for name in "tokenizer_config.json", "special_tokens_map.json", "generation_config.json":
        shutil.copy(demo_model_path() / name, folder)
    document = json.loads((demo_model_path() / "tokenizer.json").read_text(encoding="utf-8"))
    model = document["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < WORDS}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair).replace(" ", "") in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def plain_model(folder: Path) -> Any:
    """Load a checkpoint into memory as any user of transformers would, in float32."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"  # the others leave the softcap out
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def plain_logits(model: Any, ids: list[int]) -> Any:
    """Return the logits ``[len(ids), V]`` of a transformers model as a numpy array."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def random_ids(vocab_size: int, count: int) -> list[int]:
    """Return token ids, always the same."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist()
