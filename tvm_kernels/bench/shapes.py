"""Weight matrices of models: what kernels are tuned and measured on. Layers that share an input are one matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.tvm_kernels.models import MODELS, shipped_config, shipped_models

__all__ = ["SUPPORTED", "Shape", "model_shapes", "parse_shape"]


@dataclass(frozen=True, order=True)
class Shape:
    """N outputs (rows) and K inputs (columns) of a linear layer."""

    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


# The models on whose shapes records are tuned by default.
SUPPORTED = tuple(model.name for model in MODELS.values() if model.tuned)
_UNGATED = ("phi",)


def model_shapes(model: str) -> tuple[Shape, ...]:
    """Return the matrices of a decoder layer of a model: attention in and out, MLP in and out.

    Args:
        model: one of `shipped_models`, or a folder with a Hugging Face `config.json`.

    Raises:
        PmpdError: the model is unknown, or its configuration is incomplete.
    """
    config = shipped_config(model) if model in shipped_models() else _read_config(model)
    try:
        hidden, heads, middle = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    except KeyError as error:
        raise PmpdError(f"{model}/config.json lacks {error}: is it a complete Hugging Face checkpoint?") from None
    head = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    inner = middle if config.get("model_type") in _UNGATED else 2 * middle
    attention = Shape((heads + 2 * kv_heads) * head, hidden), Shape(hidden, heads * head)
    return (*attention, Shape(inner, hidden), Shape(hidden, middle))


def parse_shape(text: str) -> Shape:
    """Read a shape as users write it, ``8192x2048`` or ``8192,2048``.

    Raises:
        PmpdError: it is not two positive numbers.
    """
    try:
        n, k = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        n = k = 0
    if n < 1 or k < 1:
        raise PmpdError(f"shape {text!r} is not N,K: give rows and columns, like 8192,2048")
    return Shape(n, k)


def _read_config(model: str) -> Mapping[str, Any]:
    path = Path(model) / "config.json"
    try:
        config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise PmpdError(
            f"{unknown_choice('model', model, shipped_models())}, or give a folder with a config.json"
        ) from None
    except ValueError as error:
        raise PmpdError(f"{path} is not JSON ({error})") from None
    return config
