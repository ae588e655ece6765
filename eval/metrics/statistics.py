"""Values and their uncertainty. One meaning of ± everywhere: half the width of a 95 % confidence interval."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import numpy.typing as npt

__all__ = ["PLUS_MINUS", "Estimate", "bootstrap"]

Doubles = npt.NDArray[np.float64]

PLUS_MINUS = "± is half the width of a 95 % confidence interval"
RESAMPLES = 4000

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
        ci95: half the width of its 95 % confidence interval; None for fewer than two samples, which say nothing about
            the spread.
        count: independent samples behind it.
    """

    value: float
    ci95: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the mean of at least one value, with an interval by Student's t."""
        x = np.asarray(values, dtype=np.float64)
        if len(x) < 2:
            return cls(float(x.mean()), None, len(x))
        return cls(float(x.mean()), _t95(len(x)) * float(x.std(ddof=1)) / len(x) ** 0.5, len(x))

    @property
    def is_zero(self) -> bool | None:
        """Whether the interval contains 0; None where no interval is known."""
        return None if self.ci95 is None else abs(self.value) <= self.ci95

    def text(self, digits: int, *, scale: float = 1.0, sign: bool = False) -> str:
        """Return it as shown in tables: ``12.3 ± 0.4``, and the value alone where the spread is not known or 0."""
        value = f"{self.value * scale:{'+' if sign else ''}.{digits}f}"
        return f"{value} ± {self.ci95 * scale:.{digits}f}" if self.ci95 else value


def bootstrap(statistics: Doubles, groups: Sequence[Hashable], value: Callable[[Doubles], Doubles]) -> Estimate:
    """Return a function of sums over samples, with a bootstrap interval: groups of samples are drawn with replacement.

    The interval is symmetric: 95 % of the resamples are no farther from the value than `ci95` (Hall, 1988). Resamples
    vary too little where groups are few: the interval is widened by Student's t over the normal quantile, and by
    sqrt(n / (n - 1)) (Hesterberg, 2015). The draws are the same every time.

    Args:
        statistics: what is summed, ``[samples, k]``.
        groups: what each sample belongs to; samples of one group are not independent.
        value: the function, of sums ``[..., k]`` to values ``[...]``.
    """
    names = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    count = len(names)
    sums = np.zeros((count, statistics.shape[1]))
    np.add.at(sums, [names[group] for group in groups], statistics)
    estimate = float(value(sums.sum(0)))
    if count < 2:
        return Estimate(estimate, None, count)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may have nothing that counts
        distances = np.abs(value(_draws(count) @ sums) - estimate)
    wider = _t95(count) / _T95[1000] * (count / (count - 1)) ** 0.5
    return Estimate(estimate, wider * float(np.nanquantile(distances, 0.95)), count)


@lru_cache(maxsize=4)
def _draws(count: int) -> Doubles:
    """Return how often each of `count` groups is drawn in each resample: ``[RESAMPLES, count]``."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)


def _t95(count: int) -> float:
    return _T95[max(degrees for degrees in _T95 if degrees < count)]
