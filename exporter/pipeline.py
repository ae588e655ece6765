"""The export, step by step: read, plan, calibrate, quantize, build graphs, verify, publish."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from pmpd.exporter.arch import Decoder, Family, read_family
from pmpd.exporter.calibrate import sensitivities
from pmpd.exporter.card import model_card
from pmpd.exporter.checkpoint import Checkpoint
from pmpd.exporter.config import ExportConfig
from pmpd.exporter.functions import BITPLANE_MATMUL
from pmpd.exporter.graphs import Phase, build_graph
from pmpd.exporter.kernels import build_kernels, built_kernels, wanted_targets
from pmpd.exporter.nn import BitplaneLinear
from pmpd.exporter.progress import track
from pmpd.exporter.quantize import AnyPrecisionQuantizer
from pmpd.exporter.tokenizer import copy_text_files
from pmpd.exporter.verify import (
    Agreement,
    kernel_checks,
    require_agreement,
    verification_ids,
    verify_bundle,
    verify_float_graph,
    verify_kernels,
)
from pmpd.exporter.weights import WeightPlan, checkpoint_shapes, external_tensor, plain_tensors, plan_weights
from pmpd.exporter.workspace import Workspace, fingerprint
from pmpd.runtime.bundle import Bundle, sha256_of
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.manifest import MANIFEST_NAME, Architecture, FileEntry, Graph, KvContract, Manifest

__all__ = ["Export", "export_bundle"]

log = logging.getLogger(__name__)
_PLAIN = "plain tensors"


@dataclass(frozen=True)
class Export:
    """An export that has been planned and not yet done; nothing is written before `run`.

    Attributes:
        config: the resolved configuration.
        checkpoint: the opened checkpoint.
        family: its architecture.
        plan: the layout of the weight file.
    """

    config: ExportConfig
    checkpoint: Checkpoint
    family: Family
    plan: WeightPlan

    @classmethod
    def prepare(cls, config: ExportConfig) -> Export:
        """Check everything that can be checked before work.

        Raises:
            PmpdError: the model is not found or not supported, the output exists, or the disk is too small.
        """
        config = config.resolved()
        if config.output.exists():
            if not config.overwrite:
                raise PmpdError(f"{config.output} exists: choose another --output, or replace it with --overwrite")
            if not (config.output / MANIFEST_NAME).is_file():
                raise PmpdError(
                    f"{config.output} is no bundle, and --overwrite replaces nothing else: choose another --output"
                )
        checkpoint = Checkpoint.open(config.model, revision=config.revision)
        family = read_family(checkpoint.config, context_length=config.context_length)
        network = _network(config, family, config.precisions[0])
        plan = plan_weights(network, config.precisions, config.parent or 0)
        for name, shape in checkpoint_shapes(network):
            checkpoint.tensor(name, shape)  # a missing one is better found now than in an hour
        export = cls(config, checkpoint, family, plan)
        existing = next((folder for folder in config.output.absolute().parents if folder.exists()), Path("/"))
        free = shutil.disk_usage(existing).free
        if free < plan.size:
            raise PmpdError(f"{existing} has {free / 1e9:.1f} GB free, the bundle takes {plan.size / 1e9:.1f} GB")
        return export

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        linear = sum(layer.module.out_features * layer.module.in_features for layer in self.plan.linears)
        shape = self.family.shape
        return linear + (0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size)

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
        config, shape, plan = self.config, self.family.shape, self.plan
        graph = build_graph(_network(config, self.family, config.precisions[0]), phase="decode", producer="").graph
        last = f"model/layers.{shape.layers - 1}/"
        a_layer = sum((node.name or "").startswith(last) for node in graph)
        products = sum(node.op_type == BITPLANE_MATMUL for node in graph)
        rest = plan.size - plan.plane_bytes - plan.codebook_bytes
        return [
            f"model     {config.model}: {self.family.model_type}, {self.parameters / 1e6:,.1f} M parameters, "
            f"{shape.layers} layers, context {shape.context_length}",
            f"bundle    {config.output}: {_bits(config.precisions)} bits from {config.parent} planes, "
            f"prefill at {config.prefill}, head at {config.head_precision}, schedule {config.schedule}",
            f"weights   {plan.size / 1e6:,.1f} MB: planes {plan.plane_bytes / 1e6:,.1f}, "
            f"codebooks {plan.codebook_bytes / 1e6:,.1f}, embedding and the rest {rest / 1e6:,.1f}",
            f"graphs    {len(config.precisions) + 1} of {len(graph)} nodes, {a_layer} a layer, "
            f"{products} {BITPLANE_MATMUL}",
            f"kernels   {self._kernels()}",
            f"needs     {plan.size / 1e9:.2f} GB of disk, about {self.peak_memory / 1e9:.1f} GB of memory",
        ]

    @property
    def kernel_precisions(self) -> tuple[int, ...]:
        """Bits of all weights that a kernel may meet, high to low."""
        return tuple(sorted({*self.config.precisions, self.config.head_precision}, reverse=True))

    def _kernels(self) -> str:
        targets = ", ".join(wanted_targets(self.config.targets))
        return f"{targets}: {self.config.accuracy}, {_bits(self.kernel_precisions)} bits" if targets else "none"

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
            for phase, precision in self._graphs():
                self._write_graph(workspace.path, phase, precision)
            manifest = self._manifest(workspace)
            results = self._verify(Bundle(workspace.path, manifest), quiet=quiet)
            (workspace.path / "README.md").write_text(
                model_card(manifest, results, name=config.output.name), encoding="utf-8"
            )
            manifest = replace(
                self._manifest(workspace),
                verification={check: asdict(agreement) for check, agreement in results.items()},
            )
            (workspace.path / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
            workspace.publish()
        return manifest

    def _quantize(self, workspace: Workspace, *, quiet: bool) -> None:
        config, checkpoint = self.config, self.checkpoint
        if _PLAIN not in workspace.done:
            network = _network(config, self.family, config.precisions[0])
            workspace.write(_PLAIN, plain_tensors(network, checkpoint))
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

    def _graphs(self) -> Iterable[tuple[Phase, int]]:
        yield "prefill", self.config.prefill or 0
        for precision in self.config.precisions:
            yield "decode", precision

    def _write_graph(self, folder: Path, phase: Phase, precision: int) -> None:
        network = _network(self.config, self.family, precision)
        model = build_graph(network, phase=phase, producer=_producer())
        for name, value in model.graph.initializers.items():
            if name in self.plan.tensors:
                value.const_value = external_tensor(self.plan.tensors[name], planes=precision)
        (folder / _graph_file(phase, precision)).write_bytes(ir.to_proto(model).SerializeToString())

    def _verify(self, bundle: Bundle, *, quiet: bool) -> dict[str, Agreement]:
        ids = verification_ids(bundle)
        results = {"float32 graph against transformers": verify_float_graph(self.checkpoint, self.family, ids)}
        checks = verify_bundle(bundle, self.checkpoint, self.family, self.plan, ids)
        results |= dict(track(checks, step="verify", total=len(self.config.precisions) + 1, quiet=quiet))
        if runs := kernel_checks(bundle.manifest):
            results |= dict(
                track(verify_kernels(bundle, ids, runs), step="verify kernels", total=len(runs), quiet=quiet)
            )
        if unchecked := sorted(bundle.manifest.kernels.keys() - {target for _, target, _ in runs}):
            log.info("not checked, as this machine cannot run them: kernels for %s", ", ".join(unchecked))
        require_agreement(results)
        return results

    def _manifest(self, workspace: Workspace) -> Manifest:
        config, shape = self.config, self.family.shape
        return Manifest(
            producer=_producer(),
            source=self.checkpoint.source,
            architecture=Architecture(
                family=self.family.model_type,
                layers=shape.layers,
                hidden_size=shape.hidden_size,
                attention_heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head.size,
                vocab_size=shape.vocab_size,
                parameters=self.parameters,
            ),
            context_length=shape.context_length,
            precisions=config.precisions,
            parent_precision=config.parent or 0,
            prefill_precision=config.prefill or 0,
            schedule=config.schedule or "",
            kv_cache=KvContract(layers=shape.layers, heads=shape.kv_heads, head_dim=shape.head.slots, dtype="float16"),
            graphs=tuple(
                Graph(file=_graph_file(phase, precision), phase=phase, precision=precision)
                for phase, precision in self._graphs()
            ),
            tensors=tuple(self.plan.tensors.values()),
            files={
                file.relative_to(workspace.path).as_posix(): FileEntry(size=file.stat().st_size, sha256=sha256_of(file))
                for file in workspace.files()
            },
            configuration=config.to_json(),
            kernels=built_kernels(config.targets, workspace),
            accuracy=config.accuracy,
        )


def export_bundle(config: ExportConfig, *, quiet: bool = True) -> Manifest:
    """Export a model as `config` says; return the bundle's manifest. Raises as `Export.prepare` and `Export.run` do."""
    return Export.prepare(config).run(quiet=quiet)


def _network(config: ExportConfig, family: Family, precision: int) -> Decoder:
    linear = partial(BitplaneLinear, precision=precision, groups=config.groups)
    head = partial(BitplaneLinear, precision=config.head_precision, groups=config.groups, nested=False)
    return family.decoder(linear, head, embedding_type=ir.DataType.FLOAT16)


def _graph_file(phase: Phase, precision: int) -> str:
    return "prefill.onnx" if phase == "prefill" else f"decode-{precision}.onnx"


def _bits(precisions: Iterable[int]) -> str:
    return "/".join(map(str, precisions))


def _producer() -> str:
    return f"pmpd {version('pmpd')}"
