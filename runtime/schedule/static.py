"""Precision-switching schedules: which precision each decode step runs at (PMPD paper, Sections 4.2 and 4.3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["Schedule", "StaticSchedule", "parse_schedule"]


class Schedule(Protocol):
    """What decides the precision of each decode step.

    Step i (from 0) feeds output token i and yields token i + 1; token 0 comes from prefill and belongs to no step.
    """

    @property
    def precisions(self) -> tuple[int, ...]:
        """Every precision the schedule may ask for, in bits."""
        ...

    def precision(self, step: int) -> int:
        """Return the precision of decode step `step`, in bits."""
        ...


@dataclass(frozen=True)
class StaticSchedule:
    """Switch points that hold for every prompt: ``((4, 0), (3, 16), (2, 32))`` goes to 3 bits at step 16.

    `switches` pairs each precision p with its starting point st(p) (Algorithm 1). Precisions fall and starting points
    do not (Eq. 3); the first precision starts at step 0. A uniform schedule has one pair.

    Raises:
        PmpdError: no switch at step 0, rising precisions, or starting points out of order.
    """

    switches: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        bits = [precision for precision, _ in self.switches]
        starts = [start for _, start in self.switches]
        if not starts or starts[0] != 0:
            raise PmpdError(f"schedule {self}: the first precision must start at step 0")
        if bits != sorted(set(bits), reverse=True):
            raise PmpdError(f"schedule {self}: precisions must fall, never rise or repeat (Eq. 3 of the PMPD paper)")
        if starts != sorted(starts):
            raise PmpdError(f"schedule {self}: a lower precision cannot start before a higher one (Eq. 3)")

    @property
    def precisions(self) -> tuple[int, ...]:
        """Every precision the schedule uses, high to low."""
        return tuple(precision for precision, _ in self.switches)

    def precision(self, step: int) -> int:
        """Return the precision of decode step `step`, in bits."""
        return next(precision for precision, start in reversed(self.switches) if start <= step)

    def __str__(self) -> str:
        if len(self.switches) == 1:
            return f"uniform:{self.switches[0][0]}"
        return "static:" + ",".join(f"{precision}@{start}" for precision, start in self.switches)


def parse_schedule(text: str, precisions: Sequence[int]) -> StaticSchedule:
    """Read a schedule as users write it, for a model that has `precisions`.

    ``uniform:P`` decodes every token at P bits. ``static:P@STEP,…`` switches to P bits at decode step STEP; where no
    precision is given for step 0, the highest one starts.

    Raises:
        PmpdError: the text is no schedule, a precision is not in the model, or the order breaks Eq. 3.
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in ("uniform", "static"):
        raise PmpdError(f"{unknown_choice('schedule', text, ['uniform:4', 'static:3@16,2@32'])} (these are examples)")
    pattern = r"(\d+)" if kind == "uniform" else r"(\d+)@(\d+)"
    switches = []
    for item in [rest] if kind == "uniform" else rest.split(","):
        match = re.fullmatch(pattern, item.strip())
        if match is None:
            form = "uniform:BITS" if kind == "uniform" else "static:BITS@STEP,BITS@STEP,…"
            raise PmpdError(f"schedule {text!r}: {item!r} does not fit the form {form}")
        switches.append((int(match[1]), int(match[2]) if kind == "static" else 0))
    if switches[0][1] != 0:
        switches.insert(0, (max(precisions), 0))
    for precision, _ in switches:
        if precision not in precisions:
            raise PmpdError(f"schedule {text!r}: {unknown_choice('precision', precision, precisions)}")
    return StaticSchedule(tuple(switches))
