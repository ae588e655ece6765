"""The instruction stream itself: how long it is for one length and for all, and a readable listing of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pmpd.npu_backend.hardware.description import Hardware, Number
from pmpd.npu_backend.machine.cost import STREAMS, OperatorCost, operator_cost
from pmpd.npu_backend.machine.instructions import Instruction, Load, Matrix, Program, Special, Store
from pmpd.npu_backend.program.lower import lower
from pmpd.npu_backend.program.model import Model

__all__ = ["StreamSizes", "instruction_count", "listing", "stream_sizes"]


@dataclass(frozen=True)
class StreamSizes:
    """Bytes of instructions for every prompt and context a model may have.

    Attributes:
        context_length: the longest text, in tokens.
        each_bytes: a program for every length.
        reused_bytes: a program for every multiple of `granularity` tokens (FlightLLM's length-adaptive compilation).
        granularity: lengths that share a program.
    """

    context_length: int
    each_bytes: float
    reused_bytes: float
    granularity: int


def instruction_count(costs: Iterable[OperatorCost]) -> Number:
    """Return the instructions of operators: those that stream count once per tile of half the stream buffer."""
    pieces = (piece for cost in costs for piece in cost.pieces)
    return sum(
        (np.maximum(piece.tiles, 1) * sum((_does_anything(step) for step in piece.steps), start=0) for piece in pieces),
        start=0.0,
    )


def stream_sizes(model: Model, hardware: Hardware) -> StreamSizes:
    """Return what the instructions for all lengths of a model take: prompts of each, and a decode step after each."""
    granularity, context = int(np.max(hardware.controller.length_granularity)), model.context_length
    totals: dict[int, float] = {}
    for step in (1, granularity):
        lengths = np.minimum(np.arange(step, context + step, step), context).astype(float)
        programs = [lower(model.prefill, hardware, tokens=lengths, past=0)]
        programs += [
            lower(graph, hardware, tokens=1, past=np.minimum(lengths, context - 1)) for graph in model.decode.values()
        ]
        counts = [np.broadcast_to(_count(program, hardware), lengths.shape).sum() for program in programs]
        totals[step] = float(sum(counts) * np.max(hardware.controller.instruction_bytes))
    return StreamSizes(context, totals[1], totals[granularity], granularity)


def listing(program: Program, hardware: Hardware) -> str:
    """Return a program of one length as text: every operator's instructions with operands, bytes and buffers.

    A line stands for one instruction per tile; its operands are those of all tiles together.
    """
    return "\n".join([*_lines(program, hardware), ""])


def _count(program: Program, hardware: Hardware) -> Number:
    return instruction_count(operator_cost(operator, hardware) for operator in program.operators)


def _does_anything(step: Instruction) -> Number:
    """Return 1, or 0 where a length leaves nothing to do: no cache to load, no rows left over for ``MV``."""
    work = step.nbytes if isinstance(step, Load | Store) else step.rows if isinstance(step, Matrix) else 1
    return np.minimum(np.ceil(work), 1.0)  # rows and bytes are not below 0


def _lines(program: Program, hardware: Hardware) -> Iterator[str]:
    count = float(np.max(_count(program, hardware)))
    size = count * float(np.max(hardware.controller.instruction_bytes))
    tokens, past = (float(np.max(length)) for length in (program.tokens, program.past))
    yield (
        f"; {program.graph} on {hardware.name}: {_whole(tokens)} new, {_whole(past)} before; "
        f"{len(program.operators)} operators, {_whole(count)} instructions, {_whole(size)} bytes"
    )
    for operator in program.operators:
        yield ""
        yield f"; {operator.node}"
        for piece in operator_cost(operator, hardware).pieces:
            tiles = float(np.max(piece.tiles))
            for step in filter(_does_anything, piece.steps):
                yield f"{_line(step):<70}  in {_whole(tiles)} tiles" if tiles > 1 else _line(step)


def _line(step: Instruction) -> str:
    if isinstance(step, Load | Store):
        opcode, arrow = ("LD", "<-") if isinstance(step, Load) else ("ST", "->")
        buffer = "stream" if isinstance(step, Load) and step.data in STREAMS else "activation"
        operands = f"{buffer:<10} {arrow} {step.data:<11} {_whole(step.nbytes):>13} bytes"
    elif isinstance(step, Matrix):
        opcode = step.opcode
        weights = f"{_whole(step.weight_bits)}-bit{' codebook' if step.codebook else ''}"
        times = f", {step.count} times" if step.count > 1 else ""
        inputs = _whole(step.inputs)
        operands = f"[{_whole(step.rows)}, {inputs}] x [{inputs}, {_whole(step.outputs)}]  {weights} weights{times}"
    elif isinstance(step, Special):
        opcode, operands = "MISC", f"{step.function:<25} {_whole(step.elements):>13} elements"
    else:
        opcode, operands = "SYS", ""
    return f"{opcode:<5} {operands}".rstrip()


def _whole(value: Number) -> str:
    """A number of one length; halves come from the mean of a causal attention's lengths."""
    number = float(np.max(value))
    return f"{number:,.0f}" if number == round(number) else f"{number:,.1f}"
