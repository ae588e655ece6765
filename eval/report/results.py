"""What an evaluation measured: one row per way of decoding, with every sample behind it; JSON, CSV and markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pmpd.eval.measure.examiner import FP
from pmpd.eval.measure.samples import sample_from
from pmpd.eval.metrics.base import Metric, Sample
from pmpd.eval.metrics.registry import METRICS
from pmpd.eval.metrics.statistics import PLUS_MINUS, Estimate
from pmpd.runtime.console.output import csv_text, json_text, markdown_table
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.schedule.registry import parse_schedule
from pmpd.runtime.schedule.static import StaticSchedule

__all__ = ["AVERAGE_BITS", "VERSION", "QualityResults", "QualityRow", "count_text", "format_number"]

VERSION = 3
AVERAGE_BITS = (
    "average bits: of the decoder's linear layers, mean over decode steps; the first token of an answer (prefill) and "
    "the step that ends it do not count; of a step that is run again both passes do."
)


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One way of decoding: the bundle under a schedule, or ``fp``, the floating-point model.

    Attributes:
        name: the full text of the schedule (and the accuracy, where there are several), or ``fp``.
        accuracy: how the compiled kernels computed; None for ``fp``.
        average_bits: mean bits over the decode steps of all samples (paper, Section 5 "Baselines"): of the decoder's
            linear layers, without output layer and embedding. The first token of an answer comes from prefill and does
            not count, nor does the step that ends an answer. A step that was run again counts with the bits of both
            passes. None without any decode step.
        step_bytes: bytes of weights that a decode step reads, on average, in all its passes, output layer and embedding
            row included; None for ``fp``.
        metrics: each metric over all samples.
        samples: what it rests on.
        decode_tps: tokens per second, where speed was measured.
        step_seconds: mean time of each decode step of that measurement, by position.
    """

    name: str
    accuracy: str | None
    average_bits: float | None
    step_bytes: float | None
    metrics: Mapping[str, Estimate]
    samples: tuple[Sample, ...]
    decode_tps: Estimate | None = None
    step_seconds: tuple[float, ...] = ()

    @property
    def own_prefill(self) -> bool:
        """Whether the schedule has a precision of its own for prompts."""
        return self.name.startswith("prefill:")

    @property
    def token_bits(self) -> float:
        """Mean bits of the passes that gave the tokens after the first: how exact a row is, not what it costs."""
        bits = [bits for sample in self.samples for turn in sample.turns for bits in turn.precisions[1:]]
        return sum(bits) / max(1, len(bits))

    @classmethod
    def of(
        cls,
        name: str,
        samples: Sequence[Sample],
        metrics: Sequence[Metric],
        *,
        accuracy: str | None = None,
        bytes_at: Mapping[float, float] | None = None,
    ) -> Self:
        """Make a row of its samples; `bytes_at` are the bytes that a decode step reads at each precision."""
        steps = sum(sample.steps for sample in samples)
        passes = [bits for sample in samples for bits in sample.passes]
        return cls(
            name=name,
            accuracy=accuracy,
            average_bits=sum(passes) / steps if steps else None,
            step_bytes=sum(bytes_at[bits] for bits in passes) / steps if bytes_at and steps else None,
            metrics={metric.name: metric.estimate(samples) for metric in metrics},
            samples=tuple(samples),
        )


@dataclass(frozen=True, kw_only=True)
class QualityResults:
    """A whole evaluation.

    Attributes:
        rows: the floating-point one first.
        metrics: the columns; the first one is what the verdict is about.
        environment: where and with what it was measured.
        prefill_tps: prompt tokens per second, by accuracy, where speed was measured.
    """

    rows: tuple[QualityRow, ...]
    metrics: tuple[Metric, ...]
    environment: Mapping[str, Any]
    prefill_tps: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def schedules(self) -> tuple[QualityRow, ...]:
        """The rows of the bundle."""
        return tuple(row for row in self.rows if row.name != FP)

    @property
    def fp(self) -> QualityRow | None:
        """The row of the floating-point model, if it was run."""
        return next((row for row in self.rows if row.name == FP), None)

    def high(self, row: QualityRow) -> QualityRow:
        """Return the row whose tokens have most bits, of the same kernels: what others are compared with beside fp.

        A row that no kernels computed is compared with the first ones'.
        """
        accuracy = row.accuracy or next((other.accuracy for other in self.schedules if other.accuracy), None)
        others = [other for other in self.schedules if other.accuracy == accuracy]
        return max(others, key=lambda r: (r.token_bits, not r.own_prefill, -(r.average_bits or 0)))

    def static(self, row: QualityRow) -> StaticSchedule | None:
        """Return the schedule of a row, if it is static: it does not look at the prompt."""
        precisions = self.environment["bundle"]["precisions"]
        try:
            schedule = parse_schedule(row.name.removesuffix(f" {row.accuracy}"), precisions)
        except PmpdError:  # fp, and one that is kept in the bundle
            return None
        return schedule if isinstance(schedule, StaticSchedule) else None

    def difference(self, metric: Metric, row: QualityRow, other: QualityRow) -> Estimate:
        """Return a metric of a row minus that of another, paired by item."""
        return metric.difference(row.samples, other.samples)

    def to_fp(self, metric: Metric, row: QualityRow) -> Estimate | None:
        """Return the difference to the floating-point model; None for itself, and where it was not run."""
        return None if self.fp is None or row is self.fp else self.difference(metric, row, self.fp)

    def to_high(self, metric: Metric, row: QualityRow) -> Estimate | None:
        """Return the difference to the row of most bits; None for itself and the floating-point model."""
        if row.name == FP or row is self.high(row):
            return None
        return self.difference(metric, row, self.high(row))

    def heading(self, metric: Metric) -> str:
        """Return a metric's name and what it is a mean of."""
        return f"{metric.label} ({metric.counted(self.rows[-1].samples)})"

    def samples_note(self) -> str:
        """Return how many samples there are, and what ± and the differences are."""
        skipped = self.environment["data"]["skipped"]
        samples = self.environment["samples"]
        groups = len({sample.group for sample in self.rows[0].samples})
        of = f" of {count_text(groups, 'document')}, which are what is drawn" if groups < samples else ""
        return (
            f"{count_text(samples, 'sample')}{of}; {skipped} skipped. {PLUS_MINUS}, by bootstrap. "
            "Differences are paired: all rows have the same samples."
        )

    def notes(self) -> list[str]:
        """Return what a reader of the table must know, a sentence or two per line."""
        highs = dict.fromkeys(self.high(row).name for row in self.schedules)
        lines = [
            self.samples_note(),
            f"to high: to {', '.join(highs)}. {AVERAGE_BITS} MB/token: all weights that a step reads, output layer "
            "included, KV cache not.",
        ]
        if self.prefill_tps:
            rates = (
                f"{rate.text(1)} tokens/s" + (f" ({name})" if len(self.prefill_tps) > 1 else "")
                for name, rate in self.prefill_tps.items()
            )
            lines.append(
                f"decode tokens/s: all rows in turn, over repetitions. Prompts, unless a schedule says prefill: "
                f"{', '.join(rates)}."
            )
        return lines

    def to_json(self, *, texts: bool = True) -> str:
        """Return ``{"rows", "metrics", "prefill_tps", "verdict", "environment", "version"}`` as JSON text.

        Args:
            texts: with the data's texts, prompts and references, and the tokens of answers.
        """
        from pmpd.eval.report.verdict import verdict

        conclusion, rows = verdict(self), []
        for row in self.rows:
            document = asdict(row)
            if not texts:
                for sample in document["samples"]:
                    del sample["prompt"], sample["reference"]
                    for turn in sample["turns"]:
                        del turn["ids"]
            pairs = {metric.name: (self.to_fp(metric, row), self.to_high(metric, row)) for metric in self.metrics}
            document["differences"] = {
                name: {"fp": fp and asdict(fp), "high": high and asdict(high)} for name, (fp, high) in pairs.items()
            }
            rows.append(document)
        return json_text(
            {
                "version": VERSION,
                "verdict": {
                    "recommended": conclusion.row and conclusion.row.name,
                    "reason": conclusion.reason,
                    "caution": conclusion.caution,
                },
                "metrics": [metric.name for metric in self.metrics],
                "prefill_tps": {name: asdict(rate) for name, rate in self.prefill_tps.items()},
                "environment": self.environment,
                "rows": rows,
            }
        )

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read what `to_json` wrote.

        Raises:
            PmpdError: the file cannot be read, is something else, or of another version.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not JSON"
            raise PmpdError(f"{path} cannot be read: {reason}") from None
        version = document.get("version") if isinstance(document, dict) else None
        if not isinstance(document, dict) or not {"rows", "prefill_tps", "environment"} <= document.keys():
            raise PmpdError(f"{path} is not a result of pmpd-eval quality: give a file that its --json wrote")
        if version != VERSION:
            raise PmpdError(f"{path} is of version {version}, and this is version {VERSION}: measure it again")
        try:
            metrics = tuple(METRICS[name] for name in document["metrics"])
            rows = tuple(_row(row) for row in document["rows"])
            prefill = {name: Estimate(**rate) for name, rate in document["prefill_tps"].items()}
            return cls(rows=rows, metrics=metrics, environment=document["environment"], prefill_tps=prefill)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PmpdError(f"{path} is damaged ({error!r:.80}): measure it again") from None

    def to_csv(self) -> str:
        """Return a line per row; half-widths of 95 % intervals are columns of their own, ``<name>_ci95``."""
        lines = []
        for row in self.rows:
            line: dict[str, object] = {
                "name": row.name,
                "average_bits": row.average_bits,
                "step_bytes": row.step_bytes,
                "samples": len(row.samples),
            }
            for metric in self.metrics:
                name = metric.name
                line |= _columns(name, row.metrics[name])
                line |= _columns(f"{name}_to_fp", self.to_fp(metric, row))
                line |= _columns(f"{name}_to_high", self.to_high(metric, row))
            lines.append(line | _columns("decode_tps", row.decode_tps))
        return csv_text(lines)

    def to_markdown(self) -> str:
        """Return the verdict, the table, and notes on it."""
        from pmpd.eval.report.verdict import verdict

        return "\n\n".join([verdict(self).text, markdown_table(self.table()), "\n".join(self.notes())])

    def table(self) -> list[list[str]]:
        """Return the table as cells, its heading first; differences are those of the first metric."""
        first, *others = self.metrics
        timed = any(row.decode_tps for row in self.schedules)
        head = ["schedule", "average bits", "MB/token", self.heading(first), "to fp", "to high"]
        table = [[*head, *map(self.heading, others), *(["decode tokens/s"] if timed else [])]]
        for row in self.rows:
            gaps = (self.to_fp(first, row), self.to_high(first, row))
            cells = [
                row.name,
                format_number(row.average_bits, 2),
                format_number(row.step_bytes and row.step_bytes / 1e6, 1),
                row.metrics[first.name].text(first.digits),
                *(gap.text(first.digits, sign=True) if gap else "–" for gap in gaps),
                *(row.metrics[metric.name].text(metric.digits) for metric in others),
            ]
            table.append(cells + ([row.decode_tps.text(1) if row.decode_tps else "–"] if timed else []))
        return table


def _columns(name: str, estimate: Estimate | None) -> dict[str, object]:
    return {name: estimate and estimate.value, f"{name}_ci95": estimate and estimate.ci95}


def _row(document: Mapping[str, Any]) -> QualityRow:
    """Return a row of its JSON."""
    speed = document["decode_tps"]
    return QualityRow(
        name=document["name"],
        accuracy=document["accuracy"],
        average_bits=document["average_bits"],
        step_bytes=document["step_bytes"],
        metrics={name: Estimate(**value) for name, value in document["metrics"].items()},
        samples=tuple(sample_from(sample) for sample in document["samples"]),
        decode_tps=speed and Estimate(**speed),
        step_seconds=tuple(document["step_seconds"]),
    )


def count_text(number: int, noun: str) -> str:
    """Return a number of things: ``1 window``, ``2 windows``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def format_number(value: float | None, digits: int) -> str:
    """Return a number as shown in tables; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"
