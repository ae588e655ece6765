"""Programs in time: memory streams into a double buffer while the units compute; tokens, phases, whole generations.

A stream is split into tiles of half the stream buffer. The load of a tile waits for memory and for a free half;
computing on it waits for the tile and for the unit. For equal tiles that recurrence has a closed form, so the time to
simulate an operator does not grow with its size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pmpd.npu_backend.hardware.description import Hardware, Number
from pmpd.npu_backend.machine.cost import OperatorCost, Piece, energy, operator_cost
from pmpd.npu_backend.machine.instructions import Operator, Program

__all__ = ["OperatorTime", "Pipeline", "Run", "simulate"]


@dataclass(frozen=True)
class OperatorTime:
    """One operator of a run: when it ends and what it adds to the run's time, in seconds; joules."""

    operator: Operator
    cost: OperatorCost
    end: Number
    added: Number
    joules: Number


@dataclass(frozen=True)
class Run:
    """A program's run: seconds and joules (arrays where the program is for several lengths), and its operators."""

    program: Program
    seconds: Number
    joules: Number
    operators: tuple[OperatorTime, ...]


@dataclass(frozen=True)
class Pipeline:
    """When things are free again, in seconds: memory, the buffer's halves (`first` before), the computing unit."""

    memory: Number = 0.0
    first: Number = 0.0
    second: Number = 0.0
    unit: Number = 0.0

    def after(self, piece: Piece) -> Pipeline:
        """Return the state after a piece of work.

        Load i waits for load i - 1 and for product i - 2, product i for load i and product i - 1. The longest path
        through equal tiles runs along the loads or along the products, and changes between them only at an end.
        """
        streams = np.greater(piece.tiles, 0)
        alone = replace(self, memory=self.memory + piece.memory, unit=self.unit + piece.compute)
        if not np.any(streams):
            return alone
        tiles = np.maximum(piece.tiles, 1)
        load, compute = piece.memory / tiles, piece.compute / tiles
        start = np.maximum(self.memory, self.first)

        def loaded(count: Number) -> Number:
            """When `count` tiles are loaded if the buffer is unbounded."""
            return np.maximum(start + count * load, np.where(count > 1, self.second + (count - 1) * load, 0.0))

        def computed(count: Number) -> Number:
            """When the products of `count` tiles are done."""
            products_last = np.maximum(self.unit, start + load) + count * compute
            second = np.where(count > 1, self.second + load + (count - 1) * compute, 0.0)
            return np.maximum(np.maximum(products_last, second), np.maximum(loaded(count), waiting(count)) + compute)

        def waiting(count: Number) -> Number:
            """When `count` tiles are loaded if the unit is the last to be free."""
            return np.where(count > 2, self.unit + compute + (count - 2) * load, 0.0)

        last = np.where(tiles > 2, computed(tiles - 2) + load, 0.0)
        done = computed(tiles)
        after = Pipeline(
            memory=np.maximum(np.maximum(loaded(tiles), waiting(tiles)), last),
            first=np.where(tiles > 1, computed(tiles - 1), self.second),
            second=done,
            unit=done,
        )
        if np.all(streams):
            return after
        return Pipeline(*(np.where(streams, getattr(after, name), getattr(alone, name)) for name in vars(self)))


def simulate(program: Program, hardware: Hardware) -> Run:
    """Run a program: operators in order, each one's streams prefetched as far as the buffer allows."""
    state = Pipeline(memory=hardware.memory.latency_ns * 1e-9)
    times = []
    for operator in program.operators:
        cost = operator_cost(operator, hardware)
        before = state.unit
        for piece in cost.pieces:
            state = state.after(piece)
        times.append(OperatorTime(operator, cost, state.unit, state.unit - before, energy(operator, hardware)))
    seconds = np.maximum(state.memory, state.unit)
    joules = sum((time.joules for time in times), start=0.0) + hardware.energy.static_w * seconds
    return Run(program, seconds, joules, tuple(times))
