"""Greedy answers to one prompt under many schedules, each step computed once.

Two schedules that begin alike give the same tokens, keys and values as long as they do. In the order of their steps'
precisions each schedule shares with the one before it all that it shares with any of them. So a conversation is
rewound to where the two part, and goes on from there: nothing is copied, and no step is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from typing import Protocol, TypeVar

from pmpd.eval.measure.models import Answer
from pmpd.runtime import Generator

__all__ = ["Fixed", "Forks"]


class Fixed(Protocol):
    """A schedule that is its own plan, such as a static one. It can be hashed, and equal ones are the same."""

    @property
    def prefill(self) -> float | None:
        """The precision of the prompt in bits; None for the bundle's."""
        ...

    def precision(self, step: int) -> float:
        """Return the precision of decode step `step`."""
        ...


S = TypeVar("S", bound=Fixed)


class Forks:
    """Answers of a bundle under any number of schedules that are fixed beforehand.

    Args:
        generator: over the bundle; nobody else may use it meanwhile.
        max_new_tokens: tokens per answer.
        stop_ids: tokens that end an answer and are no part of it.

    Attributes:
        steps: decode steps that were computed so far, in all.
    """

    def __init__(self, generator: Generator, *, max_new_tokens: int, stop_ids: Iterable[int]) -> None:
        self._sequence = generator.sequence
        self._limit = max_new_tokens
        self._stops = frozenset(stop_ids)
        self.steps = 0

    def answers(self, prompt: Sequence[int], schedules: Iterable[S]) -> Iterator[tuple[S, Answer]]:
        """Yield each schedule and its greedy answer, as `Generator.stream` would give it.

        The prompt runs once for each precision that schedules have for it.

        Raises:
            ContextLengthError: prompt and answer do not fit the generator's cache.
            PmpdError: a precision that is not loaded, or a token that the model does not know.
        """
        default = self._sequence.engine.bundle.manifest.prefill_precision

        def order(schedule: S) -> tuple[float, ...]:
            return (schedule.prefill or default, *map(schedule.precision, range(self._limit - 1)))

        for prefill, group in groupby(sorted(schedules, key=order, reverse=True), key=lambda s: s.prefill or default):
            yield from self._of_one_prefill(prompt, prefill, group, lambda schedule: order(schedule)[1:])

    def _of_one_prefill(
        self,
        prompt: Sequence[int],
        prefill: float,
        schedules: Iterable[S],
        bits_of: Callable[[S], tuple[float, ...]],
    ) -> Iterator[tuple[S, Answer]]:
        self._sequence.reset()
        tokens = [int(self._sequence.prefill(prompt, precision=prefill).argmax())]
        before: tuple[float, ...] = ()
        for schedule in schedules:
            bits = bits_of(schedule)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, bits, strict=False)))
            del tokens[same + 1 :]
            self._sequence.truncate(len(prompt) + len(tokens) - 1)
            while len(tokens) < self._limit and tokens[-1] not in self._stops:
                logits = self._sequence.step(tokens[-1], precision=bits[len(tokens) - 1], margin=0.0)
                tokens.append(int(logits.argmax()))
                self.steps += 1
            before = bits
            count = len(tokens) - (tokens[-1] in self._stops)
            yield (
                schedule,
                Answer(
                    ids=tuple(tokens[:count]),
                    precisions=(prefill, *bits)[:count],
                ),
            )
