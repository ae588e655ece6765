"""Skeletons: bundles without weights, from a model's configuration alone, for studying shapes of any size.

A skeleton has the graphs and the tensor table of a real export of the same configuration, byte for byte, and neither
weights nor kernels nor tokenizer. It takes no checkpoint, no network, no torch, and memory for graphs alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import onnx_ir as ir

from pmpd.exporter.bundle.card import CARD, skeleton_card
from pmpd.exporter.bundle.destination import Destination, check_output
from pmpd.exporter.bundle.plan import WeightPlan
from pmpd.exporter.config import NO_TEXT, ExportConfig
from pmpd.exporter.outline import Outline, file_entry
from pmpd.exporter.source.models import DEMO, published_name
from pmpd.exporter.source.opening import open_config
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.manifest import MANIFEST_NAME, Graph, Manifest, Source
from pmpd.tvm_kernels.models import shipped_config, shipped_models

__all__ = ["Skeleton", "export_skeleton"]

# Options of an export that say how weights are fetched, quantized and computed with.
_OF_WEIGHTS = (
    "revision",
    "method",
    "seed_precision",
    "calibration",
    "calibration_samples",
    "calibration_length",
    "tune",
    "targets",
    "accuracy",
)


@dataclass(frozen=True)
class Skeleton:
    """The export of a skeleton; nothing is written before `run`, and the graphs and the plan need no files.

    Attributes:
        outline: the bundle, as far as it is decided without weights.
    """

    outline: Outline

    @classmethod
    def of(cls, config: ExportConfig) -> Self:
        """Outline the model that `config` names: one of `shipped_models`, ``demo``, a folder or a GGUF file.

        Raises:
            PmpdError: no such model, an architecture that cannot be exported, or an option that needs weights.
        """
        defaults = {field.name: field.default for field in fields(ExportConfig)}
        for name in _OF_WEIGHTS:
            if getattr(config, name) != defaults[name]:
                option = "target" if name == "targets" else name.replace("_", "-")
                raise PmpdError(f"a skeleton has no weights to use --{option} for: leave out --{option} or --skeleton")
        if mixes := config.resolve().mixes:
            raise PmpdError(
                f"precision {mixes[0]}: which layers read more planes depends on weights, of which a skeleton has "
                "none: take whole precisions"
            )
        resolved = replace(config, targets=(), calibration=NO_TEXT).resolve()
        source = Source(model=published_name(resolved.model))
        return cls(Outline.of(resolved, source, _read_config(resolved.model)))

    @classmethod
    def prepare(cls, config: ExportConfig) -> Self:
        """Check everything that can be checked before work. Raises as `of` does, and if the output exists."""
        check_output(config.output, overwrite=config.overwrite)
        return cls.of(config)

    @property
    def plan(self) -> WeightPlan:
        """The layout of the weight file, which the skeleton goes without."""
        return self.outline.plan

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """Its graphs: prefill, then decode from high to low."""
        return self.outline.graphs

    def model(self, graph: Graph) -> ir.Model:
        """Build one of `graphs`; its weights are references into a file that need not exist."""
        return self.outline.model(graph)

    def describe(self) -> list[str]:
        """Return the plan in lines for a person."""
        return [*self.outline.describe(), "skeleton  graphs and tensor table, without the weights"]

    def run(self) -> Manifest:
        """Write the skeleton and return its manifest; it appears at the output when it is complete, or not at all.

        Raises:
            PmpdError: the output cannot be written.
        """
        config = self.outline.config
        try:
            with Destination.claim(config.output, overwrite=config.overwrite) as destination:
                folder = destination.work / "skeleton"
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    folder.mkdir()
                    manifest = self._write(folder)
                    destination.publish(folder)
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            raise PmpdError(f"cannot write {config.output} ({error.strerror}): choose another --output") from None
        return manifest

    def _write(self, folder: Path) -> Manifest:
        outline = self.outline
        outline.write_graphs(folder)
        manifest = outline.manifest(folder, [folder / graph.file for graph in outline.graphs], skeleton=True)
        card = folder / CARD
        card.write_text(skeleton_card(manifest, name=outline.config.output.name), encoding="utf-8")
        manifest = replace(manifest, files=manifest.files | {CARD: file_entry(card)})
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest


def export_skeleton(config: ExportConfig) -> Manifest:
    """Write the skeleton that `config` describes; raises as `Skeleton.prepare` and `Skeleton.run` do."""
    return Skeleton.prepare(config).run()


def _read_config(model: str) -> Mapping[str, Any]:
    if model != DEMO and not Path(model).exists():  # what is on disk comes first, as in `resolve_model`
        if model in shipped_models():
            return shipped_config(model)
        choices = [DEMO, *shipped_models()]
        raise PmpdError(
            f"{unknown_choice('model', model, choices)}, or give a folder with a config.json or a GGUF file"
        )
    return open_config(model)
