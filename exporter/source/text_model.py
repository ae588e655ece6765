"""The text model inside a checkpoint that also reads images, as a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["stored_names", "text_config"]

# By the `model_type` of the whole: those whose text model is one of the families, and does not depend on the rest.
_TEXT_MODELS = {"gemma3": "gemma3_text"}
_OF_THE_WHOLE = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
# What stands before the names of the text model's tensors: of transformers before 4.52, and since.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of the text model, which is the whole one if there is nothing else."""
    kind, text = config.get("model_type"), config.get("text_config")
    if kind not in _TEXT_MODELS or not isinstance(text, Mapping):
        return config
    whole = {name: config[name] for name in _OF_THE_WHOLE if name in config}
    return {**whole, **text, "model_type": _TEXT_MODELS[kind], "architectures": config.get("architectures")}


def stored_names(names: Iterable[str]) -> dict[str, str]:
    """Return the names in the file of the text model's tensors, by their names in a text model alone."""
    stored = {}
    for name in names:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        stored[_PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = name
    return stored
