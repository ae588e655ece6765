"""Skeletons: bundles without weights, from a model's configuration alone, for studying shapes of any size.

A skeleton has the graphs and the tensor table of a real export of the same configuration, byte for byte, and neither
weights nor kernels nor tokenizer. It takes no checkpoint, no network, no torch, and memory for graphs alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from pmpd.exporter.bundle.card import skeleton_card
from pmpd.exporter.bundle.workspace import check_output, put_in_place
from pmpd.exporter.config import ExportConfig
from pmpd.exporter.outline import Outline, plan_bundle
from pmpd.exporter.source.checkpoint import DEMO, read_json, resolve_model
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.manifest import MANIFEST_NAME, Manifest, Source

__all__ = ["Skeleton", "export_skeleton", "shipped_models"]

_CONFIGS = Path(__file__).parent / "source" / "configs"
# Options of an export that say how weights are fetched, quantized and computed with.
_OF_WEIGHTS = (
    "revision",
    "seed_precision",
    "calibration",
    "calibration_samples",
    "calibration_length",
    "targets",
    "accuracy",
)


def shipped_models() -> tuple[str, ...]:
    """Return the names of the models whose configurations come with the package."""
    return tuple(sorted(file.stem for file in _CONFIGS.glob("*.json")))


class Skeleton(Outline):
    """The export of a skeleton; nothing is written before `run`, and `graphs`, `model` and `plan` need no files."""

    @classmethod
    def of(cls, config: ExportConfig) -> Self:
        """Outline the model that `config` names: one of `shipped_models`, ``demo``, or a folder with a config.json.

        Raises:
            PmpdError: no such model, an architecture that cannot be exported, or an option that needs weights.
        """
        defaults = {field.name: field.default for field in fields(ExportConfig)}
        for name in _OF_WEIGHTS:
            if getattr(config, name) != defaults[name]:
                option = "target" if name == "targets" else name.replace("_", "-")
                raise PmpdError(f"a skeleton has no weights to use --{option} for: leave out --{option} or --skeleton")
        config = config.resolved()
        family, plan = plan_bundle(config, _read_config(config.model))
        return cls(config, Source(model=config.model), family, plan)

    @classmethod
    def prepare(cls, config: ExportConfig) -> Self:
        """Check everything that can be checked before work. Raises as `of` does, and if the output exists."""
        check_output(config.output, overwrite=config.overwrite)
        return cls.of(config)

    def describe(self) -> list[str]:
        """Return the plan in lines for a person."""
        return [*super().describe(), "skeleton  graphs and tensor table, without the weights"]

    def run(self, *, quiet: bool = False) -> Manifest:
        """Write the skeleton and return its manifest; it appears at the output when it is complete, or not at all.

        It takes about a second, so there is no progress to keep `quiet` about.

        Raises:
            PmpdError: the output cannot be written.
        """
        output = self.config.output
        folder = output.with_name(f"{output.name}.partial-{os.getpid()}")
        try:
            folder.mkdir(parents=True)
            manifest = self._write(folder)
            put_in_place(folder, output)
        except OSError as error:
            raise PmpdError(f"cannot write {output} ({error.strerror}): choose another --output") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return manifest

    def _write(self, folder: Path) -> Manifest:
        self.write_graphs(folder)
        graphs = [folder / graph.file for graph in self.graphs]
        card = folder / "README.md"
        manifest = self.manifest(folder, graphs, skeleton=True)
        card.write_text(skeleton_card(manifest, name=self.config.output.name), encoding="utf-8")
        manifest = self.manifest(folder, [card, *graphs], skeleton=True)
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest


def export_skeleton(config: ExportConfig) -> Manifest:
    """Write the skeleton that `config` describes; raises as `Skeleton.prepare` and `Skeleton.run` do."""
    return Skeleton.prepare(config).run()


def _read_config(model: str) -> Mapping[str, Any]:
    if model != DEMO and not Path(model).is_dir():  # a folder comes first, as in `resolve_model`
        if model in shipped_models():
            return read_json(_CONFIGS / f"{model}.json")
        choices = [DEMO, *shipped_models()]
        raise PmpdError(f"{unknown_choice('model', model, choices)}, or give a folder with a config.json")
    path = resolve_model(model) / "config.json"
    if not path.is_file():
        raise PmpdError(f"{path.parent} has no config.json: give a Hugging Face checkpoint's folder")
    return read_json(path)
