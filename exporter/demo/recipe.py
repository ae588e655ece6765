"""What to train and for how long: the shape of the model and the course of its training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pmpd.exporter.demo.corpus import BOS, EOS, PAD
from pmpd.runtime.errors import PmpdError

__all__ = ["Recipe", "build_model"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train and how; training ends after `minutes` or `tokens`, whichever comes first."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    context: int
    sequence_length: int
    batch_size: int
    learning_rate: float
    minutes: float | None
    tokens: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.minutes is None and self.tokens is None:
            raise PmpdError("how long to train is missing: give --minutes, --tokens or both")
        if self.hidden_size % (2 * self.heads):
            raise PmpdError(f"--hidden-size {self.hidden_size} does not split into --heads {self.heads} of even width")
        if self.heads % self.kv_heads:
            raise PmpdError(f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads}")
        if self.sequence_length > self.context:
            raise PmpdError(f"--sequence-length {self.sequence_length} is longer than --context {self.context}")

    def done(self, *, step: int, seconds: float) -> float:
        """Return the part of the training, 0 to 1, that is over after `step` steps in `seconds`."""
        tokens_per_step = self.batch_size * self.sequence_length
        by_time = seconds / (60 * self.minutes) if self.minutes is not None else 0.0
        by_tokens = step / math.ceil(self.tokens / tokens_per_step) if self.tokens is not None else 0.0
        return min(1.0, max(by_time, by_tokens))


def build_model(recipe: Recipe, *, vocab_size: int) -> Any:
    """Return a randomly initialized float32 LlamaForCausalLM (untied head); the weights depend on the seed only."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=recipe.context,
            rms_norm_eps=1e-5,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
