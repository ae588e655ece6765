"""Static schedules: the same switch points for every prompt (PMPD paper, Section 4.2)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from pmpd.runtime.errors import PmpdError, one_line
from pmpd.runtime.format.precision import PRECISION, parse_precision
from pmpd.runtime.schedule.base import Model, Prefill, Schedule

__all__ = ["StaticSchedule", "parse_static", "parse_uniform", "step_precisions"]

_STEP = "[0-9]{1,9}"


@dataclass(frozen=True)
class StaticSchedule:
    """Switch points that hold for every prompt: ``((4, 0), (3, 16), (2, 32))`` goes to 3 bits at step 16.

    `switches` pairs each precision p with its starting point st(p) (Algorithm 1). Precisions fall and starting points
    do not (Eq. 3); the first precision starts at step 0. A uniform schedule has one pair. It is its own plan.
    `prefill` is the precision of the prompt, as in `Schedule`.

    Raises:
        PmpdError: no switch at step 0, rising precisions, or starting points out of order.
    """

    switches: tuple[tuple[float, int], ...]
    prefill: float | None = None

    def __post_init__(self) -> None:
        if fault := _fault(self.switches):
            raise PmpdError(f"schedule {self}: {fault}")

    @property
    def precisions(self) -> tuple[float, ...]:
        """Every precision the schedule uses, high to low."""
        return tuple(precision for precision, _ in self.switches)

    def begin(self, prefill: Prefill | None = None) -> Self:
        """Return the schedule itself: the prompt changes nothing."""
        return self

    def precision(self, step: int) -> float:
        """Return the precision of decode step `step`, in bits."""
        return next(precision for precision, start in reversed(self.switches) if start <= step)

    def __str__(self) -> str:
        prefill = "" if self.prefill is None else f"prefill:{self.prefill},"
        if len(self.switches) == 1:
            return f"{prefill}uniform:{self.switches[0][0]}"
        return f"{prefill}static:" + ",".join(f"{precision}@{start}" for precision, start in self.switches)


def step_precisions(schedule: Schedule, steps: int) -> tuple[float, ...]:
    """Return the bits of the first `steps` decode steps, for callers that have no prompt to begin a plan with.

    Raises:
        PmpdError: the schedule is not static, or has a precision of its own for prompts.
    """
    if not isinstance(schedule, StaticSchedule):
        raise PmpdError(
            f"schedule {one_line(schedule, 100)} decides by the prompt, and here is none: give a static schedule, "
            "such as uniform:4 or static:3@16"
        )
    if schedule.prefill is not None:
        raise PmpdError(
            f"schedule {schedule}: prompts run at the bundle's prefill precision here: leave out "
            f"prefill:{schedule.prefill}"
        )
    return tuple(map(schedule.precision, range(steps)))


def parse_uniform(text: str, model: Model, prefill: float | None) -> StaticSchedule:
    """Read ``BITS``. Raises PmpdError with the reason alone."""
    if not re.fullmatch(PRECISION, text.strip()):
        raise PmpdError(f"{one_line(repr(text), 100)} does not fit the form uniform:BITS")
    return StaticSchedule(((parse_precision(text.strip()), 0),), prefill)


def parse_static(text: str, model: Model, prefill: float | None) -> StaticSchedule:
    """Read ``BITS@STEP,BITS@STEP,…``; the highest precision starts where none is given for step 0.

    Raises PmpdError with the reason alone.
    """
    switches = list[tuple[float, int]]()
    for item in text.split(","):
        match = re.fullmatch(f"({PRECISION})@({_STEP})", item.strip())
        if match is None:
            raise PmpdError(f"{one_line(repr(item), 100)} does not fit the form static:BITS@STEP,BITS@STEP,…")
        switches.append((parse_precision(match[1]), int(match[2])))
    implied = switches[0][1] != 0
    if implied:
        switches.insert(0, (max(model.precisions), 0))
    if fault := _fault(tuple(switches)):
        start = f"; step 0 starts at {max(model.precisions)} bits, the highest, as no precision is given for it"
        raise PmpdError(fault + (start if implied else ""))
    return StaticSchedule(tuple(switches), prefill)


def _fault(switches: tuple[tuple[float, int], ...]) -> str | None:
    """Return why switch points are not a schedule, or None."""
    bits = [precision for precision, _ in switches]
    starts = [start for _, start in switches]
    if not starts or starts[0] != 0:
        return "the first precision must start at step 0"
    if bits != sorted(set(bits), reverse=True):
        return "precisions must fall, never rise or repeat (Eq. 3 of the PMPD paper)"
    if starts != sorted(starts):
        return "a lower precision cannot start before a higher one (Eq. 3 of the PMPD paper)"
    return None
