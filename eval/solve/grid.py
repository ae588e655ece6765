"""The candidates: which schedules a search may choose from (PMPD paper, Eq. 1-3 with the range constraint)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations_with_replacement

import numpy as np

from pmpd.runtime import StaticSchedule
from pmpd.runtime.errors import PmpdError

__all__ = ["mean_cost", "pairs", "static_schedules", "switch_points"]


def switch_points(steps: int, count: int) -> tuple[int, ...]:
    """Return ``{0, OL/(N-1), 2 OL/(N-1), …, OL}``: N decode steps at which a precision may begin.

    Args:
        steps: OL, the longest answer in decode steps.
        count: N, 2 or more. Short answers have fewer points: each is there once.

    Raises:
        PmpdError: fewer than two points.
    """
    if count < 2:
        raise PmpdError(f"switch points must be 2 or more, the start and the end of an answer, got {count}")
    return tuple(dict.fromkeys(round(i * steps / (count - 1)) for i in range(count)))


def static_schedules(
    precisions: Sequence[float], points: Sequence[int], *, prefill: float | None = None
) -> Iterator[StaticSchedule]:
    """Yield every schedule over `precisions`, high to low, whose switches are among `points`, each schedule once.

    The last point is the end of an answer: a precision that begins there is not used.
    """
    for starts in combinations_with_replacement(points, len(precisions) - 1):
        runs = zip(precisions, (0, *starts), (*starts, points[-1]), strict=True)
        switches = [(precision, start) for precision, start, end in runs if start < end]
        yield StaticSchedule(tuple(switches or [(precisions[-1], 0)]), prefill)


def pairs(precisions: Sequence[float], prefills: Sequence[float | None]) -> Iterator[StaticSchedule]:
    """Yield a uniform schedule for each pair of a decode and a prefill precision (paper, Section 4.1)."""
    for precision in precisions:
        for prefill in prefills:
            yield StaticSchedule(((precision, 0),), prefill)


def mean_cost(schedule: StaticSchedule, cost: Mapping[float, float], steps: int) -> float:
    """Return the mean cost of the first `steps` decode steps, of what a step costs at each precision."""
    return float(np.mean([cost[schedule.precision(step)] for step in range(max(1, steps))]))
