"""Means and their uncertainty. One meaning of ± everywhere: half the width of a 95 % confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from pmpd.runtime.errors import PmpdError

__all__ = ["PLUS_MINUS", "Estimate", "weighted_mean"]

PLUS_MINUS = "± is half the width of a 95 % confidence interval"

# Student's t: 97.5 % quantile by degrees of freedom. Between two entries the smaller number of degrees counts.
_T95 = {
    **{1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23},
    **{12: 2.18, 15: 2.13, 20: 2.09, 30: 2.04, 60: 2.00, 120: 1.98, 1000: 1.96},
}


@dataclass(frozen=True)
class Estimate:
    """A value and how sure it is.

    Attributes:
        value: the estimate.
        ci95: half the width of its 95 % confidence interval, by Student's t; None for fewer than two samples, which say
            nothing about the spread.
        count: independent samples behind it.
    """

    value: float
    ci95: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the mean of at least one value."""
        x = np.asarray(values, dtype=np.float64)
        return cls.from_stderr(float(x.mean()), float(x.std(ddof=1)) / len(x) ** 0.5 if len(x) > 1 else 0.0, len(x))

    @classmethod
    def from_stderr(cls, value: float, stderr: float, count: int) -> Self:
        """Return a value with a known standard error, from `count` samples."""
        if count < 2:
            return cls(value, None, count)
        return cls(value, _T95[max(df for df in _T95 if df < count)] * stderr, count)

    @property
    def is_zero(self) -> bool | None:
        """Whether the interval contains 0; None where no interval is known."""
        return None if self.ci95 is None else abs(self.value) <= self.ci95

    def text(self, digits: int, *, scale: float = 1.0, sign: bool = False) -> str:
        """Return it as shown in tables: ``12.3 ± 0.4``, and the value alone where the spread is not known or 0."""
        value = f"{self.value * scale:{'+' if sign else ''}.{digits}f}"
        return f"{value} ± {self.ci95 * scale:.{digits}f}" if self.ci95 else value


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Return the mean over samples of different weight, and its standard error as of a ratio estimate.

    With equal weights these are the plain mean and s / sqrt(n); the error of a single sample is 0.

    Raises:
        PmpdError: no sample has any weight.
    """
    x, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if w.sum() <= 0:
        raise PmpdError("no decode step to score: every answer is shorter than two tokens: use other prompts")
    mean = float((w * x).sum() / w.sum())
    n = int((w > 0).sum())
    spread = float((w**2 * (x - mean) ** 2).sum()) ** 0.5 / float(w.sum())
    return mean, spread * (n / (n - 1)) ** 0.5 if n > 1 else 0.0
