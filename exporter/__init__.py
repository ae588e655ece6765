"""PMPD's exporter: a Hugging Face checkpoint goes in, a bundle comes out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmpd.exporter.config import ExportConfig
    from pmpd.exporter.pipeline import Export, export_bundle
    from pmpd.exporter.skeleton import Skeleton, export_skeleton

__all__ = ["Export", "ExportConfig", "Skeleton", "export_bundle", "export_skeleton"]

_MODULES = {"ExportConfig": "config", "Skeleton": "skeleton", "export_skeleton": "skeleton"}


def __getattr__(name: str) -> Any:
    # Loaded when asked for, so that the command line can say which extra is missing, and its --help needs no torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'pipeline')}"), name)
