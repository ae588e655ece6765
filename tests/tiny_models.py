"""Tiny random checkpoints of every family, made on the fly: small enough to run in milliseconds, odd enough to fail."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
                parameter.data = name.endswith("weight") + 0.2 * noise
            else:
                parameter.data = noise * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
        model.to(self.dtype).save_pretrained(folder, max_shard_size=self.shard_size)
        return folder

    def _config(self, **changes: Any) -> Any:
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
    "stablelm": TinyModel("stablelm", {"hidden_size": 240, "partial_rotary_factor": 0.25}, torch.bfloat16),
    "stablelm-biases": TinyModel(
        "stablelm", {"hidden_size": 240, "partial_rotary_factor": 0.25, "use_qkv_bias": True, "num_key_value_heads": 1}
    ),
    "stablelm-parallel": TinyModel(
        "stablelm",
        {"hidden_size": 240, "partial_rotary_factor": 0.25, "qk_layernorm": True, "use_parallel_residual": True},
    ),
}
FAMILIES = ("llama", "phi", "stablelm")


def save_with_tokenizer(folder: Path) -> Path:
    """Write a tiny Llama that speaks the demo model's tokens, and return its folder."""
    TinyModel("llama", {"vocab_size": 4096}).save(folder)
    for name in "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json":
        shutil.copy(demo_model_path() / name, folder)
    return folder


def plain_model(folder: Path) -> Any:
    """Load a checkpoint into memory as any user of transformers would, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plain_logits(model: Any, ids: list[int]) -> Any:
    """Return the logits ``[len(ids), V]`` of a transformers model as a numpy array."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def random_ids(vocab_size: int, count: int) -> list[int]:
    """Return token ids, always the same."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist()
