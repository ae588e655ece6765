"""Transformers as the reference of the exporter's checks, with weights loaded layer by layer.

The model is built without memory for its weights (on torch's meta device); each module's parameters appear before it
runs and go after. So a model of any size can be checked in the memory of its largest layer, and the weights can come
from anywhere: from the checkpoint, or dequantized from a bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from pmpd.exporter.source.reference import no_initialization, transformers_config

__all__ = ["reference_logits"]


def reference_logits(
    config: Mapping[str, Any], tensor: Callable[[str], torch.Tensor], ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return transformers' float32 logits ``[B, T, V]`` for a batch of texts.

    Args:
        config: the model's `config.json`.
        tensor: gives a parameter by its name in transformers (``model.layers.0.self_attn.q_proj.weight``).
        ids: token ids ``[B, T]``.
    """
    from transformers import AutoModelForCausalLM

    with _EmptyOnMeta(), no_initialization():
        model = AutoModelForCausalLM.from_config(transformers_config(config))
    model.eval()
    for name, module in model.named_modules():
        if module._parameters:
            module.register_forward_pre_hook(_loader(name, tensor))
            module.register_forward_hook(_unload)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.from_numpy(ids), use_cache=False).logits
    return logits.float().numpy()


class _EmptyOnMeta(TorchFunctionMode):
    """Weights, which are made empty, get no memory; buffers, which are computed and not loaded, do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _loader(name: str, tensor: Callable[[str], torch.Tensor]) -> Callable[[torch.nn.Module, Any], None]:
    def load(module: torch.nn.Module, _: Any) -> None:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = torch.nn.Parameter(tensor(f"{name}.{key}").float(), requires_grad=False)

    return load


def _unload(module: torch.nn.Module, *_: Any) -> None:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
