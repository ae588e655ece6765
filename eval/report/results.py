"""What an evaluation found: one row per way of decoding, with every sample it rests on; JSON and markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from pmpd.runtime.console.output import csv_text, json_text, markdown_table

__all__ = [
    "FP",
    "VERSION",
    "Metric",
    "Results",
    "Row",
    "Sample",
    "format_number",
]

FP = "fp"
VERSION = 1


@dataclass(frozen=True)
class Metric:
    """A column of the table.

    Attributes:
        name: its key in results.
        label: its heading.
        higher_is_better: which way is up.
        per_step: samples weigh as much as they have decode steps, not all alike.
        digits: decimals shown.
    """

    name: str
    label: str
    higher_is_better: bool = True
    per_step: bool = False
    digits: int = 2

    @property
    def arrow(self) -> str:
        """Which way is better, for a heading."""
        return "↑" if self.higher_is_better else "↓"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one row did with one item.

    Attributes:
        source: where the item comes from (``file:line``).
        prompt, output, reference: the texts, and those it was compared with (empty where the task keeps none).
        prompt_tokens, output_tokens: their lengths.
        precisions: bits that each output token was computed with; the first comes from prefill.
        segments: the output cut where the precision changes: bits and text.
        seconds: time of each output token (of the first: the whole prefill); empty under teacher forcing.
        prefill_seconds: time of the prompt.
        scores: this sample's scores.
        scored_steps: decode steps that were scored by teacher forcing.
    """

    source: str
    prompt: str = ""
    output: str = ""
    reference: tuple[str, ...] = ()
    prompt_tokens: int
    output_tokens: int
    precisions: tuple[int, ...]
    segments: tuple[tuple[int, str], ...] = ()
    seconds: tuple[float, ...] = ()
    prefill_seconds: float
    scores: Mapping[str, float]
    scored_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of decoding: a schedule, or ``fp`` for the floating-point model.

    Attributes:
        schedule: the schedule as the user gave it.
        average_bits: mean bits over the decode steps of all samples (paper, Section 5 "Baselines"): the first token of
            an answer comes from prefill and does not count. None without any decode step.
        metrics: each metric, and its standard error over samples as ``<metric>_stderr``.
        prefill_tps, decode_tps: tokens per second, all tokens over all seconds; None where not measured.
        samples: what it rests on.
    """

    schedule: str
    average_bits: float | None
    metrics: Mapping[str, float]
    prefill_tps: float | None
    decode_tps: float | None
    samples: tuple[Sample, ...]

    def stderr(self, metric: Metric) -> float:
        """Return the standard error of a metric, 0 where it has none."""
        return self.metrics.get(f"{metric.name}_stderr", 0.0)

    @classmethod
    def of(cls, schedule: str, samples: Sequence[Sample], metrics: Mapping[str, float]) -> Self:
        """Make a row of its samples."""
        bits = [precision for sample in samples for precision in sample.precisions[1:]]
        steps = [seconds for sample in samples for seconds in sample.seconds[1:]]
        prompt_tokens = sum(sample.prompt_tokens for sample in samples)
        prefill_seconds = sum(sample.prefill_seconds for sample in samples)
        return cls(
            schedule=schedule,
            average_bits=sum(bits) / len(bits) if bits else None,
            metrics=metrics,
            prefill_tps=prompt_tokens / prefill_seconds if prefill_seconds > 0 else None,
            decode_tps=len(steps) / sum(steps) if sum(steps) > 0 else None,
            samples=tuple(samples),
        )


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole evaluation: its rows, the floating-point one first, and where and with what they were measured."""

    rows: tuple[Row, ...]
    metrics: tuple[Metric, ...]
    environment: Mapping[str, Any]

    def to_json(self) -> str:
        """Return ``{"rows", "environment", "version"}`` as JSON text."""
        document = {
            "rows": [asdict(row) for row in self.rows],
            "environment": self.environment,
            "version": VERSION,
        }
        return json_text(document)

    def to_csv(self) -> str:
        """Return a line per row; standard errors are columns of their own."""
        speeds = ("prefill_tps", "decode_tps")
        return csv_text(
            [
                {"schedule": row.schedule, "average_bits": row.average_bits}
                | dict(row.metrics)
                | {name: getattr(row, name) for name in speeds}
                for row in self.rows
            ]
        )

    def to_markdown(self) -> str:
        """Return the table."""
        header = ["schedule", "average bits", *(metric.label for metric in self.metrics)]
        table = [[*header, "prefill tokens/s", "decode tokens/s"]]
        for row in self.rows:
            quality = [_cell(metric, row) for metric in self.metrics]
            speeds = [format_number(row.prefill_tps, 1), format_number(row.decode_tps, 1)]
            table.append([row.schedule, format_number(row.average_bits, 2), *quality, *speeds])
        return markdown_table(table)


def format_number(value: float | None, digits: int) -> str:
    """Return a number as shown in tables; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _cell(metric: Metric, row: Row) -> str:
    text, error = format_number(row.metrics[metric.name], metric.digits), row.stderr(metric)
    return f"{text} ± {format_number(error, metric.digits)}" if error else text
