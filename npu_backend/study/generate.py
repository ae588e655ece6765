"""Whole generations: a prompt, then every decode step at the precision the schedule gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pmpd.npu_backend.hardware.description import Hardware, Number
from pmpd.npu_backend.machine.simulate import Run, simulate
from pmpd.npu_backend.program.graph import OnnxGraph
from pmpd.npu_backend.program.lower import FP16_BITS, lower
from pmpd.npu_backend.program.model import Model
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.schedule.base import Schedule
from pmpd.runtime.schedule.registry import parse_schedule
from pmpd.runtime.schedule.static import step_precisions

__all__ = ["FP16", "Generation", "decode_graph", "generate", "plan", "read_schedule"]

FP16 = "fp16"


@dataclass(frozen=True)
class Generation:
    """A simulated generation.

    Attributes:
        prompt: tokens of the prompt.
        tokens: new tokens; the first comes from prefill, each other from a decode step.
        precisions: bits of every decode step, ``[tokens - 1]``, ints and mixes.
        prefill: the run of the prompt.
        decode: a run per precision, for the steps at it, in order.
    """

    prompt: int
    tokens: int
    precisions: npt.NDArray[np.object_]
    prefill: Run
    decode: dict[float, Run]

    @cached_property
    def steps(self) -> npt.NDArray[np.float64]:
        """Seconds of every decode step, ``[tokens - 1]``."""
        return self._by_step({precision: run.seconds for precision, run in self.decode.items()})

    @cached_property
    def joules(self) -> float:
        """Energy of prompt and decode steps."""
        steps = self._by_step({precision: run.joules for precision, run in self.decode.items()})
        return float(np.max(self.prefill.joules) + steps.sum())

    @property
    def prefill_seconds(self) -> float:
        """Seconds until the first token."""
        return float(np.max(self.prefill.seconds))

    @property
    def decode_seconds(self) -> float:
        """Seconds of all decode steps."""
        return float(self.steps.sum())

    @property
    def average_bits(self) -> float:
        """The mean precision of the decode steps, as Table 1 of the PMPD paper counts it."""
        return float(self.precisions.mean())

    @property
    def decode_tokens_per_second(self) -> float:
        """Decode steps a second."""
        return len(self.steps) / self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, prefill included."""
        return self.tokens / (self.prefill_seconds + self.decode_seconds)

    @property
    def first_steps(self) -> tuple[int, ...]:
        """The first decode step at each precision."""
        return tuple(int(np.argmax(self.precisions == precision)) for precision in self.decode)

    def find(self, step: int) -> tuple[float, int]:
        """Return the precision of decode step `step`, from 0, and its place in the run at that precision.

        Raises:
            PmpdError: there is no such step.
        """
        if not 0 <= step < len(self.precisions):
            raise PmpdError(f"there is no decode step {step}: they are 0 to {len(self.precisions) - 1}")
        precision: float = self.precisions[step]
        return precision, int((self.precisions[:step] == precision).sum())

    def _by_step(self, values: Mapping[float, Number]) -> npt.NDArray[np.float64]:
        result = np.zeros(len(self.precisions))
        for precision, value in values.items():
            result[self.precisions == precision] = value
        return result


def generate(
    model: Model,
    hardware: Hardware,
    *,
    prompt: int,
    tokens: int,
    schedule: Schedule | None,
) -> Generation:
    """Simulate a generation of batch size 1.

    Args:
        model: the graphs.
        hardware: the accelerator.
        prompt: tokens of the prompt, 1 or more.
        tokens: new tokens, 2 or more.
        schedule: the precision of each decode step; None is the float16 model, in prefill too.

    Raises:
        PmpdError: too few tokens, more than the model's context holds, or a precision the model does not have.
        BundleError: a node of a graph cannot be lowered.
    """
    precisions = plan(model, prompt=prompt, tokens=tokens, schedule=schedule)

    def run(graph: OnnxGraph, new: int, past: npt.NDArray[np.float64]) -> Run:
        program = lower(graph, hardware, tokens=new, past=past, fp16=schedule is None)
        return simulate(program, hardware)

    decode = {
        precision: run(
            decode_graph(model, precision), 1, prompt + np.flatnonzero(precisions == precision).astype(float)
        )
        for precision in sorted(set(precisions.tolist()), reverse=True)
    }
    return Generation(prompt, tokens, precisions, run(model.prefill, prompt, np.zeros(1)), decode)


def plan(model: Model, *, prompt: int, tokens: int, schedule: Schedule | None) -> npt.NDArray[np.object_]:
    """Return the bits of every decode step of a generation, 16 for the float16 model.

    Raises:
        PmpdError: too few tokens, more than the model's context holds, or a precision the model does not have.
    """
    if prompt < 1 or tokens < 2:
        raise PmpdError(
            f"a generation has 1 or more tokens of prompt and 2 or more new ones, got {prompt} and {tokens}"
        )
    if prompt + tokens - 1 > model.context_length:
        raise PmpdError(
            f"{prompt} tokens of prompt and {tokens} new ones are more than the context of {model.name}, "
            f"{model.context_length}: give fewer"
        )
    if schedule is None:
        return np.full(tokens - 1, FP16_BITS, dtype=object)
    precisions = np.array(step_precisions(schedule, tokens - 1), dtype=object)
    for precision in precisions.tolist():
        if precision not in model.decode:
            raise PmpdError(f"{model.name} has no graph at {precision} bits: it has {sorted(model.decode)}")
    return precisions


def decode_graph(model: Model, precision: float) -> OnnxGraph:
    """Return the graph of decode steps at `precision`: for the float16 model the one at the highest."""
    return model.decode[max(model.decode) if precision == FP16_BITS else precision]


def read_schedule(text: str, model: Model) -> Schedule | None:
    """Read a schedule as users write it: ``fp16`` for the float16 model, which is None, or what `parse_schedule` reads.

    Raises:
        PmpdError: as `parse_schedule` does.
    """
    return None if text == FP16 else parse_schedule(text, tuple(model.decode))
