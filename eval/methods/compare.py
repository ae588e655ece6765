"""Quantization methods compared on the same weights: ``python -m pmpd.eval.methods.compare CHECKPOINT``.

Each method quantizes the linear layers of a checkpoint as `pmpd-export` would; then transformers computes with what the
codes stand for, at each precision. Layers of bundles may stand beside them. The output layer and the embedding stay as
they are: what is seen is the method's.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from pmpd.eval.data.records import read_records
from pmpd.eval.methods.dense_sparse import Quantized, dense_and_sparse, quantized
from pmpd.eval.metrics.statistics import PLUS_MINUS, Estimate
from pmpd.exporter.calibrate.store import StatisticsStore
from pmpd.exporter.config import BUILT_IN, ExportConfig, calibration_text, parse_bits
from pmpd.exporter.pipeline import Export
from pmpd.exporter.quantize import METHODS
from pmpd.exporter.quantize.base import NestedCodes
from pmpd.exporter.source.reference import load_model
from pmpd.runtime import Bundle
from pmpd.runtime.console.command import FILE, Command, check_outputs, json_option, print_result
from pmpd.runtime.console.output import json_text
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.bitplanes import unpack

__all__ = [
    "Choice",
    "MethodScores",
    "Windows",
    "compare_methods",
    "layers_of",
    "main",
    "quantized_weights",
    "table",
]

DNS, BASE_OF_DNS = "dns", "anyprecision"  # dense-and-sparse is no method of exports (`dense_sparse.py`)
GRIDS = ("rtn", "hqq", "gptq")  # methods whose levels a scale and a zero-point give
_OF_THE_EXPORT = {"precisions", "parent"}  # options that all methods of a comparison share
WINDOW = 512
"""Tokens of a window of text; those of its second half are scored."""


@dataclass(frozen=True)
class Choice:
    """A method and its options, as ``name`` or ``name:option=number;option=number``.

    Besides its own each method has the option ``groups``, codebooks a row, and ``alone``: 1 for a model of its own at
    each precision, of as many planes, instead of nested ones.
    """

    name: str
    options: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read a choice.

        Raises:
            PmpdError: there is no such method, it has no such option, or what follows is not a list of options.
        """
        name, _, listed = text.partition(":")
        if name not in (*METHODS, DNS):
            raise PmpdError(unknown_choice("method", name, (*METHODS, DNS)))
        options: dict[str, float] = {"outliers": 0.0045} if name == DNS else {}
        method = METHODS[BASE_OF_DNS if name == DNS else name]
        known = [
            "alone",
            *options,
            *(option for option in signature(method).parameters if option not in _OF_THE_EXPORT),
        ]
        for option in filter(None, listed.split(";")):
            key, _, value = option.partition("=")
            if key not in known:
                raise PmpdError(unknown_choice(f"option of method {name}", key, known))
            with suppress(ValueError, SyntaxError):
                options[key] = ast.literal_eval(value)
            if not isinstance(options.get(key), int | float):
                raise PmpdError(f"method {text!r}: {key} must be a number, got {value!r}: write {name}:{key}=1")
        if not 0 <= options.get("outliers", 0) <= 1:
            raise PmpdError(f"method {text!r}: outliers must be a share from 0 to 1, such as {name}:outliers=0.01")
        return cls(name, options)

    @property
    def of_method(self) -> dict[str, float]:
        """The options that the method itself takes."""
        return {key: value for key, value in self.options.items() if key not in ("alone", "groups")}

    def __str__(self) -> str:
        return self.name + "".join(
            f"{':' if i == 0 else ';'}{key}={value}" for i, (key, value) in enumerate(self.options.items())
        )


@dataclass(frozen=True)
class MethodScores:
    """How far a quantized model is from the checkpoint, by window of text.

    Attributes:
        method: and its options; or the name of a bundle.
        precision: bits.
        bits: that a step reads for each weight, with codebooks and padding.
        kl: mean Kullback-Leibler divergence from the checkpoint's predictions, in nats a token.
        loss: mean negative log-likelihood of the text, in nats a token.
        top1: share of the tokens whose most likely successor is the checkpoint's.
        seconds: that quantizing took, of all precisions together.
    """

    method: str
    precision: float
    bits: float
    kl: list[float]
    loss: list[float]
    top1: list[float]
    seconds: float


class Windows:
    """Stretches of a text, spread over all of it, and what a float model makes of them.

    Args:
        model: of transformers; `scores` are of what its weights are then.
        ids: the text.
        count: of the windows.

    Raises:
        PmpdError: the text is too short.
    """

    def __init__(self, model: Any, ids: Sequence[int], count: int) -> None:
        step = len(ids) // count
        if step < WINDOW:
            raise PmpdError(f"the text has {len(ids)} tokens, {count} windows take {count * WINDOW}: lower --limit")
        self._model = model
        self._windows = [torch.tensor([ids[i * step : i * step + WINDOW]]) for i in range(count)]
        # Half the bytes: the rounding of logits to float16 is a KL of about 1e-5.
        self._logits = [self._predictions(ids).half() for ids in self._windows]

    def scores(self) -> tuple[list[float], list[float], list[float]]:
        """Return KL, loss and top-1 agreement of the model as it is now, by window."""
        kl, loss, top1 = [], [], []
        for ids, theirs in zip(self._windows, self._logits, strict=True):
            p, q = theirs.float().log_softmax(-1), self._predictions(ids).log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1).mean().item())
            loss.append(-q.gather(1, ids[0, WINDOW // 2 + 1 :, None]).mean().item())
            top1.append((p.argmax(-1) == q.argmax(-1)).float().mean().item())
        return kl, loss, top1

    @torch.no_grad()
    def _predictions(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of the second half of a window but for its first token: ``[WINDOW // 2 - 1, V]``."""
        logits: torch.Tensor = self._model(ids, use_cache=False, logits_to_keep=WINDOW // 2).logits
        return logits[0, :-1].float()


def compare_methods(
    model: str,
    choices: Sequence[Choice],
    text: Path,
    *,
    bundles: Sequence[Bundle] = (),
    limit: int = 12,
    **options: Any,
) -> Iterator[MethodScores]:
    """Yield each method's scores, precision by precision; first, under the name ``fp``, those of the checkpoint.

    Args:
        model: the checkpoint, as `ExportConfig` takes it.
        text: on which to compare; JSON lines, or plain.
        bundles: of the checkpoint, whose layers are compared, too, as they are.
        limit: windows of the text.
        options: of `ExportConfig`, such as `calibration` and `precisions`.

    Raises:
        PmpdError: as `Export.prepare`, `Choice.parse`, and `Windows`.
    """
    exports = [_prepare(model, choice, options) for choice in choices]
    exported = [layers_of(bundle, model) for bundle in bundles]
    checkpoint = exports[0][0].checkpoint
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise PmpdError(f"{model} has no tokenizer for {text}: take a checkpoint with one")
    whole = "\n\n".join(record.text("text") for record in read_records(text))
    network = load_model(checkpoint)
    windows = Windows(network, tokenizer(whole)["input_ids"], limit)
    yield MethodScores("fp", 0, 0.0, *windows.scores(), 0.0)
    for choice, export in ((choice, export) for choice, few in zip(choices, exports, strict=True) for export in few):
        statistics, begin = export.statistics(), time.monotonic()
        approximations = _quantize(choice, export, statistics)
        seconds = time.monotonic() - begin
        for precision in export.config.planes:
            bits = _bits_read(choice, approximations, precision)
            with quantized_weights(network, approximations, lambda _, precision=precision: precision):  # type: ignore[misc]
                yield MethodScores(str(choice), precision, bits, *windows.scores(), seconds)
    for bundle, layers in zip(bundles, exported, strict=True):
        for number in bundle.manifest.precisions:
            planes = partial(bundle.manifest.planes, precision=number)
            read = sum(layer.nbytes(planes(layer.layer.name)) for layer in layers)
            bits = 8 * read / sum(layer.codes.codes.size for layer in layers)
            with quantized_weights(network, layers, planes):
                yield MethodScores(bundle.path.name, number, bits, *windows.scores(), 0.0)


def _prepare(model: str, choice: Choice, options: Mapping[str, Any]) -> list[Export]:
    """Return the exports that a choice takes: one, or one for each precision."""
    method = BASE_OF_DNS if choice.name == DNS else choice.name
    calibration = (options.get("calibration") or BUILT_IN) if METHODS[method].needs else None
    groups = int(choice.options.get("groups", 1))
    config = ExportConfig(
        model=model, output=Path(f"{method}-unused"), method=method, targets=(),
        **{**options, "calibration": calibration, "groups": groups},
    )  # fmt: skip
    if not choice.options.get("alone"):
        return [Export.prepare(config)]
    return [Export.prepare(replace(config, precisions=(bits,), parent=bits)) for bits in config.resolve().planes]


def layers_of(bundle: Bundle, model: str) -> list[Quantized]:
    """Return the layers of a bundle that have several precisions.

    Raises:
        PmpdError: it is not of this checkpoint.
    """
    manifest = bundle.manifest
    config = ExportConfig(
        model=model, output=Path("unused"), targets=(), precisions=manifest.precisions, parent=manifest.parent_precision
    )
    plan = Export.prepare(config).plan
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    layers = []
    for layer in plan.linears:
        if not layer.module.nested:
            continue
        books = {bits: plan.codebook(layer.name, bits) for bits in config.resolve().planes}
        for planned in (plan.planes(layer.name), *books.values()):
            if planned.name not in tensors or tensors[planned.name].shape != planned.shape:
                raise PmpdError(f"{bundle.path} is not a bundle of {model}: it has no {planned.name} of its shape")
        codes = unpack(bundle.tensor(tensors[plan.planes(layer.name).name]), layer.module.in_features)
        codebooks = {bits: np.array(bundle.tensor(tensors[book.name])) for bits, book in books.items()}
        nothing = np.empty(0, np.intp), np.empty(0, np.float16)
        layers.append(Quantized(layer, NestedCodes(codes, codebooks), *nothing))
    return layers


def _quantize(choice: Choice, export: Export, statistics: StatisticsStore | None) -> list[Quantized]:
    """Quantize all layers that have several precisions."""
    layers = [layer for layer in export.plan.linears if layer.module.nested]
    quantize = dense_and_sparse if choice.name == DNS else quantized
    quantizing = export.side_by_side(lambda layer: quantize(export, layer, statistics, **choice.of_method), layers)
    return [approximation for _, approximation in track(quantizing, step=f"quantize {choice}", total=len(layers))]


def _bits_read(choice: Choice, layers: Sequence[Quantized], precision: int) -> float:
    """Return the bits that a step reads for each weight at a precision."""
    weights = sum(layer.codes.codes.size for layer in layers)
    if choice.name in GRIDS and choice.options.get("alone"):
        groups = sum(layer.codes.codebooks[precision][..., 0].size for layer in layers)
        return precision + (16 + precision) * groups / weights
    return 8 * sum(layer.nbytes(precision) for layer in layers) / weights


@contextmanager
def quantized_weights(
    network: torch.nn.Module, layers: Sequence[Quantized], bits: Callable[[str], int]
) -> Iterator[None]:
    """Give a model of transformers quantized weights for a while, of so many bits in each layer."""
    parameters = dict(network.named_parameters())
    before = {}
    try:
        for quantized in layers:
            for name, weight in quantized.layer.unstack(quantized.weight(bits(quantized.layer.name))).items():
                before[name] = parameters[name].data
                parameters[name].data = torch.from_numpy(np.ascontiguousarray(weight))
        yield
    finally:
        for name, data in before.items():
            parameters[name].data = data


def table(results: Sequence[MethodScores]) -> str:
    """Return the results as a table of Markdown: each method beside the first one, window by window."""
    fp, *rows = results
    first = {row.precision: row for row in rows if row.method == rows[0].method}
    lines = [
        "| method | bits | read | KL | KL by the first's | top-1 | perplexity | loss over fp | seconds |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: | --: |",
        f"| fp | | | | | | {np.exp(np.mean(fp.loss)):.2f} | | |",
    ]
    for row in rows:
        base = first.get(row.precision)  # the first method has no mixes
        ratio = "" if base is None or base is row else _ratio(row.kl, base.kl)
        over = Estimate.of([ours - theirs for ours, theirs in zip(row.loss, fp.loss, strict=True)])
        lines.append(
            f"| {row.method} | {row.precision} | {row.bits:.2f} | {Estimate.of(row.kl).text(4)} | {ratio} | "
            f"{np.mean(row.top1):.1%} | {np.exp(np.mean(row.loss)):.2f} | {over.text(4, sign=True)} | "
            f"{row.seconds:.0f} |"
        )
    note = f"{PLUS_MINUS}, over {len(fp.loss)} windows of {WINDOW} tokens whose second halves are scored"
    return "\n".join([*lines, "", f"{note}; ratios are of means, their intervals of paired differences."])


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return a ratio of means, with the interval of the paired differences."""
    mean = float(np.mean(theirs))
    difference = Estimate.of([a - b for a, b in zip(ours, theirs, strict=True)])
    return Estimate(1 + difference.value / mean, difference.ci95 and difference.ci95 / mean, difference.count).text(3)


@click.command(
    cls=Command,
    extra="eval",
    examples=["python -m pmpd.eval.methods.compare smollm2 --calibration owt.jsonl --data wiki.test.raw"],
)
@click.argument("model", metavar="CHECKPOINT")
@click.option("--data", required=True, type=FILE, metavar="FILE", help="The text to compare on.")
@click.option(
    "--calibration", metavar="FILE|builtin|own|none", help="Text for the statistics, or none.  [default: builtin]"
)
@click.option("--calibration-samples", type=click.IntRange(1), default=64, show_default=True, help="Samples of it.")
@click.option(
    "--method", "methods", multiple=True, default=("anyprecision", "guided"), metavar="NAME[:OPTION=NUMBER;…]",
    help="A method with its options, such as guided:damping=0.3, gptq:groups=9;alone=1 (a model of its own at each "
    "precision) or dns:outliers=0.01. Repeatable; the first is what the others are compared with.  [default: "
    "anyprecision, guided]",
)  # fmt: skip
@click.option(
    "--bundle", "bundles", multiple=True, type=FILE, metavar="DIR", help="A bundle of the checkpoint, too. Repeatable."
)
@click.option("--precisions", default="4,3,2", show_default=True, metavar="LIST", help="Bits, high to low.")
@click.option("--parent", type=int, help="Bits of the codes.  [default: the highest precision]")
@click.option("--limit", type=click.IntRange(2), default=12, show_default=True, help="Windows of 512 tokens.")
@json_option()
def main(
    model: str,
    data: Path,
    calibration: str | None,
    calibration_samples: int,
    methods: tuple[str, ...],
    bundles: tuple[Path, ...],
    precisions: str,
    parent: int | None,
    limit: int,
    json_file: Path | None,
) -> None:
    """Compare quantization methods on a checkpoint: KL, top-1 agreement and perplexity at each precision."""
    check_outputs(json_file)
    if not data.is_file():
        raise PmpdError(f"{data} is not a file: give a text with --data")
    bits = parse_bits(precisions)
    if any(not isinstance(number, int) for number in bits):
        raise PmpdError(f"precisions {precisions}: a mix belongs to a bundle: give whole precisions")
    results = list(
        compare_methods(
            model,
            [Choice.parse(method) for method in methods],
            data,
            bundles=[Bundle.open(bundle) for bundle in bundles],
            limit=limit,
            calibration=calibration_text(calibration),
            calibration_samples=calibration_samples,
            precisions=bits,
            parent=parent,
        )
    )
    print_result(table(results), json_file, lambda: json_text([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
