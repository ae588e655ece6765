"""The cheapest schedule that keeps the quality, found on samples that all candidates share.

Samples come in rounds, or all at once where nothing is decided on the way. After each round, a candidate that is surely
worse than the tolerance allows leaves, and so do all that cost more than one which surely keeps it. What "surely" means
is `SURE` standard errors of the paired differences: a candidate that is near the limit stays to the end, where its mean
decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import numpy as np

from pmpd.eval.metrics.statistics import Estimate
from pmpd.runtime.errors import PmpdError

__all__ = ["Contestant", "Race", "Tolerance", "best_of", "cheapest"]

S = TypeVar("S")
Scores = Mapping[S, Sequence[float]]
Measure = Callable[[range, Sequence[S]], Scores[S]]
"""Scores of schedules on a round of samples, higher is better, one a sample."""

ROUND = 8  # samples between two looks
SURE = 3.0  # standard errors; a look is wrong once in 700 times
ENOUGH = 32  # samples without which nothing is surely good: eight equal answers say little


@dataclass(frozen=True)
class Tolerance:
    """How much quality may be lost: `value` in units of the metric, or as a share of the reference's mean."""

    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``0.5`` (units of the metric) or ``1%`` (of the reference's mean).

        Raises:
            PmpdError: it is neither, or negative.
        """
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(%?)", text.strip())
        if match is None:
            raise PmpdError(f"tolerance {text!r:.40}: give a number in units of the metric, or a share such as 1%")
        return cls(float(match[1]) / (100 if match[2] else 1), bool(match[2]))

    def allows(self, reference: float) -> float:
        """Return the loss that is allowed where the reference has this mean."""
        return self.value * abs(reference) if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value:.4g}" if not self.relative else f"{100 * self.value:.4g}%"


@dataclass(frozen=True)
class Contestant(Generic[S]):
    """A candidate, and what is known of it.

    Attributes:
        schedule: the candidate.
        scores: on the samples that it was measured on: the first ones.
        difference: to the reference on the same samples, paired.
        keeps: whether its mean is within the tolerance, where there is one.
    """

    schedule: S
    scores: tuple[float, ...]
    difference: Estimate
    keeps: bool


@dataclass(frozen=True)
class Race(Generic[S]):
    """What came of a search.

    Attributes:
        best: the schedule that was found, or the reference.
        reference: scores of the reference, one a sample.
        contestants: all candidates, cheap ones first.
    """

    best: S
    reference: tuple[float, ...]
    contestants: tuple[Contestant[S], ...]


def cheapest(
    candidates: Sequence[S],
    reference: S,
    measure: Measure[S],
    *,
    samples: int,
    tolerance: Tolerance,
    early: bool = True,
    brief: bool = False,
) -> Race[S]:
    """Return the first candidate whose mean score on all samples is within the tolerance of the reference's.

    Args:
        candidates: the cheapest first.
        reference: what they are compared with, and the answer if none is good enough; it need not be a candidate.
        measure: gives scores, round by round.
        samples: how many there are, at least one.
        tolerance: how much the mean may be lower.
        early: whether candidates may leave before all samples were seen. Without it the answer is exact.
        brief: whether to end when no candidate is left, though the reference has not seen all samples.
    """
    scores: dict[S, list[float]] = {schedule: [] for schedule in (reference, *candidates)}
    alive = [schedule for schedule in candidates if schedule != reference]
    count = ROUND if early else samples
    for start in range(0, samples, count):
        part = range(start, min(start + count, samples))
        for schedule, values in measure(part, [reference, *alive]).items():
            scores[schedule] += values
        if early:
            alive = _survivors(alive, scores, reference, tolerance)
            if brief and not alive:
                break
    best = next((s for s in alive if _keeps(scores[s], scores[reference], tolerance)), reference)
    return _race(best, reference, candidates, scores, tolerance)


def best_of(candidates: Sequence[S], reference: S, measure: Measure[S], *, samples: int) -> Race[S]:
    """Return the candidate of the best mean score, and of equal ones the first. Arguments as of `cheapest`."""
    scores = measure(range(samples), list(dict.fromkeys((reference, *candidates))))
    best = max(candidates, key=lambda schedule: math.fsum(scores[schedule]))
    return _race(best, reference, candidates, scores, None)


def _survivors(alive: Sequence[S], scores: Mapping[S, list[float]], reference: S, tolerance: Tolerance) -> list[S]:
    """Return the candidates, cheap ones first, that may still turn out the cheapest good one."""
    kept = list[S]()
    for schedule in alive:
        margin, error = _margin(scores[schedule], scores[reference], tolerance)
        if margin + SURE * error < 0:
            continue
        kept.append(schedule)
        if len(scores[schedule]) >= ENOUGH and margin - SURE * error > 0:
            break
    return kept


def _margin(ours: Sequence[float], theirs: Sequence[float], tolerance: Tolerance) -> tuple[float, float]:
    """Return how far the mean is above what is allowed, and its standard error; infinite of a single sample."""
    gaps = np.subtract(ours, theirs[: len(ours)])
    margin = float(gaps.mean()) + tolerance.allows(float(np.mean(theirs[: len(ours)])))
    return margin, float(gaps.std(ddof=1)) / len(gaps) ** 0.5 if len(gaps) > 1 else math.inf


def _keeps(ours: Sequence[float], theirs: Sequence[float], tolerance: Tolerance) -> bool:
    return _margin(ours, theirs, tolerance)[0] >= -1e-9  # a tolerance of 0 and a sum that rounds


def _race(
    best: S,
    reference: S,
    candidates: Sequence[S],
    scores: Scores[S],
    tolerance: Tolerance | None,
) -> Race[S]:
    theirs = scores[reference]
    contestants = tuple(
        Contestant(
            schedule,
            tuple(scores[schedule]),
            Estimate.of(np.subtract(scores[schedule], theirs[: len(scores[schedule])]).tolist()),
            tolerance is None or _keeps(scores[schedule], theirs, tolerance),
        )
        for schedule in candidates
    )
    return Race(best, tuple(theirs), contestants)
