"""The two observations behind PMPD, on a bundle: ``python -m pmpd.eval.recipes.observations BUNDLE --task …``.

The first (paper, Section 3.1 and Table 4): low bits do more harm to the prompt than to the answer. The second
(Section 3.2 and Figure 3): with half of the decode steps at high precision, the first half is the best one. Every
answer may be as long as the one that the high precision gives throughout, as in the paper.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from pmpd.eval.measure.metrics import rouge, rouge_scorer
from pmpd.eval.measure.models import Answer
from pmpd.eval.measure.statistics import PLUS_MINUS, Estimate
from pmpd.eval.runner import Settings, prepare, read_items
from pmpd.eval.solve.forks import Forks
from pmpd.eval.tasks.base import Item
from pmpd.eval.tasks.options import TASK_OPTIONS
from pmpd.eval.tasks.rouge import Rouge
from pmpd.runtime import Bundle, Generator
from pmpd.runtime.console.command import FILE, Command, check_outputs, is_quiet, json_option, print_result
from pmpd.runtime.console.output import json_text, markdown_table
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["HALVES", "Observations", "main", "observe"]

HALVES: dict[str, Callable[[int, int], Sequence[int]]] = {
    "first half": lambda steps, count: range(count),
    "middle half": lambda steps, count: range((steps - count) // 2, (steps + count) // 2),
    "last half": lambda steps, count: range(steps - count, steps),
    "every other step": lambda steps, count: range(0, steps, 2),
}
"""Which `count` of an answer's decode steps have the high precision. Random ones are drawn for each sample besides."""


@dataclass(frozen=True)
class _Steps:
    """A schedule as a list: the precision of each decode step, and of the prompt."""

    bits: tuple[float, ...]
    prefill: float

    def precision(self, step: int) -> float:
        return self.bits[min(step, len(self.bits) - 1)]


@dataclass(frozen=True, kw_only=True)
class Observations:
    """Scores of every way to share out two precisions, by sample.

    Attributes:
        high, low: the precisions, in bits.
        bits: mean bits of the decode steps of each row.
        to_reference: ROUGE-L to the reference texts, where the data have any.
        to_high: ROUGE-L to the answer that is high throughout.
    """

    high: float
    low: float
    bits: dict[str, float] = field(default_factory=dict)
    to_reference: dict[str, list[float]] = field(default_factory=dict)
    to_high: dict[str, list[float]] = field(default_factory=dict)

    def to_markdown(self) -> str:
        """Return a table: scores, and the paired differences to the row that is high throughout."""
        first = next(iter(self.to_high))
        samples = len(self.to_high[first])
        head = ["prompt, decode steps", "average bits"]
        if self.to_reference:
            head += ["ROUGE-L", f"difference to {first}"]
        table = [[*head, f"ROUGE-L to the answer of {first}"]]
        for name, scores in self.to_high.items():
            cells = [name, f"{self.bits[name]:.2f}"]
            if self.to_reference:
                ours, theirs = self.to_reference[name], self.to_reference[first]
                gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
                cells += [Estimate.of(ours).text(2), "" if name == first else Estimate.of(gaps).text(2, sign=True)]
            table.append([*cells, Estimate.of(scores).text(2)])
        return f"{markdown_table(table)}\n\n{samples} samples; {PLUS_MINUS}, of differences a paired one."

    def to_json(self) -> str:
        """Return all scores as JSON text."""
        return json_text(asdict(self))


def observe(bundle: Bundle, settings: Settings, *, high: float, low: float, quiet: bool = True) -> Observations:
    """Answer the items of a task with each share of two precisions.

    Args:
        bundle: the model.
        settings: task, data and its options; schedules do not matter.
        high: bits; the prompt has them, too, where a row does not say otherwise.
        low: fewer bits.
        quiet: show no progress.

    Raises:
        PmpdError: a precision that the bundle lacks, a task without answers, or data that do not fit.
    """
    for precision in (high, low):
        if precision not in bundle.manifest.precisions:
            raise PmpdError(unknown_choice("precision", precision, bundle.manifest.precisions))
    if high <= low:
        raise PmpdError(f"the high precision must be above the low one, got {high:g} and {low:g}")
    task, _ = prepare(bundle, settings)
    if not isinstance(task, Rouge):
        raise PmpdError(
            f"the task {settings.task} gives no answers: choose dialogsum, cnn_dailymail, mt_bench or jsonl"
        )
    rouge_scorer()
    items, _ = read_items(task, settings)
    generator = Generator(bundle, threads=settings.threads, context_length=max(map(task.positions, items)))
    results = Observations(high=high, low=low)
    bits: dict[str, list[float]] = {}
    for index, item in enumerate(track(items, step="answers", total=len(items), quiet=quiet)):
        answers = _answers(generator, task, item, high, low, seed=index)
        whole = task.tokenizer.decode(next(iter(answers.values())).ids)
        for name, answer in answers.items():
            text = task.tokenizer.decode(answer.ids)
            results.to_high.setdefault(name, []).append(rouge(text, [whole])["rougeL"])
            if item.references:
                results.to_reference.setdefault(name, []).append(rouge(text, item.references)["rougeL"])
            bits.setdefault(name, []).extend(answer.precisions[1:])
    results.bits.update({name: sum(values) / max(1, len(values)) for name, values in bits.items()})
    return results


def _answers(
    generator: Generator, task: Rouge, item: Item, high: float, low: float, *, seed: int
) -> Mapping[str, Answer]:
    """Return the answer of every row, the one that is high throughout first."""
    name = f"{high:g}, {high:g}"
    whole = _Steps((high,), high)
    forks = Forks(generator, max_new_tokens=task.max_new_tokens, stop_ids=task.stop_ids)
    answers = {name: dict(forks.answers(item.ids, [whole]))[whole]}
    steps = max(0, len(answers[name].ids) - 1)
    rows = {
        f"{high:g}, {low:g}": _Steps((low,), high),
        f"{low:g}, {high:g}": _Steps((high,), low),
        f"{low:g}, {low:g}": _Steps((low,), low),
    }
    count = (steps + 1) // 2
    halves = {half: steps_of(steps, count) for half, steps_of in HALVES.items()}
    halves["random half"] = random.Random(seed).sample(range(steps), count)
    for half, chosen in halves.items():
        bits = tuple(high if step in chosen else low for step in range(steps))
        rows[f"{high:g}, {high:g} in the {half}".replace("the every", "every")] = _Steps(bits or (low,), high)
    forks = Forks(generator, max_new_tokens=steps + 1, stop_ids=task.stop_ids)
    by_schedule = dict(forks.answers(item.ids, set(rows.values())))
    return answers | {row: by_schedule[schedule] for row, schedule in rows.items()}


@click.command("python -m pmpd.eval.recipes.observations", cls=Command, extra="cpu,eval")
@click.argument("bundle", type=FILE)
@click.option("--task", required=True, metavar="NAME", help="dialogsum, cnn_dailymail, mt_bench or jsonl (yours).")
@click.option("--data", metavar="FILE", type=FILE, required=True, help="Examples: JSON lines (.jsonl, .jsonl.gz).")
@TASK_OPTIONS
@click.option("--high", type=float, metavar="BITS", help="The high precision.  [default: the bundle's lowest but one]")
@click.option("--low", type=float, metavar="BITS", help="The low precision.  [default: the bundle's lowest]")
@click.option("--threads", type=int, metavar="N", help="Threads to compute with.  [default: all processors]")
@json_option()
def main(
    bundle: Path,
    high: float | None,
    low: float | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """See whether the paper's two observations hold: what low bits do to prompts and to parts of answers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    check_outputs(json_file)
    opened = Bundle.open(bundle, verify=True)
    precisions = opened.manifest.precisions
    results = observe(
        opened,
        Settings(**options),
        high=high or precisions[-2:][0],
        low=low or precisions[-1],
        quiet=is_quiet(),
    )
    print_result(results.to_markdown(), json_file, results.to_json)


if __name__ == "__main__":
    main()
