"""What a row of the table measures: a model that writes text greedily and scores a given text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import numpy.typing as npt

from pmpd.runtime import AdaptivePlan, Generator, Plan, Sampling, Schedule

__all__ = ["Answer", "Forced", "Scheduled", "forced_steps", "precision_runs"]

ROWS = 256  # of logits that are in memory at once


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A greedy answer: token ids, and the bits each was computed with; token 0 is the prefill's.

    `first_passes` are those of decode steps that the schedule had run again: bits, by the index of the token.
    """

    ids: tuple[int, ...]
    precisions: tuple[float, ...]
    first_passes: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Forced:
    """Some positions of a given answer, scored by teacher forcing.

    Attributes:
        start: the first of them.
        logits: float32 ``[k, V]``: row i predicts token ``start + i`` of the answer.
        precision: bits that these rows were computed with; of token 0 the prefill's.
        first_pass: bits of the first pass of a step that was run again.
    """

    start: int
    logits: npt.NDArray[np.float32]
    precision: float
    first_pass: float | None = None

    @property
    def passes(self) -> tuple[float, ...]:
        """Bits of every pass of a step, in their order."""
        return (self.precision,) if self.first_pass is None else (self.first_pass, self.precision)


def precision_runs(plan: Plan, steps: int) -> Iterator[tuple[int, int, float]]:
    """Split decode steps 0 to `steps` - 1 into runs of one precision: (first step, end, bits)."""
    for precision, run in groupby(range(steps), key=plan.precision):
        indices = list(run)
        yield indices[0], indices[-1] + 1, precision


class Scheduled:
    """A bundle's generator under one schedule."""

    def __init__(self, generator: Generator, schedule: Schedule) -> None:
        self._generator = generator
        self._schedule = schedule

    def generate(self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int]) -> Answer:
        """Answer a prompt greedily under the schedule."""
        tokens = list(
            self._generator.stream(
                prompt,
                max_new_tokens=max_new_tokens,
                schedule=self._schedule,
                sampling=Sampling(),
                stop_ids=tuple(stop_ids),
            )
        )
        return Answer(
            ids=tuple(token.id for token in tokens),
            precisions=tuple(token.precision for token in tokens),
            first_passes={token.index: token.first_pass for token in tokens if token.first_pass is not None},
        )

    def force(self, prompt: Sequence[int], answer: Sequence[int], *, prefill: float | None = None) -> Iterator[Forced]:
        """Score a given answer: each decode step at the precision that the schedule's plan gives to it.

        Steps in a row at one precision go through the graph together, unless the plan looks at each step's logits.

        Args:
            prompt: tokens before the answer.
            answer: one token or more.
            prefill: bits of the prompt; default the schedule's, or the bundle's.
        """
        generator = self._generator
        generator.reset()
        bits = prefill or self._schedule.prefill
        prefilled = generator.prefill(prompt, precision=bits)
        yield Forced(start=0, logits=prefilled[None], precision=bits or generator.bundle.manifest.prefill_precision)
        plan = generator.begin(self._schedule, prefilled)
        yield from forced_steps(generator, plan, answer[:-1], most=ROWS)


def forced_steps(
    generator: Generator, plan: Plan, tokens: Sequence[int], *, most: int | None = None
) -> Iterator[Forced]:
    """Append tokens to what the cache holds, as decode steps 0, 1, … at the precisions that a plan gives to them.

    Args:
        generator: it holds the prompt that the plan is for, and nothing after it.
        plan: of the answer that begins with the tokens.
        tokens: the answer's tokens.
        most: the most steps that one call computes, which bounds the memory of their logits; default no limit.

    Raises as `Generator.decode` does.
    """
    for start, end, bits in _forced_runs(plan, len(tokens), most or max(len(tokens), 1)):
        rows = generator.decode(tokens[start:end], precision=bits)
        repeat_at = plan.observe(start, rows[0]) if isinstance(plan, AdaptivePlan) else None
        if repeat_at is None:
            yield Forced(start=start + 1, logits=rows, precision=bits)
            continue
        generator.sequence.truncate(len(generator.tokens) - 1)  # the step alone: an adaptive plan's runs have one
        rows = generator.decode(tokens[start:end], precision=repeat_at)
        yield Forced(start=start + 1, logits=rows, precision=repeat_at, first_pass=bits)


def _forced_runs(plan: Plan, steps: int, most: int) -> Iterator[tuple[int, int, float]]:
    """Return runs of steps that one call can compute: an adaptive plan is asked again after each step."""
    if isinstance(plan, AdaptivePlan):
        yield from ((step, step + 1, plan.precision(step)) for step in range(steps))
        return
    for first, end, bits in precision_runs(plan, steps):
        yield from ((start, min(start + most, end), bits) for start in range(first, end, most))
