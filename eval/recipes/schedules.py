"""Schedules beside uniform precisions and choices at random: ``python -m pmpd.eval.recipes.schedules BUNDLE --task …``.

The rows of the paper's Tables 1 and 2 for any bundle and task: the lowest precision for prompt and answer (baseline-l),
the highest (baseline-h), the schedules that are asked for, and for a learned one the two random schedulers of Figure 7,
which choose among the same schedules: all alike, or as often as each was a label in training. A third makes the learned
choices in any order. What these give is not drawn but computed: the mean over all that they might choose.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from pmpd.eval.measure.metrics import rouge_scorer
from pmpd.eval.measure.scoring import Metric
from pmpd.eval.measure.statistics import PLUS_MINUS, Estimate
from pmpd.eval.runner import Settings, prepare, read_items
from pmpd.eval.solve.examiner import Examiner, Outcome, Setup
from pmpd.eval.solve.outcomes import Outcomes
from pmpd.eval.tasks.options import TASK_OPTIONS
from pmpd.eval.tasks.rouge import Rouge
from pmpd.runtime import Bundle, Schedule, StaticSchedule
from pmpd.runtime.console.command import FILE, Command, check_outputs, is_quiet, json_option, print_result
from pmpd.runtime.console.output import json_text, markdown_table
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.precision import parse_precision
from pmpd.runtime.schedule.learned import LearnedSchedule

__all__ = ["Row", "Table", "compare_schedules", "main"]


@dataclass(frozen=True)
class Row:
    """A schedule: its scores by sample, and the bits and the number of its decode steps, by sample."""

    scores: tuple[float, ...]
    bits: tuple[float, ...]
    steps: tuple[float, ...]

    @property
    def average_bits(self) -> float:
        """Mean bits of a decode step."""
        return sum(self.bits) / max(1.0, sum(self.steps))


@dataclass(frozen=True)
class Table:
    """All rows by name, `high` the one that others are compared with."""

    metric: Metric
    high: str
    rows: Mapping[str, Row]

    def ahead(self, name: str, other: str | None = None) -> Estimate:
        """Return by how much a row is ahead of another, paired; default of `high`."""
        pairs = zip(self.rows[name].scores, self.rows[other or self.high].scores, strict=True)
        return Estimate.of([ours - theirs for ours, theirs in pairs])

    def to_markdown(self) -> str:
        """Return the table."""
        digits = self.metric.digits
        table = [["schedule", "average bits", self.metric.label, f"difference to {self.high}"]]
        for name, row in self.rows.items():
            difference = "" if name == self.high else self.ahead(name).text(digits, sign=True)
            table.append([name, f"{row.average_bits:.2f}", Estimate.of(row.scores).text(digits), difference])
        return f"{markdown_table(table)}\n\n{len(self.rows[self.high].scores)} samples; {PLUS_MINUS}, paired."

    def to_json(self) -> str:
        """Return everything as JSON text."""
        rows = {
            name: {**asdict(row), "average_bits": row.average_bits, "difference": asdict(self.ahead(name))}
            for name, row in self.rows.items()
        }
        return json_text({"metric": self.metric.name, "high": self.high, "rows": rows})


def compare_schedules(bundle: Bundle, settings: Settings, *, quiet: bool = True) -> Table:
    """Answer the items of a task under schedules.

    Args:
        bundle: the model.
        settings: task, data and schedules; without a reference model, items without references are compared with the
            answer of the highest precision.
        quiet: show no progress.

    Raises:
        PmpdError: a task without answers, or schedules or data that do not fit.
    """
    task, asked = prepare(bundle, settings)
    if not isinstance(task, Rouge):
        raise PmpdError(
            f"the task {settings.task} gives no answers: choose dialogsum, cnn_dailymail, mt_bench or jsonl"
        )
    rouge_scorer()
    items, _ = read_items(task, settings)
    precisions = bundle.manifest.precisions
    high, low = StaticSchedule(((precisions[0], 0),)), precisions[-1]
    uniform = [StaticSchedule(((precision, 0),)) for precision in precisions]
    fixed: list[Schedule] = [StaticSchedule(((low, 0),), low), *reversed(uniform)]
    learned = [schedule for schedule in asked.values() if isinstance(schedule, LearnedSchedule)]
    fixed += [schedule for schedule in asked.values() if schedule not in fixed and schedule not in learned]
    setup = Setup(task=settings.task)
    generator = setup.load(bundle, context_length=max(map(task.positions, items)), threads=settings.threads)
    examiner = Examiner(task, high, lambda: generator)
    outcomes = Outcomes(examiner, items, path=setup.file(bundle, tokens=task.max_new_tokens))
    every = list(dict.fromkeys([*fixed, *(choice for schedule in learned for choice in schedule.choices)]))
    samples: list[dict[Schedule, Outcome]] = []
    chosen: dict[str, list[int]] = {str(schedule): [] for schedule in learned}
    for index in track(range(len(items)), step="answers", total=len(items), unit="sample", quiet=quiet):
        samples.append(outcomes.of(index, every))
        if learned:
            generator.reset()
            generator.prefill(items[index].ids)
        for schedule in learned:
            layer, view = schedule.card.layer, generator.cache.view()
            chosen[str(schedule)].append(schedule.choose(view.keys(layer), view.values(layer)))
    metric = task.metrics[0]
    rows = {str(schedule): _row([[sample[schedule]] for sample in samples], [1.0], metric) for schedule in fixed}
    for schedule in learned:
        choices = [[sample[choice] for choice in schedule.choices] for sample in samples]
        count = len(schedule.choices)
        shares = {
            str(schedule): np.eye(count)[chosen[str(schedule)]],
            "random, uniform": np.full(count, 1 / count),
            "random, prior": _label_shares(bundle, schedule),
            "random, shuffled": np.bincount(chosen[str(schedule)], minlength=count) / len(items),
        }
        rows |= {name: _row(choices, weights, metric) for name, weights in shares.items() if weights is not None}
    return Table(metric, str(high), rows)


def _row(outcomes: Sequence[Sequence[Outcome]], weights: Any, metric: Metric) -> Row:
    """Return the row of a choice among outcomes: how likely each is ``[choices]``, or for each sample."""
    scores = np.array([[outcome.scores[metric.score] for outcome in sample] for sample in outcomes])
    steps = np.array([[max(0, outcome.tokens - 1) for outcome in sample] for sample in outcomes])
    spent = np.array([[_spent(outcome) for outcome in sample] for sample in outcomes])
    return Row(*(tuple((values * np.asarray(weights)).sum(1).tolist()) for values in (scores, spent, steps)))


def _spent(outcome: Outcome) -> float:
    return sum(parse_precision(precision) * count for precision, count in outcome.passes.items())


def _label_shares(bundle: Bundle, schedule: LearnedSchedule) -> Any:
    """Return how often each choice was a label, by the report beside the network; None where there is none."""
    name = next((name for name, text in bundle.manifest.schedules.items() if text in str(schedule)), None)
    report = bundle.manifest.reports.get(name or "")
    if report is None:
        return None
    shares = json.loads((bundle.path / report).read_text(encoding="utf-8")).get("label_shares")
    return np.array(shares, dtype=float) if shares and len(shares) == len(schedule.choices) else None


@click.command("python -m pmpd.eval.recipes.schedules", cls=Command, extra="cpu,eval")
@click.argument("bundle", type=FILE)
@click.option("--task", required=True, metavar="NAME", help="dialogsum, cnn_dailymail, mt_bench or jsonl (yours).")
@click.option("--data", metavar="FILE", type=FILE, required=True, help="Examples: JSON lines (.jsonl, .jsonl.gz).")
@TASK_OPTIONS
@click.option("--schedule", "schedules", multiple=True, metavar="SPEC", help="A row; a name of the bundle, or a text.")
@click.option("--threads", type=int, metavar="N", help="Threads to compute with.  [default: all processors]")
@json_option()
def main(bundle: Path, json_file: Path | None, **options: Any) -> None:
    """Compare schedules of a bundle with uniform precisions and with choices at random (Tables 1 and 2, Figure 7)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    check_outputs(json_file)
    table = compare_schedules(Bundle.open(bundle, verify=True), Settings(**options), quiet=is_quiet())
    print_result(table.to_markdown(), json_file, table.to_json)


if __name__ == "__main__":
    main()
