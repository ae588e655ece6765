"""Figure 3: which half of an answer's decode steps the high precision is worth most in (paper, Section 3.2).

Every answer may be as long as the one that the high precision gives throughout, as in the paper.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pmpd.eval.measure.examiner import Job, Measured, turn_of
from pmpd.eval.measure.forks import Forks
from pmpd.eval.metrics.base import Sample
from pmpd.eval.tasks.base import Task
from pmpd.runtime import Generator, Schedule

__all__ = ["HALVES", "HalvesExaminer", "rows_of_halves"]

HALVES: Mapping[str, Callable[[int, int], Sequence[int]]] = {
    "first half": lambda steps, count: range(count),
    "middle half": lambda steps, count: range((steps - count) // 2, (steps + count) // 2),
    "last half": lambda steps, count: range(steps - count, steps),
    "every other step": lambda steps, count: range(0, steps, 2),
    "random half": lambda steps, count: random.Random(steps).sample(range(steps), count),
}
"""Which `count` of an answer's decode steps have the high precision."""


@dataclass(frozen=True)
class _Steps:
    """A schedule as a list: the precision of each decode step."""

    bits: tuple[float, ...]
    prefill: float

    def precision(self, step: int) -> float:
        return self.bits[min(step, len(self.bits) - 1)]


def rows_of_halves(high: float, low: float) -> dict[str, str]:
    """Return the names of the rows by label: one for each half, and both precisions throughout."""
    labels = ("high throughout", *HALVES, "low throughout")
    return {label: f"{label}, {high:g} and {low:g} bits" for label in labels}


class HalvesExaminer:
    """Answers items with the high precision in each half of the steps; prompts have the high one, too.

    Args:
        task: what is asked; of a conversation the first turn.
        generator: the bundle, loaded; called when the first job is there.
        high, low: the precisions, in bits.
    """

    chunk = 1

    def __init__(self, task: Task, generator: Callable[[], Generator], high: float, low: float) -> None:
        self._task, self._generator = task, generator
        self._high, self._low = high, low

    def __call__(self, job: Job) -> Measured:
        """Return the samples of an item, by the names of `rows_of_halves`."""
        (item,), task, high, low = job.items, self._task, self._high, self._low
        forks = partial(Forks, self._generator(), stop_ids=task.stop_ids)
        whole = _Steps((high,), high)
        first = forks(max_new_tokens=task.max_new_tokens)
        answers = dict(first.answers(item.ids, [whole]))
        steps = max(0, len(answers[whole].ids) - 1)
        count = (steps + 1) // 2
        rows = {"high throughout": whole, "low throughout": _Steps((low,), high)}
        for half, steps_of in HALVES.items():
            chosen = set(steps_of(steps, count))
            rows[half] = _Steps(tuple(high if step in chosen else low for step in range(steps)) or (high,), high)
        others = forks(max_new_tokens=steps + 1)
        answers |= dict(others.answers(item.ids, set(rows.values()) - {whole}))
        names = rows_of_halves(high, low)
        samples: dict[Schedule | str, Sample] = {
            names[label]: Sample(turns=(turn_of(task.tokenizer, len(item.ids), answers[row]),), scores={})
            for label, row in rows.items()
        }
        return Measured((samples,), first.steps + others.steps)
