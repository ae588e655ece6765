"""PMPD's exporter: a Hugging Face checkpoint goes in, a bundle comes out."""

from pmpd.exporter.config import ExportConfig
from pmpd.exporter.pipeline import Export, export_bundle

__all__ = ["Export", "ExportConfig", "export_bundle"]
