"""The analytical model: cycles, seconds and energy of instructions.

Every formula is linear algebra over numbers or arrays, so one call costs all lengths of a generation or all points of
an exploration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pmpd.npu_backend.hardware.description import Hardware, Number
from pmpd.npu_backend.machine.instructions import Data, Instruction, Load, Matrix, Operator, Special, Store

STREAMS: tuple[Data, ...] = (
    "planes",
    "codebooks",
    "dense",
    "kv_cache",
    "activations",
    "embedding",
)  # pass the stream buffer

__all__ = ["OperatorCost", "Piece", "energy", "matrix_cycles", "operator_cost", "transfer_seconds"]


def transfer_seconds(nbytes: Number, hardware: Hardware) -> Number:
    """Return how long off-chip memory is busy with a transfer: whole bursts at the bandwidth it reaches."""
    burst = hardware.memory.burst_bytes
    return np.ceil(nbytes / burst) * burst / hardware.bytes_per_second


def _mapping(step: Matrix, hardware: Hardware) -> tuple[Number, Number]:
    """Return how often the weights pass the multipliers, and the outputs that are worked on at a time.

    ``MM`` takes rows together, all with the same weights; ``MV`` row after row.
    """
    unit = hardware.matrix_unit
    if step.opcode == "MM":
        return np.ceil(step.rows / unit.rows), unit.mm_outputs
    return step.rows, unit.mv_outputs


def matrix_cycles(step: Matrix, hardware: Hardware) -> Number:
    """Return the cycles of a product: the slower of the multipliers and the decompression that feeds them.

    Decompressed weights are not stored: each pass over them decompresses them again.
    """
    unit = hardware.matrix_unit
    passes, outputs = _mapping(step, hardware)
    cycles: Number = np.ceil(step.outputs / outputs) * np.ceil(step.inputs / unit.inputs) / unit.utilization
    cycles = cycles * np.where(np.equal(step.weight_bits, 16), unit.fp16_cycles, 1)
    if step.codebook:
        cycles = np.maximum(cycles, step.outputs * step.inputs / hardware.decompression.weights_per_cycle)
    return passes * cycles * step.count


def _special_cycles(step: Special, hardware: Hardware) -> Number:
    return step.elements / getattr(hardware.special_unit, f"{step.function}_per_cycle")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Piece:
    """Work and the data that it streams in: `memory` seconds of loads, split into `tiles`, and `compute` seconds.

    Without tiles, memory is busy and nothing waits: stores, and vectors that were fetched long before. `steps` are the
    instructions it stands for, each as often as there are tiles.
    """

    memory: Number
    compute: Number
    tiles: Number = 0
    steps: tuple[Instruction, ...] = ()


@dataclass(frozen=True)
class OperatorCost:
    """An operator's pieces in order, and its seconds by unit if nothing overlapped."""

    pieces: tuple[Piece, ...]
    memory: Number
    matrix: Number
    special: Number
    overhead: Number


def operator_cost(operator: Operator, hardware: Hardware) -> OperatorCost:
    """Cost the instructions of an operator: what is loaded before a computation streams into it."""
    pieces: list[Piece] = []
    seconds: dict[str, Number] = {"memory": 0.0, "matrix": 0.0, "special": 0.0, "overhead": 0.0}
    waiting: Number = 0.0
    streamed: Number = 0.0
    loads: list[Instruction] = []
    for step in operator.instructions:
        if isinstance(step, Load | Store):
            spent = transfer_seconds(step.nbytes, hardware)
            seconds["memory"] = seconds["memory"] + spent
            if isinstance(step, Load) and step.data in STREAMS:
                waiting, streamed = waiting + spent, streamed + step.nbytes
                loads.append(step)
            else:
                pieces.append(Piece(spent, 0.0, steps=(step,)))
            continue
        if isinstance(step, Matrix):
            unit, cycles = "matrix", matrix_cycles(step, hardware)
        elif isinstance(step, Special):
            unit, cycles = "special", _special_cycles(step, hardware)
        else:
            unit, cycles = "overhead", hardware.controller.sync_cycles
        spent = cycles / hardware.hertz
        seconds[unit] = seconds[unit] + spent
        tiles = np.ceil(streamed / (hardware.buffers.stream_kib * 512))
        if isinstance(step, Matrix) and not loads and pieces and isinstance(pieces[-1].steps[-1], Matrix):
            last = pieces[-1]  # the rows left over: they take each tile while it is there
            pieces[-1] = replace(last, compute=last.compute + spent, steps=(*last.steps, step))
        else:
            pieces.append(Piece(waiting, spent, tiles, (*loads, step)))
        waiting, streamed, loads = 0.0, 0.0, []
    return OperatorCost(tuple(pieces), **seconds)


def energy(operator: Operator, hardware: Hardware) -> Number:
    """Return the joules of an operator, without static power.

    Off-chip bytes pass a buffer twice, in and out; weights once more for each further pass. A product reads an
    activation once for all outputs that are worked on at a time, and writes its outputs.
    """
    figures = hardware.energy
    moved = operator.nbytes()
    picojoules: Number = moved * (figures.memory_pj_per_byte + 2 * figures.buffer_pj_per_byte)
    for step in operator.instructions:
        if isinstance(step, Matrix):
            passes, outputs = _mapping(step, hardware)
            wide = np.equal(step.weight_bits, 16)  # float16 products have float16 activations
            activations = step.rows * (step.inputs * np.ceil(step.outputs / outputs) + step.outputs)
            weights = np.maximum(passes - 1, 0) * step.outputs * step.inputs
            bits = activations * np.where(wide, 16, hardware.formats.activation_bits) + weights * step.weight_bits
            picojoules = picojoules + step.macs * np.where(wide, figures.fp16_mac_pj, figures.mac_pj)
            picojoules = picojoules + bits / 8 * step.count * figures.buffer_pj_per_byte
        elif isinstance(step, Special):
            picojoules = picojoules + step.elements * figures.special_pj_per_element
    return picojoules * 1e-12
