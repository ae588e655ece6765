"""What a search found, as a table for people and as JSON for the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pmpd.eval.metrics.base import Metric
from pmpd.eval.metrics.statistics import Estimate
from pmpd.eval.solve.race import Contestant, Race, Tolerance
from pmpd.runtime import Schedule
from pmpd.runtime.console.output import json_text, markdown_table

__all__ = ["Phase", "Solution"]


@dataclass(frozen=True)
class Phase:
    """One part of a search: its name, what came of it, and the decode steps that it computed."""

    name: str
    race: Race[Schedule]
    steps: int


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A schedule for a task, and what it rests on.

    Attributes:
        task, data, data_sha256: what was asked.
        samples: how many.
        skipped: those that did not fit the model's context.
        metric: by which quality was measured.
        tolerance: how much of it might be lost.
        objective: what was minimized.
        target_tps: the speed that was asked for, if one was.
        reference: the highest precision, which all are compared with.
        best: the schedule that was found.
        bits: mean bits of the decode steps of all answers under each schedule, a second pass added to the first; None
            if there are no such steps.
        costs: of such a step on average, in what was minimized.
        phases: the search.
    """

    task: str
    data: str
    data_sha256: str
    samples: int
    skipped: int
    metric: Metric
    tolerance: Tolerance
    objective: str
    target_tps: float | None
    reference: Schedule
    best: Schedule
    bits: Mapping[Schedule, float | None]
    costs: Mapping[Schedule, float | None]
    phases: tuple[Phase, ...]

    @property
    def loss(self) -> Estimate:
        """The metric under the schedule that was found minus that of the reference, paired."""
        if self.best == self.reference:
            return Estimate(0.0, 0.0, self.samples)
        return next(c.difference for c in self._rows() if c.schedule == self.best)

    @property
    def verdict(self) -> str:
        """What was found, in a sentence."""
        label, bits, high = self.metric.label, self.bits[self.best], self.bits[self.reference]
        if high is None:
            return f"{self.best}: all answers have one token, so there is no decode step to lower"
        if self.best == self.reference:
            return f"{self.best}: no lower precision keeps {label} within {self.tolerance}"
        return (
            f"{self.best}: {bits:.2f} bits on average where {self.reference} has {high:.2f}, {label} "
            f"{self._difference(self.loss)} on {self.samples} samples"
        )

    @property
    def caution(self) -> str | None:
        """What more samples would change, where the interval of the loss is wider than the tolerance; else None."""
        allowed = self.tolerance.allows(Estimate.of(self.phases[0].race.reference).value)
        if self.target_tps is not None or self.best == self.reference or (self.loss.ci95 or 0.0) <= allowed:
            return None
        return (
            f"The tolerance of {self.tolerance} is {allowed:.{self.metric.digits}f} here, less than {self.samples} "
            "samples can tell apart: give more, or check the schedule on other data (pmpd-eval)."
        )

    def to_markdown(self) -> str:
        """Return the table of all candidates, and the verdict."""
        scored = self._rows()
        header = ["schedule", "average bits", "samples", self.metric.label, f"difference to {self.reference}", ""]
        reference = Estimate.of(self.phases[0].race.reference)
        table = [header]
        if self.reference not in {row.schedule for row in scored}:
            count, score = str(reference.count), self._score(reference)
            table.append([str(self.reference), self._bits(self.reference), count, score, "", ""])
        for row in scored:
            mean = Estimate.of(row.scores)
            what = "found" if row.schedule == self.best else "" if row.keeps else "loses too much"
            difference = "" if row.schedule == self.reference else self._difference(row.difference)
            cells = [str(row.schedule), self._bits(row.schedule), str(mean.count), self._score(mean), difference, what]
            table.append(cells)
        steps = sum(phase.steps for phase in self.phases)
        notes = f"{steps:,} decode steps computed; ± is half of a 95 % interval, differences are paired."
        return "\n".join(filter(None, [f"{markdown_table(table)}\n", self.verdict, self.caution, notes]))

    def to_json(self) -> str:
        """Return everything as JSON text."""
        document: dict[str, Any] = {
            "schedule": str(self.best),
            "verdict": self.verdict,
            "caution": self.caution,
            "task": self.task,
            "data": {"name": self.data, "sha256": self.data_sha256, "samples": self.samples, "skipped": self.skipped},
            "metric": self.metric.name,
            "tolerance": str(self.tolerance),
            "minimize": self.objective,
            "target_tps": self.target_tps,
            "reference": str(self.reference),
            "phases": [
                {
                    "name": phase.name,
                    "decode_steps": phase.steps,
                    "candidates": [self._json(row) for row in phase.race.contestants],
                }
                for phase in self.phases
            ],
        }
        return json_text(document)

    def _json(self, row: Contestant[Schedule]) -> dict[str, Any]:
        return {
            "schedule": str(row.schedule),
            "average_bits": self.bits[row.schedule],
            "cost": self.costs[row.schedule],
            "score": asdict(Estimate.of(row.scores)),
            "difference": asdict(row.difference),
            "keeps_quality": row.keeps,
        }

    def _rows(self) -> list[Contestant[Schedule]]:
        """Return the candidates of all phases, each once, in their order."""
        rows = {row.schedule: row for phase in self.phases for row in phase.race.contestants}
        return list(rows.values())

    def _bits(self, schedule: Schedule) -> str:
        bits = self.bits[schedule]
        return "–" if bits is None else f"{bits:.2f}"

    def _score(self, estimate: Estimate) -> str:
        return estimate.text(self.metric.digits)

    def _difference(self, estimate: Estimate) -> str:
        return estimate.text(self.metric.digits, sign=True)
