"""Sensitivities from calibration text: which weights the clustering must hit best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from pmpd.exporter.bundle.plan import WeightPlan
from pmpd.exporter.config import ExportConfig
from pmpd.exporter.quantize import squared_gradients
from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.source.documents import read_documents
from pmpd.exporter.source.tokenizer import load_tokenizer
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError

__all__ = ["calibration_batches", "sensitivities"]


def sensitivities(
    config: ExportConfig, checkpoint: Checkpoint, plan: WeightPlan, scratch: Path, *, quiet: bool
) -> dict[str, Any]:
    """Return the squared gradients of every quantized weight over the calibration text, by checkpoint name.

    They are kept in `scratch`, so that a resumed export does not compute them again. Needs the model in float32 twice
    over (weights and sums) in memory.

    Raises:
        PmpdError: the checkpoint has no tokenizer, or the text is too short.
    """
    kept = scratch / "sensitivity.safetensors"
    if kept.is_file():
        loaded: dict[str, Any] = load_file(kept)
        return loaded
    from transformers import AutoModelForCausalLM

    if config.calibration is None:
        raise PmpdError("there is no calibration text")
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise PmpdError(f"{checkpoint.path} has no tokenizer for the calibration text: export without --calibration")
    ids = tokenizer("\n\n".join(read_documents(config.calibration)))["input_ids"]
    batches = calibration_batches(ids, config.calibration_samples, config.calibration_length)
    model = AutoModelForCausalLM.from_pretrained(str(checkpoint.path), dtype=torch.float32, local_files_only=True)
    names = sorted({name for layer in plan.linears for name in layer.weight_names})
    result = squared_gradients(model, track(batches, step="calibrate", total=len(batches), quiet=quiet), names)
    part = kept.with_suffix(".part")
    save_file(result, part)
    part.rename(kept)
    return result


def calibration_batches(ids: list[int], samples: int, length: int) -> list[torch.Tensor]:
    """Cut a token sequence into `samples` pieces of `length` tokens, spread evenly: each int64 ``[1, length]``."""
    if len(ids) < length:
        raise PmpdError(
            f"the calibration text has {len(ids)} tokens, fewer than one sequence of {length}: give more text"
        )
    count = min(samples, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [torch.tensor([ids[start : start + length]]) for start in starts]
