"""The export, step by step: read, plan, calibrate, quantize, build graphs, verify, publish."""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pmpd.exporter.allocate import allocate
from pmpd.exporter.arch import read_family
from pmpd.exporter.bundle.card import CARD, model_card
from pmpd.exporter.bundle.coarse import basis_of, coarse_tensors
from pmpd.exporter.bundle.destination import check_output
from pmpd.exporter.bundle.fingerprint import WEIGHTS_CODE, code_digest, fingerprint
from pmpd.exporter.bundle.kernels import build_kernels, built_kernels
from pmpd.exporter.bundle.layers import LinearLayer, checkpoint_shapes, plain_tensors
from pmpd.exporter.bundle.plan import WeightPlan
from pmpd.exporter.bundle.workspace import Workspace, bytes_on_disk
from pmpd.exporter.calibrate.collect import calibration_pieces, collect_statistics
from pmpd.exporter.calibrate.store import StatisticsStore
from pmpd.exporter.calibrate.sweep import fast_dtype
from pmpd.exporter.config import BUILT_IN, NO_TEXT, OWN_TEXT, PLAIN_METHOD, ExportConfig, ResolvedConfig
from pmpd.exporter.memory import peak_memory
from pmpd.exporter.nn import BitplaneLogits
from pmpd.exporter.outline import Outline, coarse_bits, file_entry
from pmpd.exporter.quantize import METHODS, Method, NestedCodes
from pmpd.exporter.quantize.losses import predicted_losses
from pmpd.exporter.quantize.moments import one_thread_each
from pmpd.exporter.quantize.native import require_compiled
from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.source.opening import open_checkpoint
from pmpd.exporter.source.reference import load_model
from pmpd.exporter.source.tokenizer import copy_text_files
from pmpd.exporter.tune import Coded, Tuner, rate
from pmpd.exporter.verify.agreement import Check, require_passed
from pmpd.exporter.verify.bundle import Verification, summarize
from pmpd.exporter.verify.float_graph import FloatGraph
from pmpd.exporter.verify.quality import Sample
from pmpd.exporter.verify.texts import text_ids
from pmpd.runtime.console.output import byte_text
from pmpd.runtime.console.progress import track
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import MissingExtraError, PmpdError
from pmpd.runtime.format.bitplanes import unpack
from pmpd.runtime.format.bundle import Bundle, sha256_of
from pmpd.runtime.format.manifest import MANIFEST_NAME, Manifest
from pmpd.runtime.format.precision import describe_mix
from pmpd.tvm_kernels import require_toolchain

__all__ = ["Export", "export_bundle"]

Result = TypeVar("Result")
log = logging.getLogger(__name__)
_PLAIN = "plain tensors"
CALIBRATED = 3_000_000_000
"""Parameters up to which calibration is the default: a larger model takes hours, and tens of gigabytes."""

TUNED = 2_000_000_000
"""Parameters up to which codebooks are tuned by default: each precision takes as long as a pass of training."""

MAX_WORKERS = 4
"""Layers that are quantized at a time, at most: each takes memory for its statistics."""


@dataclass(frozen=True)
class Export:
    """An export that has been planned and not yet done; nothing is written before `run`.

    Attributes:
        outline: the bundle, as far as it is decided without weights.
        checkpoint: the opened checkpoint.
        fingerprint: names the unfinished work of this export, and of no other one.
    """

    outline: Outline
    checkpoint: Checkpoint
    fingerprint: str

    @classmethod
    def prepare(cls, config: ExportConfig) -> Export:
        """Check everything that can be checked before work.

        Raises:
            MissingExtraError: TVM or a compiler for a target that was asked for is not installed.
            PmpdError: the model is not found or not supported, the output exists, or the disk is too small.
        """
        resolved = config.resolve()
        check_output(resolved.output, overwrite=resolved.overwrite)
        for target in resolved.targets if resolved.kernels_required else ():
            require_toolchain(target)
        # What cannot be exported is refused before gigabytes of it are fetched.
        accept = partial(read_family, context_length=resolved.context_length)
        checkpoint = open_checkpoint(resolved.model, revision=resolved.revision, accept=accept)
        outline = Outline.of(resolved, checkpoint.source, checkpoint.config)
        if config.calibration is None and (reason := _why_not_calibrated(outline, checkpoint)) is not None:
            if config.method is not None:
                raise PmpdError(f"method {config.method} needs statistics, but {reason}")
            log.warning("warning   quantized without statistics, which costs quality below 5 bits: %s", reason)
            plain = replace(config, method=PLAIN_METHOD, calibration=NO_TEXT).resolve()
            outline = Outline.of(plain, checkpoint.source, checkpoint.config)
        if config.tune and checkpoint.tokenizer() is None:
            raise PmpdError(f"{checkpoint.path} has no tokenizer for a text to tune codebooks on: leave out --tune")
        if config.tune is None and (outline.parameters > TUNED or checkpoint.tokenizer() is None):
            outline = replace(outline, config=replace(outline.config, tune=()))
        for name, shape in checkpoint_shapes(outline.network):
            checkpoint.require(name, shape)  # a missing one is better found now than in an hour
        export = cls(outline, checkpoint, _fingerprint(outline, checkpoint))
        for layer in outline.plan.layers:
            export.method(layer)  # so is an option that the method cannot work with
        export._require_room()
        export._warn()
        return export

    @property
    def config(self) -> ResolvedConfig:
        """The configuration."""
        return self.outline.config

    @property
    def plan(self) -> WeightPlan:
        """The layout of the weight file."""
        return self.outline.plan

    def _require_room(self) -> None:
        output = self.config.output
        folder = next((folder for folder in output.absolute().parents if folder.exists()), Path("/"))
        free, need = shutil.disk_usage(folder).free, self.plan.size - bytes_on_disk(output, self.fingerprint)
        if free < need:
            raise PmpdError(
                f"{folder} has {byte_text(free)} free, the bundle takes {byte_text(need)} more: make room, or choose "
                "another --output"
            )

    def _warn(self) -> None:
        """Say what the user may not expect of this export."""
        size, before = self.plan.size, self.checkpoint.nbytes
        if size > before:
            log.warning(
                "warning   the bundle (%s) is larger than the checkpoint (%s): choose lower precisions",
                byte_text(size),
                byte_text(before),
            )
        if self.config.targets and self.config.groups > 1:
            log.warning(
                "warning   groups %d: only the generic kernel takes several codebooks per row, and it is many times "
                "slower than the others",
                self.config.groups,
            )

    def describe(self) -> list[str]:
        """Return the plan in lines for a person."""
        memory = peak_memory(self.outline, self.checkpoint.tensor_nbytes, workers=self._workers)
        return [
            *self.outline.describe(),
            *self.checkpoint.describe(),
            f"method    {self._quantizer()}",
            f"kernels   {self._kernels()}",
            f"needs     {byte_text(self.plan.size)} of disk, about {byte_text(memory)} of memory",
        ]

    @property
    def kernel_precisions(self) -> tuple[int, ...]:
        """Bits of all weights that a kernel may meet, high to low."""
        coarse = coarse_bits(self.config, self.outline.family)
        met = {*self.config.planes, self.config.head_precision, *(() if coarse is None else (coarse,))}
        return tuple(sorted(met, reverse=True))

    def _quantizer(self) -> str:
        config = self.config
        texts = {None: "without a text", BUILT_IN: "on the built-in text", OWN_TEXT: "on text of the model's own"}
        text = f"on {config.calibration.name}" if isinstance(config.calibration, Path) else texts[config.calibration]
        pieces = f", {config.calibration_samples} pieces of {config.calibration_length} tokens"
        tuned = f"; codebooks of {'/'.join(map(str, config.tune))} bits tuned end to end" if config.tune else ""
        return f"{config.method}, {text}{pieces if config.calibration else ''}{tuned}"

    def _kernels(self) -> str:
        config = self.config
        bits = "/".join(map(str, self.kernel_precisions))
        speed = "" if config.groups == 1 else ", generic (slow)"
        return f"{', '.join(config.targets)}: {config.accuracy}{speed}, {bits} bits" if config.targets else "none"

    def run(self) -> Manifest:
        """Do the export; steps that an earlier, interrupted one finished are not done again.

        Raises:
            PmpdError: the checkpoint is damaged, or the verification fails; nothing is published then.
        """
        config = self.config
        with Workspace.open(config.output, self.fingerprint, self.plan, overwrite=config.overwrite) as workspace:
            if workspace.done:
                steps = len(self.plan.layers) + 1 + len(config.targets)
                log.info("resuming  %d of %d steps are done", len(workspace.done), steps)
            self._build_kernels(workspace)
            copy_text_files(self.checkpoint, workspace.path)
            self._quantize(workspace)
            self._tune(workspace)
            outline = replace(self.outline, mixes=self._mixes(workspace))
            outline.write_graphs(workspace.path)
            kernels = built_kernels(config.targets, workspace)
            card = workspace.path / CARD
            card.unlink(missing_ok=True)  # of an earlier run; it lists the other files
            manifest = outline.manifest(workspace.path, workspace.files(), kernels=kernels)
            bundle = Bundle(workspace.path, manifest)
            if config.verify:
                manifest = self._verify(bundle, workspace)
            card.write_text(model_card(manifest, name=config.output.name), encoding="utf-8")
            manifest = replace(manifest, files=manifest.files | {CARD: file_entry(card)})
            (workspace.path / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
            workspace.publish()
        return manifest

    def _build_kernels(self, workspace: Workspace) -> None:
        head_dim = self.outline.family.shape.head.slots
        try:
            build_kernels(self.config.targets, self.kernel_precisions, head_dim, workspace)
        except MissingExtraError as error:
            if self.config.kernels_required:
                raise
            log.warning("kernels   skipped, the bundle will run slowly: %s, then export again with --overwrite", error)

    def _quantize(self, workspace: Workspace) -> None:
        checkpoint = self.checkpoint
        if _PLAIN not in workspace.done:
            workspace.write(_PLAIN, plain_tensors(self.outline.network, checkpoint))
        left = [layer for layer in self.plan.layers if layer.name not in workspace.done]
        if not left:
            return
        statistics = self.statistics()
        quantizing = self.side_by_side(lambda layer: self.quantized(layer, statistics), left)
        for layer, quantized in track(quantizing, step="quantize", total=len(left)):
            tensors, losses = layer.tensors(quantized, checkpoint), None
            if self.config.mixes and layer.module.nested:
                losses = self._losses(layer, quantized, statistics)
            if isinstance(layer.module, BitplaneLogits):
                basis = self._basis(workspace, layer.module.basis.shape[0])
                coarse = coarse_tensors(layer.name, quantized, layer.parent, layer.module.coarse, basis)
                tensors = chain(tensors, coarse)
            workspace.write(layer.name, tensors, note=losses)

    def _tune(self, workspace: Workspace) -> None:
        """Learn the codebooks of precisions end to end, one precision after the other."""
        steps, text = {f"tune {bits} bits": bits for bits in self.config.tune}, self.config.calibration
        left = {step: bits for step, bits in steps.items() if step not in workspace.done}
        if not left or text is None:
            return
        if text == OWN_TEXT:
            text = BUILT_IN  # the model would have to write once more
        pieces = calibration_pieces(self.config, text, self.checkpoint.tokenizer())
        tuner = Tuner(load_model(self.checkpoint, blocks_as_stored=True), pieces, fast_dtype())
        for step, bits in left.items():
            books = workspace.kept(step)  # by a run that was killed while it wrote them to their places
            if books is None:
                layers = {layer.name: (layer, self._coded(workspace, layer, bits)) for layer in self._nested}
                tuned = tuner.tune(layers, rate=rate(bits), progress=partial(track, step=step))
                after = "near enough as it is" if tuned.after is None else f"{tuned.after:.3g} after"
                log.info("tuned     %d bits: KL %.3g before, %s", bits, tuned.before, after)
                books = tuned.codebooks
                workspace.keep(step, books)
            workspace.write(step, ((self.plan.codebook(layer, bits).name, book) for layer, book in books.items()))

    def _coded(self, workspace: Workspace, layer: LinearLayer, bits: int) -> Coded:
        planes = workspace.read(self.plan.planes(layer.name))[:bits]
        return unpack(planes, layer.module.in_features), workspace.read(self.plan.codebook(layer.name, bits))

    def side_by_side(
        self, function: Callable[[LinearLayer], Result], layers: Sequence[LinearLayer]
    ) -> Iterator[tuple[LinearLayer, Result]]:
        """Yield layers and what a function makes of them, in order; threads work on some at a time, and one waits."""
        waiting: deque[tuple[LinearLayer, Future[Result]]] = deque()
        with one_thread_each(self._workers) as pool:
            try:
                for layer in layers:
                    waiting.append((layer, pool.submit(function, layer)))
                    if len(waiting) > self._workers:
                        first, future = waiting.popleft()
                        yield first, future.result()
                for first, future in waiting:
                    yield first, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()

    @property
    def _nested(self) -> list[LinearLayer]:
        """The layers that have several precisions."""
        return [layer for layer in self.plan.linears if layer.module.nested]

    @property
    def _workers(self) -> int:
        """Layers that are quantized at a time: one if the method spreads it over all cores."""
        return min(available_threads(), MAX_WORKERS) if "guided" in METHODS[self.config.method].needs else 1

    def _losses(
        self, layer: LinearLayer, quantized: NestedCodes, statistics: StatisticsStore | None
    ) -> dict[int, float]:
        """Return what a layer adds to the model's loss at each number of planes.

        Raises:
            PmpdError: no statistics of the layer can tell.
        """
        losses, begin = dict.fromkeys(quantized.codebooks, 0.0), 0
        for part, name in enumerate(layer.weight_names):
            weight, scale = layer.part_weight(part, self.checkpoint.tensor(name)), layer.module.parts[part].scale
            rows = slice(begin, begin + len(weight))
            codes = NestedCodes(quantized.codes[rows], {p: book[rows] for p, book in quantized.codebooks.items()})
            known = {} if statistics is None else statistics.of(layer, part)
            try:
                of_part = predicted_losses(weight, codes, layer.parent, known)
            except PmpdError as error:
                raise PmpdError(f"tensor {name!r}: {error}") from None
            for planes, loss in of_part.items():
                losses[planes] += loss / scale**2  # gradients are those of what is not scaled yet
            begin = rows.stop
        return losses

    def _mixes(self, workspace: Workspace) -> dict[str, dict[str, int]]:
        """Return how many planes each mix reads of each nested layer, which all are quantized.

        Raises:
            PmpdError: no choice comes near a precision.
        """
        sizes = {layer.name: self.plan.planes(layer.name).length // layer.parent for layer in self._nested}
        mixes = {}
        for precision in self.config.mixes:
            losses = {name: {int(planes): loss for planes, loss in workspace.done[name].items()} for name in sizes}
            mixes[str(precision)] = allocate(losses, sizes, precision)
            log.info("mix       %s: %s", precision, describe_mix(mixes[str(precision)]))
        return mixes

    def statistics(self) -> StatisticsStore | None:
        """Return the statistics that the method uses, from the user's cache or computed now; None without calibration.

        Raises:
            PmpdError: as `collect_statistics`.
        """
        if self.config.calibration is None:
            return None
        return collect_statistics(self.config, self.config.calibration, self.checkpoint, self.plan.linears)

    def quantized(self, layer: LinearLayer, statistics: StatisticsStore | None, **options: Any) -> NestedCodes:
        """Return a layer of the plan, quantized part by part.

        Args:
            options: of the method, other than an export has.

        Raises:
            PmpdError: a weight is not finite, or statistics are damaged.
        """
        method, parts = self.method(layer, **options), []
        for part, name in enumerate(layer.weight_names):
            no_product = layer is self.plan.embedding
            known = {} if statistics is None or no_product else statistics.of(layer, part)
            try:
                parts.append(method.quantize(layer.part_weight(part, self.checkpoint.tensor(name)), known))
            except PmpdError as error:
                raise PmpdError(f"tensor {name!r}: {error}") from None
        return NestedCodes.stack(parts)

    def method(self, layer: LinearLayer, **options: Any) -> Method:
        """Return what quantizes a layer.

        Raises:
            PmpdError: the method cannot work with the options, or lacks something on this machine.
        """
        config = self.config
        # Statistics are of products, and a table has none: its rows are clustered as they are.
        settings: dict[str, Any] = {
            "precisions": layer.precisions,
            "parent": layer.parent,
            # A layer with one precision is best clustered at it, one that is read coarsely at what all rows are read
            # at; the others must have room to be cut.
            "seed": min(config.seed_precision, layer.parent) if layer.module.nested else layer.precisions[-1],
            "groups": layer.module.groups,
        }
        return METHODS[PLAIN_METHOD if layer is self.plan.embedding else config.method](**settings | options)

    def _basis(self, workspace: Workspace, directions: int) -> npt.NDArray[np.float32]:
        """Return the directions that the output layer's inputs have, measured on a text of our own."""
        ids = text_ids(workspace.path, self.outline.family.shape)
        return basis_of(FloatGraph(self.checkpoint, self.outline.family).hidden(ids), directions)

    def _verify(self, bundle: Bundle, workspace: Workspace) -> Manifest:
        """Return the bundle's manifest with what was checked and measured."""
        checks: list[Check] = []
        try:
            sample = Sample.of(bundle, self.checkpoint, self.config)
            verification = Verification(
                bundle, self.checkpoint, self.outline.family, self.plan, sample, self.config.optional
            )
            for check in track(verification, step="verify", total=len(verification)):
                require_passed(check)
                log.debug("verified  %s: %s", check.name, check)
                checks.append(check)
            checked = {target for target, _ in verification.libraries}
            if unchecked := sorted(bundle.manifest.kernels.keys() - checked):
                log.info("not checked, as this machine cannot run them: kernels for %s", ", ".join(unchecked))
        except PmpdError as error:
            raise PmpdError(
                f"{error}; {workspace.folder} keeps the quantized weights ({byte_text(self.plan.size)}) for the next "
                "run of this export: delete it if there will be none"
            ) from None
        log.info("verified  %s", summarize(checks))
        for check in checks:
            if check.warning:
                log.warning("%s", check.warning)
        manifest = replace(
            bundle.manifest,
            verified=True,
            verification={check.name: check.to_json() for check in checks},
            quality=verification.quality,
        )
        return _without(verification.useless, manifest, workspace)


def _without(precisions: Sequence[float], manifest: Manifest, workspace: Workspace) -> Manifest:
    """Take precisions out of a bundle: their decode graphs, and what the manifest says of them."""
    graphs = [graph for graph in manifest.graphs if graph.phase == "decode" and graph.precision in precisions]
    for graph in graphs:
        (workspace.path / graph.file).unlink()
    assert manifest.quality is not None
    measured = [quality for quality in manifest.quality.precisions if quality.precision not in precisions]
    return replace(
        manifest,
        precisions=tuple(bits for bits in manifest.precisions if bits not in precisions),
        graphs=tuple(graph for graph in manifest.graphs if graph not in graphs),
        files={name: entry for name, entry in manifest.files.items() if name not in {g.file for g in graphs}},
        quality=replace(manifest.quality, precisions=tuple(measured)),
    )


def _why_not_calibrated(outline: Outline, checkpoint: Checkpoint) -> str | None:
    """Return why there are no statistics by default; None if there are, or if the method has no use for them."""
    if outline.config.calibration is None:
        return None
    if checkpoint.tokenizer() is None:
        return "the checkpoint has no tokenizer"
    if outline.parameters > CALIBRATED:
        size = outline.parameters / 1e9
        return f"with {size:.1f} G parameters they take hours: add --calibration {BUILT_IN} if you can wait"
    try:
        require_compiled()
    except MissingExtraError as error:
        return str(error)
    return None


def _fingerprint(outline: Outline, checkpoint: Checkpoint) -> str:
    """Return what tells exports apart whose unfinished work must not be mixed."""
    config = outline.config
    # What does not change the weights is not part of it, so that another choice of it reuses them.
    choices = config.to_json() | dict.fromkeys(("targets", "accuracy", "schedule", "prefill"))
    text = sha256_of(config.calibration) if isinstance(config.calibration, Path) else config.calibration
    table = [asdict(tensor) for tensor in outline.plan.tensors.values()]
    return fingerprint(choices, text, checkpoint.identity(), table, code_digest(WEIGHTS_CODE), version("pmpd"))


def export_bundle(config: ExportConfig) -> Manifest:
    """Export a model as `config` says; return the bundle's manifest. Raises as `Export.prepare` and `Export.run` do."""
    return Export.prepare(config).run()
