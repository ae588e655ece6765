"""A checkpoint as a model of transformers, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

from pmpd.exporter.source.checkpoint import Checkpoint

__all__ = ["corrected", "load_model", "no_initialization", "transformers_config"]


def transformers_config(config: Mapping[str, Any]) -> Any:
    """Return transformers' configuration object of a `config.json`; no code of the checkpoint is run for it."""
    from transformers import AutoConfig

    # A copy, because transformers 5 writes into what it is given.
    options = deepcopy({key: value for key, value in config.items() if key != "model_type"})
    return corrected(AutoConfig.for_model(config["model_type"], **options))


def corrected(config: Any) -> Any:
    """Return a configuration of transformers, changed where its model would compute what its authors did not mean."""
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"  # in 4.57 the others leave the softcap out
    if config.model_type == "gemma" and config.hidden_act == "gelu":
        config.hidden_act = "gelu_pytorch_tanh"  # as 5 does
    return config


def load_model(checkpoint: Checkpoint, *, blocks_as_stored: bool = False) -> Any:
    """Return transformers' model of a checkpoint with its weights in float32, ready for inference.

    Args:
        checkpoint: which.
        blocks_as_stored: leave the blocks' weights in the type of the checkpoint, and in its files where they can be
            mapped: for callers that convert one block at a time.

    Raises:
        PmpdError: a tensor is missing or damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with no_initialization():
        model = AutoModelForCausalLM.from_config(transformers_config(checkpoint.config), dtype=torch.float32)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied one once, under its first name
            tensor = checkpoint.tensor(name, tuple(parameter.shape))
            if blocks_as_stored and name.startswith("model.layers."):
                parameter.data = tensor
            else:
                parameter.copy_(tensor)
    return model.eval()


def no_initialization() -> AbstractContextManager[None]:
    """Return the context in which transformers leaves new weights alone; its place depends on the version."""
    try:
        from transformers.initialization import no_init_weights  # 5
    except ImportError:
        from transformers.modeling_utils import no_init_weights  # 4
    context: AbstractContextManager[None] = no_init_weights()
    return context
