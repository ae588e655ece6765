"""What an export checks of itself before it publishes: every node against float64, and every graph as a whole.

A node's error bound follows from its own numbers, so it is sharp at any depth. A whole network amplifies rounding by a
factor that differs from model to model and from precision to precision; it is measured on the spot, by running the
graph with noise of the size of that rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

from pmpd.exporter.arch import Family
from pmpd.exporter.bundle.plan import WeightPlan
from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.verify.agreement import MEAN_KL, Check, Distance, Figure, compare
from pmpd.exporter.verify.coarse import coarse_check, coarse_node
from pmpd.exporter.verify.dequantized import DequantizedWeights, checkpoint_weights
from pmpd.exporter.verify.float_graph import FloatGraph
from pmpd.exporter.verify.nodes import NodeErrors, Subject, node_errors
from pmpd.exporter.verify.noise import portable_noise, product_errors
from pmpd.exporter.verify.probe import ExposedGraph
from pmpd.exporter.verify.quality import QualityMeter, Sample
from pmpd.exporter.verify.reference import reference_logits
from pmpd.runtime import Bundle, Tokenizer
from pmpd.runtime.engine.kernels import KernelLibrary
from pmpd.runtime.format.quality import PrecisionQuality, Quality
from pmpd.runtime.format.targets import machine_targets

__all__ = ["Verification", "summarize", "verification_ids"]

Floats = npt.NDArray[np.float32]

# Long enough to exercise attention, short enough for the portable function body on a large model.
POSITIONS = 32
STEPS = 4  # of them are run one by one, the others together: kernels differ in both
TEXT = (
    "Rivers shape the land they cross. Over thousands of years the water carries sand and stones from the hills to the "
    "sea, and where it slows down it leaves them behind. Towns grew on such plains, because the soil is rich there."
)
# Mean KL from the unquantized model, in nats: its perplexity on its own text is e times as high.
UNUSABLE_KL = 1.0
NODE_ERROR = "largest error of a node, in units of its rounding bound"


def verification_ids(bundle: Bundle) -> list[int]:
    """Return the tokens to check with: a text in the model's own tokens, random ids for a model without tokenizer."""
    manifest = bundle.manifest
    count = min(POSITIONS, manifest.context_length)
    if "tokenizer.json" in manifest.files:
        ids = [i for i in Tokenizer.from_bundle(bundle).encode(TEXT) if i < manifest.architecture.vocab_size]
        if ids:
            return ids[:count]
    return [int(i) for i in np.random.default_rng(0).integers(0, manifest.architecture.vocab_size, count)]


@dataclass
class Verification:
    """The checks of one bundle.

    Attributes:
        bundle: the bundle, complete but for its model card.
        checkpoint: what it was made from.
        family: the architecture.
        plan: the layout of its weights.
        sample: the text on which the cost of quantization is measured.
        optional: precisions that the bundle can do without.
        quality: that cost, once all checks are done.
        useless: those of `optional` that are of no use, then.
    """

    bundle: Bundle
    checkpoint: Checkpoint
    family: Family
    plan: WeightPlan
    sample: Sample
    optional: Collection[float] = ()
    quality: Quality | None = field(init=False, default=None)
    useless: list[float] = field(init=False, default_factory=list)

    @cached_property
    def ids(self) -> list[int]:
        """The text that everything is checked with."""
        return verification_ids(self.bundle)

    @property
    def libraries(self) -> list[tuple[str, str]]:
        """Target and accuracy of every kernel library as this machine can run it. Exact ones are always checked."""
        manifest = self.bundle.manifest
        here = [target for target in machine_targets() if target in manifest.kernels]
        return list(product(here, dict.fromkeys(("exact", manifest.accuracy))))

    def __len__(self) -> int:
        coarse = any(tensor.role == "bound" for tensor in self.bundle.manifest.tensors)
        return 2 + len(self.bundle.manifest.precisions) * (3 + (2 + coarse) * len(self.libraries))

    def __iter__(self) -> Iterator[Check]:
        """Do the checks one by one.

        Raises:
            KernelError: a library does not load.
            PmpdError: weights are not those of the checkpoint.
        """
        unquantized, of_sample = self._reference(checkpoint_weights(self.checkpoint, self.family))
        meter = QualityMeter(self.sample, of_sample)
        yield self._float_graph(unquantized)
        for precision in self.bundle.manifest.precisions:
            yield from self._precision(precision, meter)
        self.quality = meter.quality

    def _reference(self, weights: Callable[[str], torch.Tensor]) -> tuple[Floats, Floats]:
        """Return transformers' logits with some weights: of the text ``[T, V]`` and of the sample ``[W, L, V]``.

        They are one batch, so that the weights are loaded once. What fills up the text changes nothing before it.
        """
        inputs = self.sample.inputs
        text = np.resize(self.ids, (1, inputs.shape[1]))
        config = self.family.reference_config(self.checkpoint.config)
        logits = reference_logits(config, weights, np.concatenate([text, inputs]))
        return logits[0, : len(self.ids)].copy(), logits[1:]

    def _float_graph(self, unquantized: Floats) -> Check:
        graph = FloatGraph(self.checkpoint, self.family)
        logits = graph.logits(self.ids)
        floor = Distance.of(graph.logits(self.ids, noisy=True), logits)
        return compare("float32 graph against transformers", logits, unquantized, floor=floor)

    def _precision(self, precision: float, meter: QualityMeter) -> Iterator[Check]:
        """Check the decode graph of a precision, in its portable form and with every kernel library.

        Noise is run with the exact kernels of the best target, if there are any, after their nodes have passed: it
        shows how much the model amplifies rounding, whoever computes it, and the portable body is far slower.
        """
        manifest = self.bundle.manifest
        graph = manifest.graph("decode", precision)
        norms = {t.name: self.bundle.tensor(t) for t in manifest.tensors if t.role == "norm" and t.dtype == "float32"}
        split = max(len(self.ids) - STEPS, 1)
        together, steps = self.ids[:split], self.ids[split:]
        with ExposedGraph(self.bundle, graph, replaceable=list(norms)) as exposed:
            node, coarse = coarse_node(exposed.nodes), list[Check]()
            probe = exposed.open()
            runs = [probe.run([part for part in (together, steps) if part])]
            for target, accuracy in self.libraries:
                kernels = exposed.open(self._library(target, accuracy))
                runs.append(kernels.run([together, *([i] for i in steps)]))
                probe = kernels if len(runs) == 2 else probe
                if node is not None:
                    pieces = [[i] for i in self.ids]
                    pair = kernels.run(pieces), kernels.run(pieces, margin=0.0)
                    name = f"coarse logits of {accuracy} {target} kernels at {precision} bits"
                    coarse.append(coarse_check(name, self.bundle, node, *pair, accuracy=accuracy))
        accuracies = (None, *(accuracy for _, accuracy in self.libraries))
        errors = node_errors(self.bundle, exposed.nodes, list(map(Subject, runs, accuracies)))
        portable, calm = runs[0].logits, runs[:2][-1].logits

        yield _nodes(f"nodes of the portable graph at {precision} bits", errors[0])
        for (target, accuracy), error in zip(self.libraries, errors[1:], strict=True):
            yield _nodes(f"nodes of {accuracy} {target} kernels at {precision} bits", error)

        noisy = probe.run([self.ids], noisy=portable_noise(norms, exposed.widths, len(self.ids))).logits
        floor = Distance.of(noisy, calm)
        want, of_sample = self._reference(DequantizedWeights(self.bundle, self.checkpoint, self.plan, precision))
        yield compare(f"decode at {precision} bits against dequantized weights", portable, want, floor=floor)
        quality = meter.measure(precision, of_sample)
        del of_sample  # hundreds of MB
        yield self._quantization(quality)
        for (target, accuracy), run, error in zip(self.libraries, runs[1:], errors[1:], strict=True):
            name = f"{accuracy} {target} kernels at {precision} bits against portable graphs"
            note, allowance = "", floor
            if accuracy == "int8":
                off = product_errors(error.rounding, {name: runs[0].values[name].shape[1] for name in error.rounding})
                fed = {exposed.errors[name]: value[None] for name, value in off.items() if name in exposed.errors}
                noisy = probe.run([self.ids], noisy=fed).logits + off.get("logits", 0)
                allowance = Distance.of(noisy, calm)
                note = f"mean KL of the quantization itself {quality.kl:.2g}"
            yield compare(name, run.logits, portable, floor=allowance, note=note)
        yield from coarse
        if precision == manifest.prefill_precision:
            exact = self._library(*self.libraries[0]) if self.libraries else None
            with ExposedGraph(self.bundle, manifest.graph("prefill", precision)) as exposed:
                prefill = exposed.open(exact).run([self.ids])
            yield compare("prefill against decoding", prefill.logits[-1:], calm[-1:], floor=floor)

    def _quantization(self, quality: PrecisionQuality) -> Check:
        """Say how far quantization itself moves the model: it is no fault of the export, but its user must know."""
        warning, bits = "", quality.precision
        if quality.kl >= UNUSABLE_KL:
            remedy = "calibrate (--calibration) or leave this precision out (--precisions)"
            if bits in self.optional:
                self.useless.append(bits)
                remedy = f"it is left out; --precisions {','.join(map(str, self.bundle.manifest.precisions))} keeps it"
            warning = f"{bits} bits: {quality.kl:.1f} nats from the unquantized model: too far to be usable; {remedy}"
        return Check(
            name=f"decode at {bits} bits against the unquantized model",
            figures={MEAN_KL: Figure(quality.kl)},
            note=f"same most likely token at {quality.top1:.1%} of the positions",
            warning=warning,
        )

    def _library(self, target: str, accuracy: str) -> KernelLibrary:
        """Load a library."""
        return KernelLibrary(self.bundle.path / self.bundle.manifest.kernels[target], accuracy=accuracy)


def _nodes(name: str, errors: NodeErrors) -> Check:
    node, ratio = errors.worst()
    return Check(
        name=name,
        figures={NODE_ERROR: Figure(ratio, 1.0)},
        note=f"{len(errors.ratios)} nodes, the largest at {node}",
    )


def summarize(checks: Sequence[Check]) -> str:
    """Return in one line what the checks of a bundle measured, all of which passed."""
    worst = max(check.figures[NODE_ERROR].value for check in checks if NODE_ERROR in check.figures)
    return f"{len(checks)} checks passed: worst node at {worst:.2g} of its rounding bound"
