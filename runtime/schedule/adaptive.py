"""Adaptive schedules: low precision, and more bits where the model is unsure.

Where the two most likely tokens are nearly as likely as each other, the text may go either way, and errors decide. More
bits come either in the next step (`AdaptiveSchedule`) or in a second pass over the same one (`RepeatSchedule`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import PmpdError, one_line
from pmpd.runtime.format.precision import PRECISION, parse_precision
from pmpd.runtime.schedule.base import Model, Prefill

__all__ = [
    "AdaptivePrecision",
    "AdaptiveSchedule",
    "RepeatPrecision",
    "RepeatSchedule",
    "parse_adaptive",
    "parse_repeat",
]


@dataclass(frozen=True)
class _Threshold:
    """Two precisions, and the gap between the two best logits, in nats, below which the model counts as unsure."""

    KIND: ClassVar[str]

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

    def unsure(self, logits: npt.NDArray[np.float32]) -> bool:
        """Return whether the best of ``[V]`` logits is less than the threshold above the second."""
        best = int(logits.argmax())
        others = (part.max() for part in (logits[:best], logits[best + 1 :]) if part.size)
        return float(logits[best]) - float(max(others, default=-np.inf)) < self.threshold

    def __str__(self) -> str:
        prefill = "" if self.prefill is None else f"prefill:{self.prefill},"
        return f"{prefill}{self.KIND}:{self.low},{self.high}@{self.threshold:g}"


@dataclass(frozen=True)
class AdaptiveSchedule(_Threshold):
    """Decodes at `low` bits, and at `high` after logits whose best is less than `threshold` nats above the second.

    The prompt's logits decide for the first step. `prefill` is the precision of the prompt, as in `Schedule`.

    Raises:
        PmpdError: `low` is not below `high`, or the threshold is not a number above 0.
    """

    KIND = "adaptive"

    def begin(self, prefill: Prefill) -> AdaptivePrecision:
        """Return the plan of one answer."""
        plan = AdaptivePrecision(self)
        plan.observe(-1, prefill.logits)
        return plan


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
        """Decide the next step by logits ``[V]``."""
        self._next = self._schedule.high if self._schedule.unsure(logits) else self._schedule.low


@dataclass(frozen=True)
class RepeatSchedule(_Threshold):
    """Decodes at `low` bits, and runs a step again at `high` if its best logit is less than `threshold` nats above.

    The second pass chooses the token and overwrites the step's keys and values. `prefill` is the precision of the
    prompt, as in `Schedule`; the prompt is not run again.

    Raises:
        PmpdError: `low` is not below `high`, or the threshold is not a number above 0.
    """

    KIND = "repeat"

    def begin(self, prefill: Prefill) -> RepeatPrecision:
        """Return the plan of one answer."""
        return RepeatPrecision(self)


class RepeatPrecision:
    """The plan of one answer under a `RepeatSchedule`."""

    def __init__(self, schedule: RepeatSchedule) -> None:
        self._schedule = schedule
        self.margin = schedule.threshold

    def precision(self, step: int) -> float:
        """Return the low precision."""
        return self._schedule.low

    def observe(self, step: int, logits: npt.NDArray[np.float32]) -> float | None:
        """Return the high precision for a second pass, or None where logits ``[V]`` are sure."""
        return self._schedule.high if self._schedule.unsure(logits) else None


_Schedule = TypeVar("_Schedule", bound=_Threshold)


def parse_adaptive(text: str, model: Model, prefill: float | None) -> AdaptiveSchedule:
    """Read ``LOW,HIGH@NATS``. Raises PmpdError with the reason alone."""
    return _parse(AdaptiveSchedule, text, prefill)


def parse_repeat(text: str, model: Model, prefill: float | None) -> RepeatSchedule:
    """Read ``LOW,HIGH@NATS``. Raises PmpdError with the reason alone."""
    return _parse(RepeatSchedule, text, prefill)


def _parse(schedule: type[_Schedule], text: str, prefill: float | None) -> _Schedule:
    match = re.fullmatch(rf"({PRECISION}) *, *({PRECISION})@([0-9]{{1,6}}(?:\.[0-9]{{1,6}})?)", text.strip())
    if match is None:
        raise PmpdError(f"{one_line(repr(text), 100)} does not fit the form {schedule.KIND}:LOW,HIGH@NATS")
    return schedule(parse_precision(match[1]), parse_precision(match[2]), float(match[3]), prefill)
