"""From what `--model` names to a checkpoint, or to its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.source.folder import CheckpointFolder, read_config
from pmpd.exporter.source.models import published_name, resolve_model

__all__ = ["open_checkpoint", "open_config"]


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Open a model as `resolve_model` finds it.

    Raises:
        PmpdError: it is not found, or its files are not complete.
    """
    return CheckpointFolder.open(resolve_model(model, revision=revision), name=published_name(model), revision=revision)


def open_config(model: str) -> Mapping[str, Any]:
    """Return the configuration of a model whose weights need not exist. Raises as `open_checkpoint`."""
    return read_config(resolve_model(model))
