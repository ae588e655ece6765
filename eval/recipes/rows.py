"""Rows that are no schedule of a bundle: choices at random, and dense-and-sparse at the bits of another row."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from pmpd.eval.measure.reference import Reference
from pmpd.eval.methods.compare import layers_of, quantized_weights
from pmpd.eval.methods.dense_sparse import OUTLIER_BITS, Quantized
from pmpd.eval.metrics.base import Metric, Sample
from pmpd.eval.report.results import QualityRow
from pmpd.eval.runner import Evaluation
from pmpd.eval.tasks.base import Item
from pmpd.runtime import Generator
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.schedule.learned import LearnedSchedule

__all__ = ["choice_shares", "dense_sparse_row", "random_row", "with_outliers"]


def random_row(
    name: str, choices: Sequence[QualityRow], shares: Sequence[float], metrics: Sequence[Metric]
) -> QualityRow:
    """Return what a scheduler gives on average that makes each choice so often, whatever the prompt.

    It is computed, not drawn: each sample's scores are the mean over the choices.

    Args:
        name: of the row.
        choices: the rows of the schedules that it chooses among.
        shares: how often it chooses each; sum 1.
        metrics: columns.
    """
    samples = []
    for of_item in zip(*(row.samples for row in choices), strict=True):
        scores = {key: _mean([s.scores[key] for s in of_item], shares) for key in of_item[0].scores}
        counts = {
            key: tuple(_mean(values, shares) for values in zip(*(s.counts[key] for s in of_item), strict=True))
            for key in of_item[0].counts
        }
        samples.append(replace(of_item[0], turns=(), scores=scores, counts=counts))
    steps = [_mean([sample.steps for sample in row.samples], [1] * len(row.samples)) for row in choices]
    bits = [row.average_bits or 0.0 for row in choices]
    weights = [share * count for share, count in zip(shares, steps, strict=True)]
    row = QualityRow.of(name, samples, metrics)
    return replace(row, average_bits=_mean(bits, weights) / sum(weights) if sum(weights) else None)


def _mean(values: Sequence[float], shares: Sequence[float]) -> float:
    return math.fsum(value * share for value, share in zip(values, shares, strict=True))


def choice_shares(generator: Generator, schedule: LearnedSchedule, items: Sequence[Item]) -> list[float]:
    """Return how often a learned schedule makes each of its choices on the prompts of items."""
    counts = Counter[int]()
    for item in items:
        generator.reset()
        plan = generator.begin(schedule, generator.prefill(item.ids, precision=schedule.prefill))
        counts[next(i for i, choice in enumerate(schedule.choices) if choice == plan)] += 1
    return [counts[i] / len(items) for i in range(len(schedule.choices))]


def dense_sparse_row(evaluation: Evaluation, bits: float, fp: Sequence[Sample]) -> QualityRow | None:
    """Return the row of dense-and-sparse (DNS; *SqueezeLLM*, Kim et al., ICML 2024) at a number of average bits.

    It is simulated on the codes and codebooks of the bundle, at the highest precision below `bits`: what is left over
    buys float16 values, with their places 32 bits each, for the weights of most squared error. Prompts and all decode
    steps have them. The output layer and the embedding are floats.

    Args:
        evaluation: what is asked.
        bits: the average bits of the row that it is compared with.
        fp: samples of the floating-point model.

    Returns: None where less than a hundredth of a bit is left over, so nothing can be bought.

    Raises:
        PmpdError: the bundle has no precision below, or is not of the reference checkpoint.
    """
    manifest = evaluation.bundle.manifest
    whole = [precision for precision in manifest.precisions if precision == int(precision) and precision <= bits]
    if not whole:
        raise PmpdError(f"dense-and-sparse at {bits:.2f} bits needs a precision of the bundle below that")
    base = int(max(whole))
    share = (bits - base) / OUTLIER_BITS
    if bits - base < 0.01:
        return None
    name = f"dns:{bits:.2f}"
    files = sorted(entry.sha256 for file, entry in manifest.files.items() if not file.startswith("schedules/"))
    digest = hashlib.sha256(repr([name, files]).encode()).hexdigest()[:8]
    with ExitStack() as stack:
        load = partial(_dense_sparse_model, evaluation, base, share, stack)
        samples = evaluation.variant_samples(name, digest, load, fp)
    row = QualityRow.of(name, samples, evaluation.task.metrics)
    return replace(row, average_bits=bits)


def _dense_sparse_model(evaluation: Evaluation, base: int, share: float, stack: ExitStack) -> Reference:
    """Return the floating-point model with quantized weights, but for outliers, until the stack is closed."""
    model = evaluation.load_reference()
    weights = {name: parameter.data for name, parameter in model.network.named_parameters()}
    layers = [
        with_outliers(layer, weights, base, share)
        for layer in layers_of(evaluation.bundle, str(evaluation.checkpoint.path))
    ]
    stack.enter_context(quantized_weights(model.network, layers, lambda _: base))
    return model


def with_outliers(layer: Quantized, weights: Mapping[str, Any], base: int, share: float) -> Quantized:
    """Return a layer whose weights of most squared error at a precision stay floats."""
    parts = enumerate(layer.layer.weight_names)
    exact = np.concatenate([layer.layer.part_weight(i, weights[name]) for i, name in parts])
    loss = np.square(exact - layer.weight(base)).reshape(-1)
    count = round(share * loss.size)
    places = np.sort(np.argpartition(loss, loss.size - count)[loss.size - count :])
    return replace(layer, outliers=places, values=exact.reshape(-1)[places].astype(np.float16))
