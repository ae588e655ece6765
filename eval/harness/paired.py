"""Two runs of the harness over the same documents, compared: ``python -m pmpd.eval.harness.paired FIRST SECOND``.

The harness gives each run an error of its own. Two models that answer the same documents err on the same ones, so the
error of their difference is much smaller: it is computed from the pairs, as in all tables of `pmpd.eval`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pmpd.eval.data.records import read_records
from pmpd.eval.metrics.base import Metric, Perplexity, Sample
from pmpd.eval.metrics.statistics import PLUS_MINUS, Estimate
from pmpd.runtime.console.command import FILE, Command
from pmpd.runtime.console.output import markdown_table
from pmpd.runtime.errors import PmpdError

__all__ = ["Comparison", "compare_runs", "main"]

_PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")
_FIELDS = ("doc_id", "filter")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A metric of a task in two runs.

    Attributes:
        task, metric: their names, the filter behind the metric's where it is not ``none``.
        first, second: the metric of either run; of the documents that both have.
        difference: second minus first, paired.
    """

    task: str
    metric: str
    first: Estimate
    second: Estimate
    difference: Estimate


def compare_runs(first: Path, second: Path) -> list[Comparison]:
    """Compare what two runs with ``--log_samples`` wrote into their folders (``--output_path``).

    Metrics of all documents together, such as BLEU, have no value of a document and are left out. Of several runs in a
    folder the newest counts.

    Raises:
        PmpdError: a folder has no samples, or the runs have no document in common.
    """
    runs = [_samples(folder) for folder in (first, second)]
    comparisons = []
    for task in runs[0].keys() & runs[1].keys():
        pairs = [(runs[0][task][key], runs[1][task][key]) for key in runs[0][task] if key in runs[1][task]]
        for name in pairs[0][0] if pairs else ():
            scored = [(a[name], b[name]) for a, b in pairs if name in a and name in b]
            metric = _metric(name.partition(",")[0])
            ours, theirs = ([sample[i] for sample in scored] for i in (0, 1))
            comparisons.append(
                Comparison(
                    task=task,
                    metric=name,
                    first=metric.estimate(ours),
                    second=metric.estimate(theirs),
                    difference=metric.difference(theirs, ours),
                )
            )
    if not comparisons:
        raise PmpdError(f"{first} and {second} have no documents of one task in common: run the same tasks twice")
    return sorted(comparisons, key=lambda comparison: (comparison.task, comparison.metric))


def _samples(folder: Path) -> dict[str, dict[Any, dict[str, Sample]]]:
    """Return samples by task, document and metric."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("samples_*.jsonl"), key=lambda path: path.name):  # the names end with the date
        files[path.name.removeprefix("samples_").rpartition("_")[0]] = path
    if not files:
        raise PmpdError(f"{folder} has no samples_*.jsonl: run the harness with --log_samples --output_path {folder}")
    tasks: dict[str, dict[Any, dict[str, Sample]]] = {}
    for task, path in files.items():
        documents = tasks[task] = {}
        for record in read_records(path):
            document = str(record.value("doc_id"))
            stage = record.fields.get("filter", "none")
            suffix = "" if stage == "none" else f",{stage}"
            scores = {f"{name}{suffix}": record.fields.get(name) for name in record.fields.get("metrics", ())}
            samples = {name: sample for name, value in scores.items() if (sample := _sample(document, name, value))}
            documents.setdefault(document, {}).update(samples)
    return tasks


def _sample(document: str, name: str, value: Any) -> Sample | None:
    """Return a document's value of a metric: a number, or a log-likelihood and of how many words or bytes it is."""
    weight = 1.0
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(part, int | float) for part in value):
        value, weight = value[0] / value[1] if value[1] else 0.0, value[1]
        value = -value / (math.log(2) if name.startswith("bits") else 1)
    elif name in _PERPLEXITIES:
        value = -value
    if not isinstance(value, int | float):
        return None
    scores = {"nll" if name in _PERPLEXITIES else name: float(value)}
    return Sample(group=document, turns=(), scores=scores, scored_steps=int(weight))


def _metric(name: str) -> Metric:
    if name in _PERPLEXITIES:
        return Perplexity(name, name, per_step=True)
    return Metric(name, name, per_step=True)


def _table(comparisons: Sequence[Comparison], names: Mapping[str, str]) -> str:
    head = ["task", "metric", "documents", names["first"], names["second"], "difference, paired"]
    rows = [
        [c.task, c.metric, str(c.difference.count), c.first.text(4), c.second.text(4), c.difference.text(4, sign=True)]
        for c in comparisons
    ]
    return f"{markdown_table([head, *rows])}\n\nDifferences are second minus first; {PLUS_MINUS}."


@click.command("python -m pmpd.eval.harness.paired", cls=Command, extra="eval")
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
def main(first: Path, second: Path) -> None:
    """Compare two runs of lm-evaluation-harness over the same documents, pair by pair."""
    click.echo(_table(compare_runs(first, second), {"first": first.name, "second": second.name}))


if __name__ == "__main__":
    main()
