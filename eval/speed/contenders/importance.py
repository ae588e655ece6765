"""llama.cpp's importance matrix: how much each column of a weight matters, on the text that calibrates exports."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmpd.exporter.calibrate.batches import calibration_batches
from pmpd.exporter.calibrate.sweep import VisitInputs, fast_dtype, sweep_inputs
from pmpd.exporter.calibrate.text import text_tokens
from pmpd.exporter.config import BUILT_IN, ExportConfig
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.exporter.source.reference import load_model
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError

__all__ = ["write_importance"]


def write_importance(weights: Path, file: Path, *, quiet: bool = True) -> None:
    """Write the mean square of what each linear layer is given in each column, by the weight's name (``.npz``).

    That is what ``llama-imatrix`` computes; the text is the built-in one, as much of it as exports take by default.

    Args:
        weights: a checkpoint folder or a GGUF file.
        file: written whole, or not at all.

    Raises:
        PmpdError: there is no tokenizer, the file cannot be written, or as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(str(weights))
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise PmpdError(f"{weights} has no tokenizer for an importance matrix: leave _imatrix out of --peer")
    config = ExportConfig(model=str(weights), output=file)
    tokens = text_tokens(BUILT_IN, tokenizer)
    batches = calibration_batches(tokens, config.calibration_samples, config.calibration_length)
    squares: dict[str, list[torch.Tensor]] = defaultdict(list)  # mean over each batch

    def visit(index: int) -> VisitInputs:
        def add(layer: str, inputs: torch.Tensor) -> None:
            squares[f"model.layers.{index}.{layer}.weight"].append(inputs.float().square().mean((0, 1)))

        return add

    sweep_inputs(
        load_model(checkpoint, blocks_as_stored=True),
        batches,
        visit,
        dtype=fast_dtype(),
        progress=lambda blocks, total: track(blocks, step="importance matrix", total=total, quiet=quiet),
    )
    means: dict[str, Any] = {name: torch.stack(of_batches).mean(0).numpy() for name, of_batches in squares.items()}
    draft = file.with_suffix(".partial")
    try:
        with draft.open("wb") as stream:
            np.savez(stream, **means)
        draft.rename(file)
    except OSError as error:
        raise PmpdError(f"cannot write {file} ({error.strerror}): choose another --peer-models") from None
    finally:
        draft.unlink(missing_ok=True)
