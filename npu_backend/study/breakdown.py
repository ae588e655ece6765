"""Where the time of a generation goes: operations, bytes, bound and seconds of its operators, phase by phase."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np

from pmpd.npu_backend.hardware.description import Number
from pmpd.npu_backend.machine.instructions import Data, Operator, Special
from pmpd.npu_backend.machine.simulate import OperatorTime, Run
from pmpd.npu_backend.program.listing import instruction_count
from pmpd.npu_backend.program.lower import FP16_BITS
from pmpd.npu_backend.program.model import Model
from pmpd.npu_backend.study.generate import Generation

__all__ = ["GROUPINGS", "OperatorGroup", "PhaseBreakdown", "phases"]

Grouping = Callable[[Operator], str]
_UNITS = ("memory", "matrix", "special", "overhead")
_NOTHING = 1e-12  # seconds: what sums of floats are off by


def _module(operator: Operator) -> str:
    """The same node of all layers: ``self_attn/qkv_proj/BitplaneMatMul``."""
    name = re.sub(r"\.\d+(?=/)", "", re.sub(r"_node_\d+$", "", operator.node))
    return name.removeprefix("model/").removeprefix("layers/")


GROUPINGS: Mapping[str, Grouping] = {
    "kind": lambda operator: operator.kind,
    "module": _module,
    "node": lambda operator: operator.node,
}


@dataclass(frozen=True, kw_only=True)
class OperatorGroup:
    """What a group of operators takes in one run.

    Attributes:
        name: of the group.
        count: its operators.
        macs, special_elements: operations of the matrix unit, and elements of special functions.
        nbytes: off-chip bytes by class, those that are not zero.
        needs: seconds that each unit would take alone, if nothing overlapped.
        seconds: what it adds to the run's time: that of the units that compute, one after the other, and waiting for
            memory.
        joules: energy without what is drawn all the time.
    """

    name: str
    count: int
    macs: float
    special_elements: float
    nbytes: Mapping[Data, float]
    needs: Mapping[str, float]
    seconds: float
    joules: float

    @property
    def intensity(self) -> float:
        """Multiply-accumulate operations per off-chip byte."""
        return self.macs / total if (total := sum(self.nbytes.values())) else 0.0

    @property
    def bound(self) -> str:
        """What most of its time goes to: memory (waiting for it), matrix, special or overhead."""
        spent = {unit: self.needs[unit] for unit in _UNITS[1:]}
        spent["memory"] = self.seconds - sum(spent.values())
        return max(spent, key=lambda unit: spent[unit])


@dataclass(frozen=True, kw_only=True)
class PhaseBreakdown:
    """A prompt, or decode steps at one precision: means over the steps, unless it is for one.

    Attributes:
        phase: ``prefill`` or ``decode``.
        precision: bits; 16 is float16.
        tokens: new tokens a run.
        first_past, last_past: tokens before them, of the first and the last step.
        steps: the decode steps, from 0; none for a prompt.
        instructions: how many a run has.
        seconds, joules: of a run, all operators and static power.
        rows: groups of operators, in the order in which they first run. Their seconds add up to `seconds`.
    """

    phase: str
    precision: float
    tokens: int
    first_past: int
    last_past: int
    steps: tuple[int, ...]
    instructions: float
    seconds: float
    joules: float
    rows: tuple[OperatorGroup, ...]

    @property
    def title(self) -> str:
        """A line that says what this is."""
        bits = "float16" if self.precision == FP16_BITS else f"{self.precision} bits"
        if self.phase == "prefill":
            return f"Prefill of {self.tokens:,} tokens, {bits}"
        if self.first_past == self.last_past:
            return f"Decode step {self.steps[0]}, {bits}, after {self.first_past:,} tokens"
        lengths = f"{self.first_past:,} to {self.last_past:,}"
        return f"Decode, {bits}, mean of {len(self.steps):,} steps after {lengths} tokens"

    @cached_property
    def total(self) -> OperatorGroup:
        """All rows as one."""
        return OperatorGroup(
            name="total",
            count=sum(row.count for row in self.rows),
            macs=sum(row.macs for row in self.rows),
            special_elements=sum(row.special_elements for row in self.rows),
            nbytes=_by_class(row.nbytes for row in self.rows),
            needs={unit: sum(row.needs[unit] for row in self.rows) for unit in _UNITS},
            seconds=self.seconds,
            joules=sum(row.joules for row in self.rows),
        )


def phases(
    generation: Generation, model: Model, *, by: Grouping = GROUPINGS["kind"], steps: Sequence[int] = ()
) -> list[PhaseBreakdown]:
    """Return the phases of a generation: the prompt, then decoding at each precision, or some decode steps.

    Args:
        generation: what `generate` returned for `model`.
        model: the graphs.
        by: the group of an operator, one of `GROUPINGS`.
        steps: decode steps, from 0, instead of means over all at a precision.

    Raises:
        PmpdError: the generation has no such step.
    """
    precision = FP16_BITS if FP16_BITS in generation.decode else model.prefill_precision
    breakdowns = [_phase(generation.prefill, by, precision, ())]
    if steps:
        for step in steps:
            precision, place = generation.find(step)
            breakdowns.append(_phase(generation.decode[precision], by, precision, (step,), place=place))
    else:
        for precision, run in generation.decode.items():
            at = np.flatnonzero(generation.precisions == precision).tolist()
            breakdowns.append(_phase(run, by, precision, tuple(at)))
    return breakdowns


def _phase(
    run: Run, by: Grouping, precision: float, steps: tuple[int, ...], *, place: int | None = None
) -> PhaseBreakdown:
    """Measure a run: means, or its entry at `place`."""
    shape = np.shape(run.seconds)

    def value_of(value: Number) -> float:
        return float(np.mean(value)) if place is None else float(np.broadcast_to(value, shape)[place])

    groups: dict[str, list[OperatorTime]] = defaultdict(list)
    for time in run.operators:
        groups[by(time.operator)].append(time)
    rows = [_row(name, times, value_of) for name, times in groups.items()]
    left = value_of(run.seconds) - sum(row.seconds for row in rows)
    if left > _NOTHING:
        needs = dict.fromkeys(_UNITS, 0.0) | {"memory": left}
        rows.append(
            OperatorGroup(
                name="last stores",  # the units are done, memory still writes
                count=0,
                macs=0.0,
                special_elements=0.0,
                nbytes={},
                needs=needs,
                seconds=left,
                joules=0.0,
            )
        )
    past = np.ravel(run.program.past)
    return PhaseBreakdown(
        phase="decode" if steps else "prefill",
        precision=precision,
        tokens=int(np.max(run.program.tokens)),
        first_past=int(past[0 if place is None else place]),
        last_past=int(past[-1 if place is None else place]),
        steps=steps,
        instructions=value_of(instruction_count(time.cost for time in run.operators)),
        seconds=value_of(run.seconds),
        joules=value_of(run.joules),
        rows=tuple(rows),
    )


def _row(name: str, times: Sequence[OperatorTime], value_of: Callable[[Number], float]) -> OperatorGroup:
    special = [step.elements for time in times for step in time.operator.instructions if isinstance(step, Special)]
    classes = {
        data: value_of(sum((time.operator.nbytes(data) for time in times), start=0.0)) for data in get_args(Data)
    }
    return OperatorGroup(
        name=name,
        count=len(times),
        macs=value_of(sum((time.operator.macs for time in times), start=0.0)),
        special_elements=value_of(sum(special, start=0.0)),
        nbytes={data: nbytes for data, nbytes in classes.items() if nbytes},
        needs={unit: value_of(sum((getattr(time.cost, unit) for time in times), start=0.0)) for unit in _UNITS},
        seconds=value_of(sum((time.added for time in times), start=0.0)),
        joules=value_of(sum((time.joules for time in times), start=0.0)),
    )


def _by_class(of_rows: Iterable[Mapping[Data, float]]) -> dict[Data, float]:
    totals: dict[Data, float] = defaultdict(float)
    for nbytes in of_rows:
        for data, number in nbytes.items():
            totals[data] += number
    return dict(totals)
