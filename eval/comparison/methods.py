"""Quantization methods compared on the same weights: ``python -m pmpd.eval.comparison.methods CHECKPOINT``.

Each method quantizes the linear layers of a checkpoint as `pmpd-export` would; then transformers computes with what the
codes stand for, at each precision. The output layer and the embedding stay as they are: what is seen is the method's.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from pmpd.eval.data.records import read_records
from pmpd.eval.measure.statistics import PLUS_MINUS, Estimate
from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.exporter.config import BUILT_IN, ExportConfig, calibration_text, parse_bits
from pmpd.exporter.pipeline import Export
from pmpd.exporter.quantize import METHODS, NestedCodes
from pmpd.exporter.source.reference import load_model
from pmpd.runtime.console.command import FILE, Command, check_outputs, json_option, print_result
from pmpd.runtime.console.output import json_text
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["Choice", "MethodScores", "Windows", "compare_methods", "main", "table"]

_OF_THE_EXPORT = {"precisions", "parent", "groups"}  # options that all methods of a comparison share
WINDOW = 512
"""Tokens of a window of text; those of its second half are scored."""


@dataclass(frozen=True)
class Choice:
    """A method and its options, as ``name`` or ``name:option=number;option=number``."""

    name: str
    options: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read a choice.

        Raises:
            PmpdError: there is no such method, it has no such option, or what follows is not a list of options.
        """
        name, _, listed = text.partition(":")
        if name not in METHODS:
            raise PmpdError(unknown_choice("method", name, METHODS))
        options: dict[str, float] = {}
        known = [option for option in signature(METHODS[name]).parameters if option not in _OF_THE_EXPORT]
        for option in filter(None, listed.split(";")):
            key, _, value = option.partition("=")
            if key not in known:
                raise PmpdError(unknown_choice(f"option of method {name}", key, known))
            with suppress(ValueError, SyntaxError):
                options[key] = ast.literal_eval(value)
            if not isinstance(options.get(key), int | float):
                raise PmpdError(f"method {text!r}: {key} must be a number, got {value!r}: write {name}:{key}=1")
        return cls(name, options)

    def __str__(self) -> str:
        return self.name + "".join(
            f"{':' if i == 0 else ';'}{key}={value}" for i, (key, value) in enumerate(self.options.items())
        )


@dataclass(frozen=True)
class MethodScores:
    """How far a quantized model is from the checkpoint, by window of text.

    Attributes:
        method: and its options.
        precision: bits.
        kl: mean Kullback-Leibler divergence from the checkpoint's predictions, in nats a token.
        loss: mean negative log-likelihood of the text, in nats a token.
        top1: share of the tokens whose most likely successor is the checkpoint's.
        seconds: that quantizing took, of all precisions together.
    """

    method: str
    precision: int
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
    model: str, choices: Sequence[Choice], text: Path, *, limit: int = 12, **options: Any
) -> Iterator[MethodScores]:
    """Yield each method's scores, precision by precision; first, under the name ``fp``, those of the checkpoint.

    Args:
        model: the checkpoint, as `ExportConfig` takes it.
        text: on which to compare; JSON lines, or plain.
        limit: windows of the text.
        options: of `ExportConfig`, such as `calibration` and `precisions`.

    Raises:
        PmpdError: as `Export.prepare`, `Choice.parse`, and `Windows`.
    """
    exports = [_prepare(model, choice, options) for choice in choices]
    checkpoint = exports[0].checkpoint
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise PmpdError(f"{model} has no tokenizer for {text}: take a checkpoint with one")
    whole = "\n\n".join(record.text("text") for record in read_records(text))
    network = load_model(checkpoint)
    windows = Windows(network, tokenizer(whole)["input_ids"], limit)
    yield MethodScores("fp", 0, *windows.scores(), 0.0)
    for choice, export in zip(choices, exports, strict=True):
        layers = [layer for layer in export.plan.linears if layer.module.nested]
        statistics, begin = export.statistics(), time.monotonic()
        quantized = [
            (layer, export.quantized(layer, statistics, **choice.options))
            for layer in track(layers, step=f"quantize {choice}", total=len(layers))
        ]
        seconds = time.monotonic() - begin
        for precision in export.config.planes:
            with _weights(network, quantized, precision):
                yield MethodScores(str(choice), precision, *windows.scores(), seconds)


def _prepare(model: str, choice: Choice, options: Mapping[str, Any]) -> Export:
    if not METHODS[choice.name].needs:
        options = {**options, "calibration": None}
    elif options.get("calibration") is None:
        options = {**options, "calibration": BUILT_IN}
    config = ExportConfig(model=model, output=Path(f"{choice.name}-unused"), method=choice.name, targets=(), **options)
    return Export.prepare(config)


@contextmanager
def _weights(
    network: torch.nn.Module, quantized: Sequence[tuple[LinearLayer, NestedCodes]], bits: int
) -> Iterator[None]:
    """Give a model of transformers quantized weights for a while."""
    parameters = dict(network.named_parameters())
    before = {}
    try:
        for layer, codes in quantized:
            for name, weight in layer.unstack(_dequantized(codes, layer.parent, bits)).items():
                before[name] = parameters[name].data
                parameters[name].data = torch.from_numpy(np.ascontiguousarray(weight))
        yield
    finally:
        for name, data in before.items():
            parameters[name].data = data


def _dequantized(nested: NestedCodes, parent: int, bits: int) -> Any:
    """Return what codes ``[N, K]`` stand for: float32 ``[N, K]``."""
    book = nested.codebooks[bits].astype(np.float32)  # [N, groups, 2**bits]
    codes = (nested.codes >> (parent - bits)).astype(np.intp)
    rows, groups, _ = book.shape
    split = codes.reshape(rows, groups, -1)
    return np.take_along_axis(book, split, 2).reshape(codes.shape)


def table(results: Sequence[MethodScores]) -> str:
    """Return the results as a table of Markdown: each method beside the first one, window by window."""
    fp, *rows = results
    first = {row.precision: row for row in rows if row.method == rows[0].method}
    lines = [
        "| method | bits | KL | KL by the first's | top-1 | perplexity | loss over fp | seconds |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
        f"| fp | | | | | {np.exp(np.mean(fp.loss)):.2f} | | |",
    ]
    for row in rows:
        base = first[row.precision]
        ratio = "" if row is base else _ratio(row.kl, base.kl)
        over = Estimate.of([ours - theirs for ours, theirs in zip(row.loss, fp.loss, strict=True)])
        lines.append(
            f"| {row.method} | {row.precision} | {Estimate.of(row.kl).text(4)} | {ratio} | {np.mean(row.top1):.1%} | "
            f"{np.exp(np.mean(row.loss)):.2f} | {over.text(4, sign=True)} | {row.seconds:.0f} |"
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
    examples=["python -m pmpd.eval.comparison.methods smollm2 --calibration owt.jsonl --data wiki.test.raw"],
)
@click.argument("model", metavar="CHECKPOINT")
@click.option("--data", required=True, type=FILE, metavar="FILE", help="The text to compare on.")
@click.option("--calibration", metavar="FILE|builtin|own", help="Text for the statistics.  [default: builtin]")
@click.option("--calibration-samples", type=click.IntRange(1), default=64, show_default=True, help="Samples of it.")
@click.option(
    "--method", "methods", multiple=True, default=("anyprecision", "guided"), metavar="NAME[:OPTION=NUMBER;…]",
    help="A method with its options, such as guided:damping=0.3. Repeatable; the first is what the others are compared "
    "with.  [default: anyprecision, guided]",
)  # fmt: skip
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
    precisions: str,
    parent: int | None,
    limit: int,
    json_file: Path | None,
) -> None:
    """Compare quantization methods on a checkpoint: KL, top-1 agreement and perplexity at each precision."""
    check_outputs(json_file)
    if not data.is_file():
        raise PmpdError(f"{data} is not a file: give a text with --data")
    results = list(
        compare_methods(
            model,
            [Choice.parse(method) for method in methods],
            data,
            limit=limit,
            calibration=calibration_text(calibration),
            calibration_samples=calibration_samples,
            precisions=parse_bits(precisions),
            parent=parent,
        )
    )
    print_result(table(results), json_file, lambda: json_text([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
