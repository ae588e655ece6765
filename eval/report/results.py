"""What an evaluation measured: one row per way of decoding, with every sample behind it; JSON, CSV and markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from pmpd.eval.measure.scoring import Metric, Sample
from pmpd.eval.measure.statistics import PLUS_MINUS, Estimate, weighted_mean
from pmpd.runtime.console.output import csv_text, json_text, markdown_table
from pmpd.runtime.errors import PmpdError

__all__ = ["FP", "VERSION", "QualityResults", "QualityRow", "count_text", "format_number"]

FP = "fp"
VERSION = 2


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
        decode_tps: tokens per second: all decode steps over all their seconds; None where not measured.
        samples: what it rests on.
    """

    name: str
    accuracy: str | None
    average_bits: float | None
    step_bytes: float | None
    metrics: Mapping[str, Estimate]
    decode_tps: Estimate | None
    samples: tuple[Sample, ...]

    @property
    def own_prefill(self) -> bool:
        """Whether the schedule has a precision of its own for prompts."""
        return self.name.startswith("prefill:")

    @property
    def token_bits(self) -> float:
        """Mean bits of the passes that gave the tokens after the first: how exact a row is, not what it costs."""
        bits = [precision for sample in self.samples for precision in sample.precisions[1:]]
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
        steps = sum(len(sample.precisions[1:]) for sample in samples)
        passes = [bits for s in samples for bits in (*s.precisions[1:], *s.first_passes.values())]
        return cls(
            name=name,
            accuracy=accuracy,
            average_bits=sum(passes) / steps if steps else None,
            step_bytes=sum(bytes_at[bits] for bits in passes) / steps if bytes_at and steps else None,
            metrics={metric.name: metric.estimate(samples) for metric in metrics},
            decode_tps=_rate([(len(sample.seconds[1:]), sum(sample.seconds[1:])) for sample in samples]),
            samples=tuple(samples),
        )


@dataclass(frozen=True, kw_only=True)
class QualityResults:
    """A whole evaluation.

    Attributes:
        rows: the floating-point one first.
        metrics: the columns.
        environment: where and with what it was measured.
        unfinished: names of the rows that were not measured, because something ended the evaluation early.
        cause: what did: Ctrl-C, a signal or a failure.
    """

    rows: tuple[QualityRow, ...]
    metrics: tuple[Metric, ...]
    environment: Mapping[str, Any]
    unfinished: tuple[str, ...] = ()
    cause: KeyboardInterrupt | PmpdError | None = None

    @property
    def schedules(self) -> tuple[QualityRow, ...]:
        """The rows of the bundle."""
        return tuple(row for row in self.rows if row.name != FP)

    @property
    def prefill_tps(self) -> dict[str, Estimate]:
        """Prompt tokens per second of the prefill graph, by accuracy, and of ``fp``."""
        groups: dict[str, list[Sample]] = {}
        for row in self.rows:
            if row.own_prefill:
                continue
            groups.setdefault(row.accuracy or FP, []).extend(row.samples)
        rates = {name: _rate([(s.prompt_tokens, s.prefill_seconds) for s in group]) for name, group in groups.items()}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def high(self, row: QualityRow) -> QualityRow:
        """Return the row whose tokens have most bits, of the same kernels: what others are compared with beside fp."""
        return max(
            (other for other in self.schedules if other.accuracy == row.accuracy),
            key=lambda r: (r.token_bits, not r.own_prefill, -(r.average_bits or 0)),
        )

    @property
    def progress(self) -> str:
        """How much of the evaluation there is, for a message."""
        return f"{len(self.rows)} of {len(self.rows) + len(self.unfinished)} rows are finished"

    def difference(self, metric: Metric, row: QualityRow, other: QualityRow) -> Estimate:
        """Return a metric of a row minus that of another, paired by item."""
        return metric.difference(row.samples, other.samples)

    def heading(self, metric: Metric) -> str:
        """Return a metric's name and what it is a mean of."""
        return f"{metric.label} ({metric.counted(self.rows[-1].samples)})"

    def notes(self) -> list[str]:
        """Return what a reader of the table must know, a sentence or two per line."""
        prefill = [
            f"{rate.text(1)} tokens/s" + (f" ({name})" if len(self.prefill_tps) > 2 else "")
            for name, rate in self.prefill_tps.items()
            if name != FP
        ]
        lines = [
            f"{PLUS_MINUS} over answers (windows of text for perplexity).",
            "average bits: of the decoder's linear layers, mean over decode steps; the first token of an answer "
            "(prefill) and the step that ends it do not count; of a step that is run again both passes do. MB/token: "
            "all weights that a step reads, output layer included, KV cache not.",
        ]
        if prefill:
            lines.append(f"Prompts, unless a schedule says prefill: {', '.join(prefill)}.")
        if any(row.decode_tps for row in self.schedules):
            lines.append("decode tokens/s: all decode steps of all answers over all their seconds.")
        return lines

    def to_json(self) -> str:
        """Return ``{"rows", "prefill_tps", "unfinished", "environment", "version"}`` as JSON text."""
        document = {
            "rows": [asdict(row) for row in self.rows],
            "prefill_tps": {name: asdict(rate) for name, rate in self.prefill_tps.items()},
            "unfinished": self.unfinished,
            "environment": self.environment,
            "version": VERSION,
        }
        return json_text(document)

    def to_csv(self) -> str:
        """Return a line per row; half-widths of 95 % intervals are columns of their own, ``<name>_ci95``."""
        lines = []
        for row in self.rows:
            line: dict[str, object] = {
                "name": row.name,
                "average_bits": row.average_bits,
                "step_bytes": row.step_bytes,
            }
            for name, estimate in [*row.metrics.items(), ("decode_tps", row.decode_tps)]:
                line |= {name: estimate and estimate.value, f"{name}_ci95": estimate and estimate.ci95}
            lines.append(line)
        return csv_text(lines)

    def to_markdown(self) -> str:
        """Return the verdict, the table, and notes on it."""
        from pmpd.eval.report.verdict import verdict

        table = [["schedule", "average bits", "MB/token", *map(self.heading, self.metrics), "decode tokens/s"]]
        for row in self.rows:
            table.append(
                [
                    row.name,
                    format_number(row.average_bits, 2),
                    format_number(row.step_bytes and row.step_bytes / 1e6, 1),
                    *(row.metrics[metric.name].text(metric.digits) for metric in self.metrics),
                    row.decode_tps.text(1) if row.decode_tps and row.name != FP else "–",
                ]
            )
        return "\n\n".join(["\n".join(verdict(self)), markdown_table(table), "\n".join(self.notes())])


def count_text(number: int, noun: str) -> str:
    """Return a number of things: ``1 window``, ``2 windows``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def format_number(value: float | None, digits: int) -> str:
    """Return a number as shown in tables; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _rate(spent: Sequence[tuple[int, float]]) -> Estimate | None:
    """Return things per second: all of them over all seconds, from the count and the seconds of each sample."""
    timed = [(count, seconds) for count, seconds in spent if count and seconds > 0]
    if not timed:
        return None
    seconds_each, stderr = weighted_mean([s / count for count, s in timed], [float(count) for count, _ in timed])
    return Estimate.from_stderr(1 / seconds_each, stderr / seconds_each**2, len(timed))
