"""What an export checks of itself before it publishes: same logits as transformers, at every precision and phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import torch

from pmpd.exporter.arch import Family
from pmpd.exporter.bundle.layers import LinearLayer, parent_scope, plain_tensors
from pmpd.exporter.bundle.plan import WeightPlan
from pmpd.exporter.graph.build import build_graph
from pmpd.exporter.nn import FloatLinear
from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.verify.reference import reference_logits
from pmpd.runtime import Bundle, Generator, PmpdError, Tokenizer
from pmpd.runtime.format.bitplanes import dequantize
from pmpd.runtime.format.manifest import Manifest
from pmpd.runtime.format.targets import machine_targets

__all__ = [
    "Agreement",
    "float_graph_logits",
    "kernel_checks",
    "require_agreement",
    "verification_ids",
    "verify_bundle",
    "verify_float_graph",
]

# Long enough to exercise attention, short enough for the portable function body on a large model.
POSITIONS = 32
STEPS = 4
TEXT = (
    "Rivers shape the land they cross. Over thousands of years the water carries sand and stones from the hills to the "
    "sea, and where it slows down it leaves them behind. Towns grew on such plains, because the soil is rich there."
)
# The cosine of logits that are the same up to rounding: to float32, or to 8 bits in kernels of that accuracy. The
# latter gives 0.9997 for a trained model; random weights, through which every error grows, down to 0.988 (24 layers).
LEAST_COSINE = {"exact": 0.99999, "int8": 0.97}
_ROWS_AT_A_TIME = 4096
_IR_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


@dataclass(frozen=True)
class Agreement:
    """How well logits ``[T, V]`` agree with a reference.

    A position whose two best reference logits are closer than the largest difference is ambiguous: either is right.

    Attributes:
        positions: T.
        argmax_agreement: share of the unambiguous positions with the same most likely token.
        ambiguous: ambiguous positions.
        top10_overlap: mean share of the ten most likely tokens in common.
        cosine: lowest cosine over the positions.
        largest_difference: largest absolute difference of a logit.
        least_cosine: the cosine that counts as agreement.
    """

    positions: int
    argmax_agreement: float
    ambiguous: int
    top10_overlap: float
    cosine: float
    largest_difference: float
    least_cosine: float = LEAST_COSINE["exact"]

    @classmethod
    def of(
        cls, logits: npt.NDArray[np.float32], reference: npt.NDArray[np.float32], *, accuracy: str = "exact"
    ) -> Agreement:
        """Compare logits that were computed at an accuracy."""
        a, b = logits.astype(np.float64), reference.astype(np.float64)
        largest = float(np.abs(a - b).max())
        top2 = np.sort(b, axis=1)[:, -2:]
        clear = top2[:, 1] - top2[:, 0] > largest
        same = a.argmax(axis=1) == b.argmax(axis=1)
        count = min(10, a.shape[1])
        tops = zip(np.argsort(a)[:, -count:], np.argsort(b)[:, -count:], strict=True)
        cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        return cls(
            positions=len(a),
            argmax_agreement=float(same[clear].mean()) if clear.any() else 1.0,
            ambiguous=int((~clear).sum()),
            top10_overlap=float(np.mean([len(set(x) & set(y)) / count for x, y in tops])),
            cosine=float(cosine.min()),
            largest_difference=largest,
            least_cosine=LEAST_COSINE[accuracy],
        )

    @property
    def passed(self) -> bool:
        """Whether the logits are the same up to rounding."""
        return self.cosine >= self.least_cosine and self.argmax_agreement == 1.0

    def __str__(self) -> str:
        return (
            f"argmax {self.argmax_agreement:.0%} of {self.positions} positions ({self.ambiguous} ambiguous), "
            f"top-10 {self.top10_overlap:.1%}, cosine {self.cosine:.7f}, "
            f"largest difference {self.largest_difference:.2g}"
        )


def verification_ids(bundle: Bundle) -> list[int]:
    """Return the tokens to check with: a text in the model's own tokens, random ids for a model without tokenizer."""
    manifest = bundle.manifest
    count = min(POSITIONS, manifest.context_length)
    if "tokenizer.json" in manifest.files:
        ids = [i for i in Tokenizer.from_bundle(bundle).encode(TEXT) if i < manifest.architecture.vocab_size]
        if ids:
            return ids[:count]
    return [int(i) for i in np.random.default_rng(0).integers(0, manifest.architecture.vocab_size, count)]


def verify_float_graph(checkpoint: Checkpoint, family: Family, ids: Sequence[int]) -> Agreement:
    """Compare the network's graph over the checkpoint's own weights with transformers."""
    want = reference_logits(checkpoint.path, _tied(checkpoint.tensor, family), ids)
    return Agreement.of(float_graph_logits(checkpoint, family, ids), want)


def kernel_checks(manifest: Manifest) -> list[tuple[str, str]]:
    """Return target and accuracy of every kernel library as this machine can run it.

    Exact kernels are always checked: their tolerance is the tighter one.
    """
    here = [target for target in manifest.kernels if target in machine_targets()]
    return list(product(here, dict.fromkeys(("exact", manifest.accuracy))))


def verify_bundle(
    bundle: Bundle, checkpoint: Checkpoint, family: Family, plan: WeightPlan, ids: Sequence[int]
) -> Iterator[tuple[str, Agreement]]:
    """Compare each decode graph with transformers over the dequantized weights, and prefill with decoding in steps.

    That is of the graphs' portable body; each of `kernel_checks` is compared with it.

    Raises:
        KernelError: a library does not load.
    """
    generator = Generator(bundle, context_length=len(ids), kernels=False)
    for precision in bundle.manifest.precisions:
        generator.reset()
        portable = generator.decode(ids, precision=precision)
        want = reference_logits(checkpoint.path, _dequantized(bundle, checkpoint, family, plan, precision), ids)
        yield f"decode at {precision} bits against dequantized weights", Agreement.of(portable, want)
        for target, accuracy in kernel_checks(bundle.manifest):
            got = _kernel_logits(bundle, ids, precision=precision, target=target, accuracy=accuracy)
            agreement = Agreement.of(got, portable, accuracy=accuracy)
            yield f"{accuracy} {target} kernels at {precision} bits against portable graphs", agreement
    precision = bundle.manifest.prefill_precision
    steps = min(STEPS, len(ids))
    generator.reset()
    by_steps = np.stack([generator.decode_step(i, precision=precision) for i in ids[:steps]])
    prefilled = []
    for end in range(1, steps + 1):
        generator.reset()
        prefilled.append(generator.prefill(ids[:end]))
    yield "prefill against decoding in steps", Agreement.of(np.stack(prefilled), by_steps)


def _kernel_logits(
    bundle: Bundle, ids: Sequence[int], *, precision: int, target: str, accuracy: str
) -> npt.NDArray[np.float32]:
    """Return logits ``[len(ids), V]``: of the last tokens one by one, those before together. Kernels differ in both."""
    library = bundle.path / bundle.manifest.kernels[target]
    fast = Generator(bundle, context_length=len(ids), precisions=[precision], kernels=library, accuracy=accuracy)
    together = max(len(ids) - STEPS, 1)
    parts = [ids[:together], *([i] for i in ids[together:])]
    return np.concatenate([fast.decode(part, precision=precision) for part in parts])


def float_graph_logits(checkpoint: Checkpoint, family: Family, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Run the network's graph in float32 over the checkpoint's own tensors: logits ``[len(ids), V]``.

    The large tensors are fed as inputs, straight from the mapped checkpoint, so they are not copied.
    """
    stored_as = checkpoint.tensor("model.embed_tokens.weight").dtype
    dtype = _IR_TYPES[stored_as]
    linear = partial(FloatLinear, dtype=dtype)
    decoder = family.decoder(linear, linear, embedding_type=dtype)
    model = build_graph(decoder, phase="decode", producer="pmpd")
    feeds = {
        "input_ids": _ort_value(torch.tensor([list(ids)])),
        "attention_mask": _ort_value(torch.ones(1, len(ids), dtype=torch.int64)),
    }
    shape = family.shape
    past = _ort_value(torch.zeros(1, shape.kv_heads, len(ids), shape.head.slots, dtype=torch.float16))
    for layer in range(shape.layers):
        feeds |= dict.fromkeys((f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"), past)
    for scope, module in decoder.named_modules():
        for name, parameter in module.named_parameters(prefix=scope, recurse=False):
            if isinstance(module, FloatLinear) or name == "model.embed_tokens.weight":
                source = name if parameter.sources is None else parent_scope(scope) + parameter.sources[0]
                feeds[name] = _ort_value(checkpoint.tensor(source).to(stored_as))
                model.graph.inputs.append(model.graph.initializers.pop(name))
    for name, array in plain_tensors(decoder, checkpoint, skip=set(feeds)):
        model.graph.initializers[name].const_value = ir.tensor(array)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # In the order of the graph: by default every weight would be cast to float32 before the first is used. ONNX Runtime
    # counts the nodes of functions that it inlines behind all others, so they are inlined before.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False  # an arena would keep what the largest layer needed
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = onnx.inliner.inline_local_functions(ir.to_proto(model))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    logits: npt.NDArray[np.float32] = session.run_with_ort_values(["logits"], feeds)[0].numpy()[0]
    return logits


def _dequantized(
    bundle: Bundle, checkpoint: Checkpoint, family: Family, plan: WeightPlan, precision: int
) -> Callable[[str], torch.Tensor]:
    """Return a source of parameters as the `precision`-bit graph sees them."""
    layers: dict[str, LinearLayer] = {}
    for layer in plan.linears:
        names = ["lm_head.weight"] if layer.name == "head_proj" else layer.weight_names
        layers |= dict.fromkeys(names, layer)

    @lru_cache(maxsize=1)  # the parts of a merged layer are asked for one after the other
    def weights(layer: LinearLayer) -> dict[str, npt.NDArray[np.float32]]:
        bits = precision if layer.module.nested else layer.parent
        planes = bundle.tensor(plan.planes(layer.name), planes=bits)
        codebook = bundle.tensor(plan.codebook(layer.name, bits))
        N, K = layer.module.out_features, layer.module.in_features
        weight = np.empty((N, K), dtype=np.float32)
        for at in range(0, N, _ROWS_AT_A_TIME):
            rows = slice(at, at + _ROWS_AT_A_TIME)
            weight[rows] = dequantize(planes[:, rows], codebook[rows], K)
        return layer.unstack(weight)

    def tensor(name: str) -> torch.Tensor:
        if name in layers:
            layer = layers[name]
            source = name if name in layer.weight_names else layer.weight_names[0]  # a tied head
            weight = torch.from_numpy(weights(layer)[source])
            _require_likeness(weight, checkpoint.tensor(source), f"{source} at {precision} bits")
            return weight
        if name == "model.embed_tokens.weight":
            return torch.from_numpy(np.array(bundle.tensor(plan.tensors[name])))
        return checkpoint.tensor(name)

    return tensor


def _require_likeness(weight: torch.Tensor, original: torch.Tensor, name: str) -> None:
    """Raise PmpdError if a dequantized weight is further from the checkpoint's than zeros would be."""
    error = norm = 0.0
    for at in range(0, len(original), _ROWS_AT_A_TIME):
        rows = original[at : at + _ROWS_AT_A_TIME].float()
        error += float((weight[at : at + _ROWS_AT_A_TIME] - rows).square().sum())
        norm += float(rows.square().sum())
    if error > norm:
        raise PmpdError(
            f"verification failed, {name}: squared error {error:.3g} of a squared norm of {norm:.3g}; "
            "nothing was published: delete the partial folder and export again"
        )


def _tied(tensor: Callable[[str], torch.Tensor], family: Family) -> Callable[[str], torch.Tensor]:
    if not family.shape.tied_embeddings:
        return tensor
    return lambda name: tensor("model.embed_tokens.weight" if name == "lm_head.weight" else name)


def _ort_value(tensor: torch.Tensor) -> Any:
    """Wrap a torch tensor without a copy; numpy has no bfloat16, so that one travels as its bits."""
    if tensor.dtype == torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            tensor.view(torch.uint16).numpy(), ir.DataType.BFLOAT16
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def require_agreement(results: dict[str, Agreement]) -> None:
    """Raise PmpdError for the first check that failed, if one did."""
    for name, agreement in results.items():
        if not agreement.passed:
            raise PmpdError(f"verification failed, {name}: {agreement}; nothing was published")
