"""The models that PMPD knows by name: one list for the exporter, the tuner and the recipes.

It is here, and not in the exporter, because kernels are tuned on the shapes of these models, and `tvm_kernels` imports
nothing of the exporter. To add a model, add a line to `MODELS`, and to ship its configuration, the `config.json` of its
checkpoint as ``configs/<name>.json``, cut down to what `pmpd.exporter.arch` reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MODELS", "KnownModel", "shipped_config", "shipped_models"]

_CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class KnownModel:
    """A model with a name of its own in PMPD.

    Attributes:
        name: as in ``--model``.
        hub_id: where its checkpoint is on the Hugging Face hub.
        tuned: whether kernels are tuned on its shapes by default; these are the models of the paper's evaluation.
    """

    name: str
    hub_id: str
    tuned: bool = False

    @property
    def config_file(self) -> Path:
        """Where its configuration is, if it is shipped."""
        return _CONFIGS / f"{self.name}.json"


MODELS = {
    model.name: model
    for model in (
        KnownModel("phi-1", "microsoft/phi-1"),
        KnownModel("phi-1.5", "microsoft/phi-1_5", tuned=True),
        KnownModel("phi-2", "microsoft/phi-2"),
        KnownModel("phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct"),
        KnownModel("phi-4-mini", "microsoft/Phi-4-mini-instruct"),
        KnownModel("vicuna-7b", "lmsys/vicuna-7b-v1.5", tuned=True),
        KnownModel("vicuna-13b", "lmsys/vicuna-13b-v1.5"),
        KnownModel("mobilellama-1.4b", "mtgv/MobileLLaMA-1.4B-Chat", tuned=True),
        KnownModel("stablelm-zephyr-3b", "stabilityai/stablelm-zephyr-3b", tuned=True),
        KnownModel("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        KnownModel("llama3-8b", "meta-llama/Meta-Llama-3-8B-Instruct"),
        KnownModel("longchat-13b", "lmsys/longchat-13b-16k"),  # the layers of vicuna-13b
        KnownModel("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct"),
        KnownModel("llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct"),
        KnownModel("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct"),
        KnownModel("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct"),
        KnownModel("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        KnownModel("qwen3-1.7b", "Qwen/Qwen3-1.7B"),
        KnownModel("qwen3-4b", "Qwen/Qwen3-4B"),
        KnownModel("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        KnownModel("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct"),
        KnownModel("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        KnownModel("smollm3-3b", "HuggingFaceTB/SmolLM3-3B"),
        KnownModel("gemma-2-2b", "google/gemma-2-2b-it"),
        KnownModel("gemma-3-270m", "google/gemma-3-270m-it"),
        KnownModel("gemma-3-1b", "google/gemma-3-1b-it"),
    )
}


def shipped_models() -> tuple[str, ...]:
    """Return the names of the models whose configurations come with the package, in alphabetical order."""
    return tuple(sorted(model.name for model in MODELS.values() if model.config_file.is_file()))


def shipped_config(name: str) -> Mapping[str, Any]:
    """Return the configuration of one of `shipped_models`, with the keys of a checkpoint's `config.json`."""
    config: Mapping[str, Any] = json.loads(MODELS[name].config_file.read_text(encoding="utf-8"))
    return config
