"""Calibration as a step of an export: from a text file to the statistics that the method needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pmpd.exporter.bundle.fingerprint import CALIBRATION_CODE, code_digest, fingerprint
from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.exporter.calibrate.batches import calibration_batches
from pmpd.exporter.calibrate.own_text import beginnings, write_text
from pmpd.exporter.calibrate.store import StatisticsStore
from pmpd.exporter.calibrate.sweep import fast_dtype, of_dtype
from pmpd.exporter.calibrate.text import text_tokens
from pmpd.exporter.config import OWN_TEXT, ResolvedConfig
from pmpd.exporter.quantize import METHODS
from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.source.reference import load_model
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bundle import sha256_of

__all__ = ["calibration_pieces", "collect_statistics"]


def calibration_pieces(config: ResolvedConfig, text: Path | str, tokenizer: Any) -> list[torch.Tensor]:
    """Return the pieces of a text, a file or `BUILT_IN`, that an export works with: int64 ``[1, T]`` each.

    Raises:
        PmpdError: the text cannot be read, or is too short.
    """
    ids = text_tokens(text, tokenizer)
    return calibration_batches(ids, config.calibration_samples, config.calibration_length)


def collect_statistics(
    config: ResolvedConfig, text: Path | str, checkpoint: Checkpoint, layers: Sequence[LinearLayer]
) -> StatisticsStore:
    """Return the statistics of a model on a text, a file, `BUILT_IN` or `OWN_TEXT`, that the method of an export needs.

    What is not in the user's cache is computed. For that the model is in memory, its blocks as they are stored.

    Raises:
        PmpdError: the checkpoint has no tokenizer, the text is too short, or as `StatisticsStore.collect`.
    """
    samples, length = config.calibration_samples, config.calibration_length
    shapes = {
        name: (part.rows, layer.module.source_features)
        for layer in layers
        for name, part in zip(layer.weight_names, layer.module.parts, strict=True)
    }

    def load() -> tuple[torch.nn.Module, list[torch.Tensor]]:
        tokenizer = checkpoint.tokenizer()
        if text == OWN_TEXT:
            model, starts = load_model(checkpoint), beginnings(tokenizer, checkpoint.config.get("bos_token_id"))
            with of_dtype(model, fast_dtype()):
                return model, write_text(model, starts, samples=samples, length=length, progress=_track)
        if tokenizer is None:
            raise PmpdError(f"{checkpoint.path} has no tokenizer for a calibration text: take --calibration {OWN_TEXT}")
        return load_model(checkpoint, blocks_as_stored=True), calibration_pieces(config, text, tokenizer)

    identity = (checkpoint.identity(), sha256_of(text) if isinstance(text, Path) else text, samples, length, shapes)
    return StatisticsStore.collect(
        METHODS[config.method].needs,
        key=fingerprint(*identity, code_digest(CALIBRATION_CODE)),
        shapes=shapes,
        load=load,
    )


def _track(steps: Iterable[int], total: int) -> Iterator[int]:
    return track(steps, step="write text", total=total)
