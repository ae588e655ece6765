"""The contract between a schedule and whatever decodes with it (PMPD paper, Sections 4.2 and 4.3).

Step i (from 0) feeds output token i and yields token i + 1; token 0 comes from prefill and belongs to no step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pmpd.runtime.engine.kv_cache import KvView
from pmpd.runtime.format.bundle import Bundle

__all__ = ["AdaptivePlan", "Model", "Plan", "Prefill", "Schedule"]


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """What is known of a prompt once its prefill has run: all that a schedule may decide by.

    Attributes:
        tokens: the prompt's token ids, those included whose keys and values were reused.
        logits: float32 ``[V]``, after the last of them.
        kv: views of their keys and values, ``[kv_heads, len(tokens), head_dim]`` each.
    """

    tokens: tuple[int, ...]
    logits: npt.NDArray[np.float32]
    kv: KvView


@runtime_checkable
class Plan(Protocol):
    """The precision of each decode step of one answer. It is asked once per step, in order."""

    def precision(self, step: int) -> float:
        """Return the precision of decode step `step`, in bits: one of its schedule's `precisions`."""
        ...


@runtime_checkable
class AdaptivePlan(Plan, Protocol):
    """A plan that also looks at what the model says.

    A plan without `observe` lets teacher forcing run consecutive steps of one precision in one call. A plan may have an
    attribute `margin`: how far below the best a logit may be and matter to it, as in `Sequence.step`. Without one any
    logit may matter, and output layers are read whole.
    """

    def observe(self, step: int, logits: npt.NDArray[np.float32]) -> float | None:
        """See the logits ``[V]`` of decode step `step`, before step + 1 is asked for. The array is only lent.

        Those further than `margin` below the best may be approximate, but are that far below.

        Returns:
            The precision at which to run the step again, one of the schedule's, or None to keep it. The second pass
            overwrites keys, values and logits of the first. It is final: the plan is not shown its logits.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is known of a model when a schedule for it is read.

    Attributes:
        precisions: what it decodes at, in bits.
        bundle: the bundle, where there is one: a learned schedule is a file of it.
    """

    precisions: Sequence[float]
    bundle: Bundle | None = None


class Schedule(Protocol):
    """What a user names: it makes a plan for each prompt. Immutable, so that many answers may share it."""

    @property
    def precisions(self) -> tuple[float, ...]:
        """Every precision that its plans may ask for, in bits."""
        ...

    @property
    def prefill(self) -> float | None:
        """The precision of the prompt, in bits; None for the bundle's prefill precision."""
        ...

    def begin(self, prefill: Prefill) -> Plan:
        """Return the plan of one answer. Called once, after prefill; what it keeps of `prefill` it must copy."""
        ...
