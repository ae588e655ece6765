"""From what `--model` names to a checkpoint, or to its configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.source.folder import CheckpointFolder, read_config
from pmpd.exporter.source.gguf.checkpoint import GgufCheckpoint
from pmpd.exporter.source.models import published_name, resolve_model

__all__ = ["open_checkpoint", "open_config"]


def open_checkpoint(
    model: str, *, revision: str | None = None, accept: Callable[[Mapping[str, Any]], object] | None = None
) -> Checkpoint:
    """Open a model as `resolve_model` finds it: a folder or a GGUF file.

    `accept` is given the `config.json` of a hub model before its weights are fetched, and raises if they are no use.

    Raises:
        MissingExtraError: it is a GGUF file, and the package `gguf` is not installed.
        PmpdError: it is not found, or its files are not complete.
    """

    def look(snapshot: Path) -> None:
        if accept is not None:
            accept(read_config(snapshot))

    path, name = resolve_model(model, revision=revision, accept=look), published_name(model)
    if path.is_file():
        return GgufCheckpoint.open(path, name=name)
    return CheckpointFolder.open(path, name=name, revision=revision)


def open_config(model: str) -> Mapping[str, Any]:
    """Return the configuration of a model; of a folder's weights nothing need exist. Raises as `open_checkpoint`."""
    path = resolve_model(model)
    return GgufCheckpoint.open(path, name=path.name).config if path.is_file() else read_config(path)
