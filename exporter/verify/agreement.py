"""How far two sets of logits are apart, and whether that is more than rounding can explain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import PmpdError

__all__ = ["MEAN_KL", "REMEDY", "Check", "Distance", "Figure", "compare", "require_passed"]

Doubles = npt.NDArray[np.float64]

# Both distances grow with the square of an error, so this allows an error three times as large as the noise that the
# floor is measured with. Measured: 0.4 to 0.6 times the floor for exact kernels, 1.5 to 4.2 times for 8-bit ones. The
# largest divergence of a position is no measure: at one position of 32 right kernels had 9.5 times the floor.
FLOOR_FACTOR = 9.0
# The largest angle of a position shows a single wrong one. It varies more: right kernels had 10.2 times the floor and
# 3.8 in the mean (8-bit ones of Qwen2.5-Coder-0.5B at 5 bits). This allows an error six times the noise.
POSITION_FACTOR = 36.0
REMEDY = "nothing was published: please report this line, or export with --no-verify to get the bundle as it is"
# What float32 logits themselves resolve.
LEAST_DISTANCE = 1e-10
MEAN_KL = "mean KL in nats"  # name of the figure


@dataclass(frozen=True)
class Distance:
    """How far logits are from a reference, both ``[T, V]``.

    Attributes:
        kl: the largest Kullback-Leibler divergence of a position's next-token distribution, in nats.
        mean_kl: its mean over the positions.
        angle: the largest ``1 - cosine`` of a position's logits less their mean. Unlike the divergence it counts
            unlikely tokens as much as likely ones, and unlike the plain cosine it does not see a common offset.
        same_token: positions at which both have the same most likely token.
        positions: T.
    """

    kl: float
    mean_kl: float
    angle: float
    same_token: int
    positions: int

    @classmethod
    def of(cls, logits: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> Distance:
        """Measure it; what is not finite is infinitely far."""
        if not (np.isfinite(logits).all() and np.isfinite(reference).all()):
            return cls(math.inf, math.inf, math.inf, 0, len(reference))
        rows = [_row_distance(*row) for row in zip(logits, reference, strict=True)]  # a vocabulary at a time
        kl, angle, same_token = (np.array(column) for column in zip(*rows, strict=True))
        return cls(
            kl=float(kl.max()),
            mean_kl=float(kl.mean()),
            angle=float(angle.max()),
            same_token=int(same_token.sum()),
            positions=len(rows),
        )


@dataclass(frozen=True)
class Figure:
    """One measured number of a check; it is only information where `allowed` is None."""

    value: float
    allowed: float | None = None

    @property
    def passed(self) -> bool:
        """Whether it is within what is allowed; NaN never is."""
        return self.allowed is None or self.value <= self.allowed

    def __str__(self) -> str:
        return f"{self.value:.2g}" + ("" if self.allowed is None else f" (allowed {self.allowed:.2g})")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of the verification.

    Attributes:
        name: what was compared with what.
        figures: what was measured and what is allowed, by what it is ("mean KL in nats").
        note: what else a reader should know, such as the node where the error is largest.
        warning: what a user of the bundle should know although the check passed.
    """

    name: str
    figures: dict[str, Figure]
    note: str = ""
    warning: str = ""

    @property
    def passed(self) -> bool:
        """Whether every figure is within what is allowed."""
        return all(figure.passed for figure in self.figures.values())

    def to_json(self) -> dict[str, Any]:
        """Return the check as it stands in the manifest."""
        figures = {
            name: {"value": figure.value} | ({} if figure.allowed is None else {"allowed": figure.allowed})
            for name, figure in self.figures.items()
        }
        document = {"passed": self.passed, "figures": figures, "summary": str(self)}
        return document | ({"warning": self.warning} if self.warning else {})

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {figure}" for name, figure in self.figures.items())
        return "; ".join(text for text in (figures, self.note) if text)


def compare(
    name: str,
    logits: npt.NDArray[np.float32],
    reference: npt.NDArray[np.float32],
    *,
    floor: Distance,
    note: str = "",
) -> Check:
    """Check that logits differ from a reference by no more than a few times what rounding does to them.

    `FLOOR_FACTOR` times in the mean of the positions, `POSITION_FACTOR` times at the worst.
    `floor` is what noise of the size of that rounding does to the same model at the same positions.
    """
    distance = Distance.of(logits, reference)
    return Check(
        name=name,
        figures={
            MEAN_KL: Figure(distance.mean_kl, FLOOR_FACTOR * floor.mean_kl + LEAST_DISTANCE),
            "largest 1 - cosine": Figure(distance.angle, POSITION_FACTOR * floor.angle + LEAST_DISTANCE),
        },
        note="; ".join(text for text in (_same_tokens(distance), note) if text),
    )


def require_passed(check: Check) -> None:
    """Raise PmpdError if a check failed."""
    if not check.passed:
        raise PmpdError(f"verification failed, {check.name}: {check}; {REMEDY}")


def _same_tokens(distance: Distance) -> str:
    """Return a phrase that says at how many positions both agree on the most likely token."""
    return f"same most likely token at {distance.same_token} of {distance.positions} positions"


def _row_distance(logits: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> tuple[float, float, bool]:
    """Return the divergence, 1 - cosine, and whether the most likely token is the same, of logits ``[V]``."""
    a, b = reference.astype(np.float64), logits.astype(np.float64)
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    kl = float(np.exp(log_p) @ (log_p - log_q))
    a -= a.mean()
    b -= b.mean()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms > 0 else 0.0
    return max(kl, 0.0), max(1 - cosine, 0.0), bool(a.argmax() == b.argmax())


def _log_softmax(logits: Doubles) -> Doubles:
    shifted: Doubles = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
