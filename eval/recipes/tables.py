"""What a recipe measured: the paper's layout, each difference with its interval, and the paper's own figures beside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from pmpd.eval.metrics.base import Metric
from pmpd.eval.metrics.statistics import Estimate
from pmpd.eval.recipes.paper import BASE_H, PaperRow, of_model
from pmpd.eval.report.results import AVERAGE_BITS, QualityResults, QualityRow, format_number
from pmpd.runtime.console.output import csv_text, markdown_table

__all__ = ["VERSION", "Part", "RecipeResults"]

VERSION = 1
HIGH = (BASE_H, "high throughout")
"""Labels of the row that others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One task.

    Attributes:
        task: its name.
        model: what the bundle was made from.
        labels: the rows' names, by what the paper calls them.
        results: the rows.
        notes: what else a reader must know.
    """

    task: str
    model: str
    labels: Mapping[str, str]
    results: QualityResults
    notes: tuple[str, ...] = ()

    def row(self, label: str) -> QualityRow:
        """Return the row of a label."""
        return next(row for row in self.results.rows if row.name == self.labels[label])

    @property
    def high(self) -> str:
        """The label of the row that others are compared with."""
        return next(label for label in HIGH if label in self.labels)

    def to_high(self, metric: Metric, label: str) -> Estimate | None:
        """Return the paired difference of a row to the high baseline; None for itself."""
        if label == self.high:
            return None
        return self.results.difference(metric, self.row(label), self.row(self.high))

    def table(self, recipe: str) -> list[list[str]]:
        """Return the rows as cells, heading first: bits, and each metric with its difference to the high baseline."""
        metrics = self.results.metrics
        head = ["method", "schedule", "bits"]
        for metric in metrics:
            head += [f"{metric.label} {metric.arrow}", f"to {self.high}"]
        table = [head]
        for label, name in self.labels.items():
            row = self.row(label)
            cells = [label, name, format_number(row.average_bits, 2)]
            for metric in metrics:
                gap = self.to_high(metric, label)
                cells += [
                    row.metrics[metric.name].text(metric.digits),
                    gap.text(metric.digits, sign=True) if gap else "",
                ]
            table.append(cells)
        for label, (bits, scores) in self.paper(recipe).items():
            printed = [f"{label} (paper)", "", f"{bits:g}"]
            for metric in metrics:
                printed += [_printed(metric, self.task, scores), ""]
            table.append(printed)
        return table

    def paper(self, recipe: str) -> Mapping[str, PaperRow]:
        """Return the paper's rows, where it has this model."""
        return of_model(recipe, self.task, self.model)


def _printed(metric: Metric, task: str, scores: Sequence[float]) -> str:
    """Return the paper's score of a metric."""
    places = {"rougeL": 0, "bertscore": 1} if task != "iwslt" else {"bleu": 0, "sacrebleu": 1}
    place = places.get(metric.name)
    return f"{scores[place]:g}" if place is not None and place < len(scores) else ""


@dataclass(frozen=True, kw_only=True)
class RecipeResults:
    """A table or figure of the paper, of one bundle.

    Attributes:
        recipe: its name.
        title: what it shows.
        normalized: whether scores are summed up as a share of the high baseline's.
        parts: one a task.
    """

    recipe: str
    title: str
    normalized: bool
    parts: tuple[Part, ...]

    @property
    def labels(self) -> list[str]:
        """The rows that any task has."""
        return list(dict.fromkeys(label for part in self.parts for label in part.labels))

    def score(self, part: Part, label: str) -> float | None:
        """Return a row's first metric, normalized where the figure is; None where the task lacks the row."""
        if label not in part.labels:
            return None
        name = part.results.metrics[0].name
        value = part.row(label).metrics[name].value
        return value / part.row(part.high).metrics[name].value if self.normalized else value

    def summary(self) -> list[list[str]]:
        """Return the paper's layout as cells: a line a method, two columns a task, the metrics joined by a stroke."""
        head = ["method"]
        for part in self.parts:
            head += [f"{part.task} bits", " / ".join(metric.label for metric in part.results.metrics[:2])]
        if self.normalized:
            head = ["method", *(f"{part.task} {kind}" for part in self.parts for kind in ("bits", "of high"))]
            head += ["bits", "of high"]
        table = [head]
        for label in self.labels:
            cells, bits, shares = [label], [], []
            for part in self.parts:
                if label not in part.labels:
                    cells += ["–", "–"]
                    continue
                row = part.row(label)
                cells.append(format_number(row.average_bits, 2))
                bits.append(row.average_bits or 0.0)
                if self.normalized:
                    shares.append(self.score(part, label) or 0.0)
                    cells.append(f"{shares[-1]:.3f}")
                else:
                    cells.append(
                        " / ".join(f"{row.metrics[m.name].value:.{m.digits}f}" for m in part.results.metrics[:2])
                    )
            if self.normalized:
                cells += [f"{mean(bits):.2f}", f"{mean(shares):.3f}"]
            table.append(cells)
        return table

    def to_markdown(self) -> str:
        """Return the summary, then each task with intervals."""
        lines = [f"{self.recipe}: {self.title}. {self.parts[0].model}", markdown_table(self.summary())]
        for part in self.parts:
            lines += [f"{part.task}", markdown_table(part.table(self.recipe))]
            lines.append("\n".join([*part.notes, part.results.samples_note(), AVERAGE_BITS]))
        return "\n\n".join(lines)

    def to_json(self) -> str:
        """Return everything as JSON text in one line, without the data's texts: scores, settings and our answers."""
        parts = []
        for part in self.parts:
            differences = {
                label: {m.name: _maybe(part.to_high(m, label)) for m in part.results.metrics} for label in part.labels
            }
            parts.append(
                {
                    "task": part.task,
                    "model": part.model,
                    "labels": part.labels,
                    "to_high": differences,
                    "paper": part.paper(self.recipe),
                    "notes": part.notes,
                    "results": json.loads(part.results.to_json(texts=False)),
                }
            )
        document = {"version": VERSION, "recipe": self.recipe, "title": self.title, "parts": parts}
        return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"

    def to_csv(self) -> str:
        """Return a line per task and row."""
        lines = []
        for part in self.parts:
            for label in part.labels:
                row = part.row(label)
                line: dict[str, Any] = {"task": part.task, "method": label, "schedule": row.name}
                line |= {"average_bits": row.average_bits, "samples": len(row.samples)}
                for metric in part.results.metrics:
                    value, gap = row.metrics[metric.name], part.to_high(metric, label)
                    line |= {metric.name: value.value, f"{metric.name}_ci95": value.ci95}
                    line |= {
                        f"{metric.name}_to_high": gap and gap.value,
                        f"{metric.name}_to_high_ci95": gap and gap.ci95,
                    }
                lines.append(line)
        columns = list(dict.fromkeys(key for line in lines for key in line))
        return csv_text([{key: line.get(key) for key in columns} for line in lines])


def _maybe(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else {"value": estimate.value, "ci95": estimate.ci95, "count": estimate.count}
