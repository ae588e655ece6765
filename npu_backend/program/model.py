"""The graphs that are studied: of a bundle, of a skeleton, or made from a configuration that is shipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pmpd.npu_backend.program.graph import OnnxGraph, read_graph
from pmpd.runtime.errors import MissingExtraError
from pmpd.runtime.format.bundle import Bundle

__all__ = ["Model"]


@dataclass(frozen=True)
class Model:
    """The graphs of a bundle: prefill, and decode by precision.

    `has_output_layer` is False where the host computes the logits.
    """

    name: str
    context_length: int
    prefill_precision: float
    prefill: OnnxGraph
    decode: dict[float, OnnxGraph]
    has_output_layer: bool = True

    def without_output_layer(self) -> Model:
        """Return the model as the accelerator sees it if the output layer is left to the host."""
        return replace(
            self,
            prefill=self.prefill.without_output_layer(),
            decode={precision: graph.without_output_layer() for precision, graph in self.decode.items()},
            has_output_layer=False,
        )

    @classmethod
    def open(cls, path: str | Path) -> Model:
        """Read the graphs of the bundle or skeleton in folder `path`.

        Raises:
            BundleError: the folder is not a bundle, or a graph cannot be read.
        """
        bundle = Bundle.open(path, skeleton=True)
        manifest = bundle.manifest
        graphs = {(graph.phase, graph.precision): read_graph(bundle.path / graph.file) for graph in manifest.graphs}
        return cls(
            name=bundle.path.resolve().name,
            context_length=manifest.context_length,
            prefill_precision=manifest.prefill_precision,
            prefill=graphs["prefill", manifest.prefill_precision],
            decode={precision: graphs["decode", precision] for precision in manifest.precisions},
        )

    @classmethod
    def shipped(cls, name: str, *, precisions: Sequence[int] = (4, 3, 2), **options: Any) -> Model:
        """Make the graphs of a model whose configuration comes with the exporter, ``vicuna-7b`` for example.

        Args:
            name: the model.
            precisions: bits to decode at.
            options: further fields of `pmpd.exporter.config.ExportConfig`.

        Raises:
            MissingExtraError: the exporter's packages are not installed.
            PmpdError: there is no such model.
        """
        try:
            from pmpd.exporter.config import ExportConfig
            from pmpd.exporter.skeleton import export_skeleton
        except ModuleNotFoundError as error:
            raise MissingExtraError(error.name or "onnxscript", "export") from None
        with TemporaryDirectory() as folder:
            path = Path(folder) / name
            config = ExportConfig(model=name, output=path, precisions=tuple(precisions), **options)
            export_skeleton(config)
            return cls.open(path)
