"""What a row of the table measures: a model that writes text greedily and scores a given text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pmpd.runtime import AdaptivePlan, Generator, Plan, Sampling, Schedule

__all__ = ["Answer", "Forced", "ForcedSteps", "ModelUnderTest", "Scheduled", "forced_steps", "precision_runs"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A greedy answer: token ids, the bits each was computed with, and seconds; token 0 is the prefill's.

    `first_passes` are those of decode steps that the schedule had run again: bits, by the index of the token.
    """

    ids: tuple[int, ...]
    precisions: tuple[float, ...]
    seconds: tuple[float, ...]
    prefill_seconds: float
    first_passes: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Forced:
    """A given answer, scored by teacher forcing.

    Attributes:
        logits: float32 ``[n - 1, V]``: row i follows token i of the answer and predicts token i + 1.
        precisions: bits ``[n]``: those of the prefill, then of each row.
        prefill_seconds: time that the prompt took.
        first_passes: as of an `Answer`.
    """

    logits: npt.NDArray[np.float32]
    precisions: tuple[float, ...]
    prefill_seconds: float
    first_passes: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ForcedSteps:
    """Decode steps in a row that were given their tokens.

    Attributes:
        logits: float32 ``[n, V]``: row i follows token i of these steps.
        precision: bits of all of them.
        first_pass: bits of the first pass of a step that the schedule had run again, which is then alone; else None.
    """

    logits: npt.NDArray[np.float32]
    precision: float
    first_pass: float | None = None

    @property
    def passes(self) -> tuple[float, ...]:
        """Bits of every pass of a step, in their order."""
        return (self.precision,) if self.first_pass is None else (self.first_pass, self.precision)


class ModelUnderTest(Protocol):
    """A way to decode: the floating-point model, or the bundle under one schedule."""

    def warm_up(self, prompt: Sequence[int]) -> None:
        """Run everything once, so that no later measurement pays for first use."""
        ...

    def generate(self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int]) -> Answer:
        """Answer a prompt greedily; a stop token ends the answer and is not part of it."""
        ...

    def force(self, prompt: Sequence[int], answer: Sequence[int]) -> Forced:
        """Score a given answer of at least two tokens."""
        ...


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

    def warm_up(self, prompt: Sequence[int]) -> None:
        """Run prefill and every precision of the schedule once: weights are read from disk on first use."""
        self._generator.reset()
        self._generator.prefill(prompt[:1], precision=self._schedule.prefill)
        for precision in self._schedule.precisions:
            self._generator.decode(prompt[:1], precision=precision)

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
            seconds=tuple(token.seconds for token in tokens),
            prefill_seconds=self._generator.trace.prefill_seconds,
            first_passes={token.index: token.first_pass for token in tokens if token.first_pass is not None},
        )

    def force(self, prompt: Sequence[int], answer: Sequence[int]) -> Forced:
        """Score a given answer: each decode step at the precision that the schedule's plan gives to it.

        Steps in a row at one precision go through the graph together, unless the plan looks at each step's logits.
        """
        generator = self._generator
        generator.reset()
        begin = time.perf_counter()
        prefilled = generator.prefill(prompt, precision=self._schedule.prefill)
        seconds = time.perf_counter() - begin
        plan = generator.begin(self._schedule, prefilled)
        logits = list[npt.NDArray[np.float32]]()
        precisions = [self._schedule.prefill or generator.bundle.manifest.prefill_precision]
        first_passes = dict[int, float]()
        for steps in forced_steps(generator, plan, answer[:-1]):
            if steps.first_pass is not None:
                first_passes[len(precisions)] = steps.first_pass
            logits.append(steps.logits)
            precisions += [steps.precision] * len(steps.logits)
        return Forced(
            logits=np.concatenate(logits),
            precisions=tuple(precisions),
            prefill_seconds=seconds,
            first_passes=first_passes,
        )


def forced_steps(
    generator: Generator, plan: Plan, tokens: Sequence[int], *, most: int | None = None
) -> Iterator[ForcedSteps]:
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
            yield ForcedSteps(logits=rows, precision=bits)
            continue
        generator.sequence.truncate(len(generator.tokens) - 1)  # the step alone: an adaptive plan's runs have one
        rows = generator.decode(tokens[start:end], precision=repeat_at)
        yield ForcedSteps(logits=rows, precision=repeat_at, first_pass=bits)


def _forced_runs(plan: Plan, steps: int, most: int) -> Iterator[tuple[int, int, float]]:
    """Return runs of steps that one call can compute: an adaptive plan is asked again after each step."""
    if isinstance(plan, AdaptivePlan):
        yield from ((step, step + 1, plan.precision(step)) for step in range(steps))
        return
    for first, end, bits in precision_runs(plan, steps):
        yield from ((start, min(start + most, end), bits) for start in range(first, end, most))
