"""Calibration as a step of an export: from a text file to the statistics that the method needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pmpd.exporter.bundle.fingerprint import CALIBRATION_CODE, code_digest, fingerprint
from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.exporter.calibrate.batches import calibration_batches
from pmpd.exporter.calibrate.store import StatisticsStore
from pmpd.exporter.config import ResolvedConfig
from pmpd.exporter.documents import read_documents
from pmpd.exporter.quantize import METHODS
from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.source.reference import load_model
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bundle import sha256_of

__all__ = ["collect_statistics"]


def collect_statistics(
    config: ResolvedConfig, text: Path, checkpoint: Checkpoint, layers: Sequence[LinearLayer]
) -> StatisticsStore:
    """Return the statistics of a model on a calibration text that the method of an export needs.

    What is not in the user's cache is computed, for which the model is in memory in float32.

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
        if tokenizer is None:
            raise PmpdError(
                f"{checkpoint.path} has no tokenizer for the calibration text: export without --calibration"
            )
        ids = tokenizer("\n\n".join(read_documents(text)))["input_ids"]
        batches = calibration_batches(ids, samples, length)
        return load_model(checkpoint), batches

    identity = (checkpoint.identity(), sha256_of(text), samples, length, shapes)
    return StatisticsStore.collect(
        METHODS[config.method].needs,
        key=fingerprint(*identity, code_digest(CALIBRATION_CODE)),
        shapes=shapes,
        load=load,
    )
