"""A generation as a trace in Chrome's JSON format, which Perfetto (ui.perfetto.dev) opens: when units work on what.

Tracks are memory, the matrix unit, the special function unit and the controller, and one of whole phases. An event is a
piece of an operator: on memory what it streams, waiting for a free half of the buffer included; on a unit what is
computed with it, waiting for tiles included. Times are those of the simulation, rounded to nanoseconds.

Source of the format: "Trace Event Format", the Chromium project.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pmpd.npu_backend.hardware.description import Hardware, Number
from pmpd.npu_backend.machine.cost import Piece
from pmpd.npu_backend.machine.instructions import Instruction, Load, Matrix, Special, Store
from pmpd.npu_backend.machine.simulate import Pipeline, Run
from pmpd.npu_backend.program.lower import FP16_BITS
from pmpd.npu_backend.program.model import Model
from pmpd.npu_backend.study.breakdown import GROUPINGS
from pmpd.npu_backend.study.generate import Generation

__all__ = ["TRACKS", "trace"]

TRACKS = ("phases", "memory", "matrix unit", "special function unit", "controller")
_PROCESS = 1


def trace(generation: Generation, model: Model, hardware: Hardware, *, steps: Sequence[int] = ()) -> dict[str, Any]:
    """Return the trace of a generation: all its phases, and inside of them the prompt and some decode steps.

    Args:
        generation: what `generate` returned for `model` on `hardware`.
        model: the graphs.
        hardware: the accelerator.
        steps: decode steps to look into, from 0; none is the first one at each precision.

    Raises:
        PmpdError: the generation has no such step.
    """
    prefill = FP16_BITS if FP16_BITS in generation.decode else model.prefill_precision
    events = [_about("process_name", 0, name=f"{model.name} on {hardware.name}")]
    for tid, track in enumerate(TRACKS):
        events += [_about("thread_name", tid, name=track), _about("thread_sort_index", tid, sort_index=tid)]
    begin = generation.prefill_seconds
    prompt = {"precision_bits": prefill, "tokens": generation.prompt, "past_tokens": 0}
    events.append(_event("phases", "prefill", 0.0, begin, prompt))
    events += _inside(generation.prefill, 0, hardware, 0.0, prompt)
    starts = begin + np.concatenate([[0.0], np.cumsum(generation.steps)])
    for step, precision in enumerate(generation.precisions.tolist()):
        about = {"precision_bits": precision, "tokens": 1, "past_tokens": generation.prompt + step, "step": step}
        events.append(_event("phases", f"decode, {precision} bits", starts[step], starts[step + 1], about))
    for step in sorted(set(steps or generation.first_steps)):
        precision, place = generation.find(step)
        about = {"precision_bits": precision, "tokens": 1, "past_tokens": generation.prompt + step, "step": step}
        events += _inside(generation.decode[precision], place, hardware, starts[step], about)
    return {"displayTimeUnit": "ns", "traceEvents": events}


def _about(kind: str, tid: int, **args: object) -> dict[str, Any]:
    """An event that says something of a process or a track."""
    return {"ph": "M", "pid": _PROCESS, "tid": tid, "name": kind, "args": args}


def _event(track: str, name: str, begin: Number, end: Number, args: dict[str, Any]) -> dict[str, Any]:
    """An event, in microseconds. Both ends are whole nanoseconds, so that neighbours touch and never overlap."""
    first, last = round(float(begin) * 1e9), round(float(end) * 1e9)
    return {
        "ph": "X",
        "pid": _PROCESS,
        "tid": TRACKS.index(track),
        "cat": track,
        "name": name,
        "ts": first / 1e3,
        "dur": (last - first) / 1e3,
        "args": args,
    }


def _inside(run: Run, place: int, hardware: Hardware, begin: float, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run the pieces of a run's entry at `place` again, and note when memory and units are at them."""

    def one(value: Number) -> float:
        return float(np.broadcast_to(value, np.shape(run.seconds))[place])

    state = Pipeline(memory=hardware.memory.latency_ns * 1e-9)
    for time in run.operators:
        module = GROUPINGS["module"](time.operator)
        for piece in time.cost.pieces:
            tiles, memory, compute = one(piece.tiles), one(piece.memory), one(piece.compute)
            after = state.after(Piece(memory, compute, tiles))
            loaded = max(state.memory, state.first) if tiles else state.memory
            computed = max(state.unit, loaded + memory / tiles) if tiles else state.unit
            args = about | {"operator": time.operator.node, "tiles": int(tiles)}
            moves = {step.data: one(step.nbytes) for step in piece.steps if isinstance(step, Load | Store)}
            if memory:
                verb = "store" if isinstance(piece.steps[0], Store) else "load"
                name = f"{verb} {', '.join(data for data, nbytes in moves.items() if nbytes)}"
                moved = {"busy_us": memory * 1e6, "bytes": sum(moves.values())}
                yield _event("memory", name, begin + loaded, begin + after.memory, args | moved)
            if compute:
                work = [step for step in piece.steps if not isinstance(step, Load | Store)]
                track, name = _unit(work, module)
                macs = one(sum((step.macs for step in work if isinstance(step, Matrix)), start=0.0))
                done = {"busy_us": compute * 1e6, "macs": macs}
                yield _event(track, name, begin + computed, begin + after.unit, args | done)
            state = after


def _unit(work: Sequence[Instruction], module: str) -> tuple[str, str]:
    """Return the track of a computation, and its name."""
    first = work[0]
    if isinstance(first, Matrix):
        return "matrix unit", f"{'+'.join(step.opcode for step in work if isinstance(step, Matrix))} {module}"
    if isinstance(first, Special):
        return "special function unit", f"{first.function} {module}"
    return "controller", "synchronise"
