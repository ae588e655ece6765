"""Adaptive schedules: low precision, and more bits for the step after one that was unsure.

Where the two most likely tokens are nearly as likely as each other, the text may go either way, and errors decide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import PmpdError, one_line
from pmpd.runtime.format.precision import PRECISION, parse_precision
from pmpd.runtime.schedule.base import Prefill

__all__ = ["AdaptivePrecision", "AdaptiveSchedule", "parse_adaptive"]


@dataclass(frozen=True)
class AdaptiveSchedule:
    """Decodes at `low` bits, and at `high` after logits whose best is less than `threshold` nats above the second.

    The prompt's logits decide for the first step. `prefill` is the precision of the prompt, as in `Schedule`.

    Raises:
        PmpdError: `low` is not below `high`, or the threshold is no number above 0.
    """

    low: float
    high: float
    threshold: float
    prefill: float | None = None

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise PmpdError(f"the first precision must be below the second, got {self.low} and {self.high}")
        if not 0 < self.threshold < math.inf:
            raise PmpdError(f"the threshold must be a number of nats above 0, got {self.threshold}")

    @property
    def precisions(self) -> tuple[float, ...]:
        """Both precisions, high to low."""
        return self.high, self.low

    def begin(self, prefill: Prefill) -> AdaptivePrecision:
        """Return the plan of one answer."""
        plan = AdaptivePrecision(self)
        plan.observe(-1, prefill.logits)
        return plan

    def __str__(self) -> str:
        prefill = "" if self.prefill is None else f"prefill:{self.prefill},"
        return f"{prefill}adaptive:{self.low},{self.high}@{self.threshold:g}"


class AdaptivePrecision:
    """The plan of one answer under an `AdaptiveSchedule`."""

    def __init__(self, schedule: AdaptiveSchedule) -> None:
        self._schedule = schedule
        self._next = schedule.high
        self.margin = schedule.threshold

    def precision(self, step: int) -> float:
        """Return the precision of the next step."""
        return self._next

    def observe(self, step: int, logits: npt.NDArray[np.float32]) -> None:
        """Decide the next step by how far the best of ``[V]`` logits is above the second."""
        best = int(logits.argmax())
        others = (part.max() for part in (logits[:best], logits[best + 1 :]) if part.size)
        gap = float(logits[best]) - float(max(others, default=-np.inf))
        self._next = self._schedule.high if gap < self._schedule.threshold else self._schedule.low


def parse_adaptive(text: str, precisions: Sequence[float], prefill: float | None) -> AdaptiveSchedule:
    """Read ``LOW,HIGH@NATS``. Raises PmpdError with the reason alone."""
    match = re.fullmatch(rf"({PRECISION}) *, *({PRECISION})@([0-9]{{1,6}}(?:\.[0-9]{{1,6}})?)", text.strip())
    if match is None:
        raise PmpdError(f"{one_line(repr(text), 100)} does not fit the form adaptive:LOW,HIGH@NATS")
    return AdaptiveSchedule(parse_precision(match[1]), parse_precision(match[2]), float(match[3]), prefill)
