"""The export, step by step: read, plan, calibrate, quantize, build graphs, verify, publish."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from pmpd.exporter.bundle.card import model_card
from pmpd.exporter.bundle.kernels import build_kernels, built_kernels, wanted_targets
from pmpd.exporter.bundle.layers import checkpoint_shapes, plain_tensors
from pmpd.exporter.bundle.workspace import Workspace, check_output, fingerprint
from pmpd.exporter.calibrate.store import sensitivities
from pmpd.exporter.config import ExportConfig
from pmpd.exporter.outline import Outline, plan_bundle
from pmpd.exporter.quantize import AnyPrecisionQuantizer
from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.source.tokenizer import copy_text_files
from pmpd.exporter.verify.bundle import (
    Agreement,
    kernel_checks,
    require_agreement,
    verification_ids,
    verify_bundle,
    verify_float_graph,
)
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bundle import Bundle, sha256_of
from pmpd.runtime.format.manifest import MANIFEST_NAME, Manifest
from pmpd.tvm_kernels import require_toolchain

__all__ = ["Export", "export_bundle"]

log = logging.getLogger(__name__)
_PLAIN = "plain tensors"


@dataclass(frozen=True)
class Export(Outline):
    """An export that has been planned and not yet done; nothing is written before `run`.

    Attributes:
        checkpoint: the opened checkpoint.
    """

    checkpoint: Checkpoint

    @classmethod
    def prepare(cls, config: ExportConfig) -> Export:
        """Check everything that can be checked before work.

        Raises:
            MissingExtraError: TVM or a compiler for a target that was asked for is not installed.
            PmpdError: the model is not found or not supported, the output exists, or the disk is too small.
        """
        config = config.resolved()
        check_output(config.output, overwrite=config.overwrite)
        for target in config.targets or ():
            require_toolchain(target)
        checkpoint = Checkpoint.open(config.model, revision=config.revision)
        family, plan = plan_bundle(config, checkpoint.config)
        export = cls(config, checkpoint.source, family, plan, checkpoint)
        for name, shape in checkpoint_shapes(export.network(config.precisions[0])):
            checkpoint.tensor(name, shape)  # a missing one is better found now than in an hour
        existing = next((folder for folder in config.output.absolute().parents if folder.exists()), Path("/"))
        free = shutil.disk_usage(existing).free
        if free < plan.size:
            raise PmpdError(f"{existing} has {free / 1e9:.1f} GB free, the bundle takes {plan.size / 1e9:.1f} GB")
        return export

    @property
    def peak_memory(self) -> int:
        """Estimated peak of resident memory in bytes.

        That is the libraries and the largest layer as floats, a few times over; in the verification the checkpoint
        too, mapped from its files; in the calibration the weights and their sensitivities in float32.
        """
        largest = max(layer.module.out_features * layer.module.in_features for layer in self.plan.linears)
        calibrating = 12 * self.parameters if self.config.calibration else 0
        return int(700e6 + max(12 * largest + self.checkpoint.nbytes, calibrating))

    def describe(self) -> list[str]:
        """Return the plan in lines for a person."""
        return [
            *super().describe(),
            f"kernels   {self._kernels()}",
            f"needs     {self.plan.size / 1e9:.2f} GB of disk, about {self.peak_memory / 1e9:.1f} GB of memory",
        ]

    @property
    def kernel_precisions(self) -> tuple[int, ...]:
        """Bits of all weights that a kernel may meet, high to low."""
        return tuple(sorted({*self.config.precisions, self.config.head_precision}, reverse=True))

    def _kernels(self) -> str:
        targets = ", ".join(wanted_targets(self.config.targets))
        bits = "/".join(map(str, self.kernel_precisions))
        return f"{targets}: {self.config.accuracy}, {bits} bits" if targets else "none"

    def run(self, *, quiet: bool = False) -> Manifest:
        """Do the export; what an earlier, interrupted one has done is not done again.

        Raises:
            PmpdError: the checkpoint is damaged, or the verification fails; nothing is published then.
        """
        config = self.config
        text = config.calibration and sha256_of(config.calibration)
        # Kernels are no part of the work that a folder is named after: whoever wants others keeps his weights.
        kernels = {"targets": None, "accuracy": None}
        mark = fingerprint(config.to_json() | kernels, text, self.checkpoint.identity(), version("pmpd"))
        with Workspace.open(config.output, mark, self.plan) as workspace:
            if workspace.done:
                steps = len(self.plan.linears) + 1 + len(wanted_targets(config.targets))
                log.info("resuming: %d of %d steps are done", len(workspace.done), steps)
            build_kernels(config.targets, self.kernel_precisions, self.family.shape.head.slots, workspace, quiet=quiet)
            copy_text_files(self.checkpoint, workspace.path)
            self._quantize(workspace, quiet=quiet)
            self.write_graphs(workspace.path)
            manifest = self._manifest(workspace)
            results = self._verify(Bundle(workspace.path, manifest), quiet=quiet)
            (workspace.path / "README.md").write_text(
                model_card(manifest, results, name=config.output.name), encoding="utf-8"
            )
            manifest = replace(
                self._manifest(workspace),
                verified=True,
                verification={check: asdict(agreement) for check, agreement in results.items()},
            )
            (workspace.path / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
            workspace.publish()
        return manifest

    def _quantize(self, workspace: Workspace, *, quiet: bool) -> None:
        config, checkpoint = self.config, self.checkpoint
        if _PLAIN not in workspace.done:
            workspace.write(_PLAIN, plain_tensors(self.network(config.precisions[0]), checkpoint))
        left = [layer for layer in self.plan.linears if layer.name not in workspace.done]
        if not left:
            return
        weights = None
        if config.calibration is not None:
            weights = sensitivities(config, checkpoint, self.plan, workspace.scratch, quiet=quiet)
        for layer in track(left, step="quantize", total=len(left), quiet=quiet):
            quantizer = AnyPrecisionQuantizer(
                precisions=layer.precisions,
                parent=layer.parent,
                # A layer with one precision is best clustered at it; the others must have room to be cut.
                seed=min(config.seed_precision, layer.parent) if layer.module.nested else layer.parent,
                groups=layer.module.groups,
            )
            parts = {name: checkpoint.tensor(name) for name in layer.weight_names}
            try:
                quantized = quantizer.quantize(layer.weight(parts), None if weights is None else layer.weight(weights))
            except PmpdError as error:
                raise PmpdError(f"layer {layer.name}: {error}") from None
            workspace.write(layer.name, layer.tensors(quantized, checkpoint))

    def _verify(self, bundle: Bundle, *, quiet: bool) -> dict[str, Agreement]:
        ids = verification_ids(bundle)
        results = {"float32 graph against transformers": verify_float_graph(self.checkpoint, self.family, ids)}
        checks = verify_bundle(bundle, self.checkpoint, self.family, self.plan, ids)
        runs = kernel_checks(bundle.manifest)
        total = len(self.config.precisions) * (1 + len(runs)) + 1
        results |= dict(track(checks, step="verify", total=total, quiet=quiet))
        if unchecked := sorted(bundle.manifest.kernels.keys() - {target for target, _ in runs}):
            log.info("not checked, as this machine cannot run them: kernels for %s", ", ".join(unchecked))
        require_agreement(results)
        return results

    def _manifest(self, workspace: Workspace) -> Manifest:
        kernels = built_kernels(self.config.targets, workspace)
        return self.manifest(workspace.path, workspace.files(), kernels=kernels)


def export_bundle(config: ExportConfig, *, quiet: bool = True) -> Manifest:
    """Export a model as `config` says; return the bundle's manifest. Raises as `Export.prepare` and `Export.run` do."""
    return Export.prepare(config).run(quiet=quiet)
