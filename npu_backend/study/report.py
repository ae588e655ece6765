"""A study of one model on one accelerator: schedules side by side, and where the time goes; text, JSON, CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from pmpd.npu_backend.hardware.description import Hardware
from pmpd.npu_backend.machine.instructions import Data
from pmpd.npu_backend.program.listing import StreamSizes, listing, stream_sizes
from pmpd.npu_backend.program.lower import FP16_BITS, lower
from pmpd.npu_backend.program.model import Model
from pmpd.npu_backend.study.breakdown import GROUPINGS, OperatorGroup, PhaseBreakdown, phases
from pmpd.npu_backend.study.generate import FP16, Generation, decode_graph, generate, read_schedule
from pmpd.runtime.console.output import amount, csv_text, markdown_table
from pmpd.runtime.schedule.base import Schedule

__all__ = ["VERSION", "Report", "study"]

VERSION = 1
_KEYS = ("phase", "bits", "first_step", "last_step")
_FEW: tuple[Data, ...] = ("vectors", "embedding", "logits")  # of little weight: one column for all


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found.

    Attributes:
        model, hardware: what was simulated.
        baseline: the float16 model.
        generations: by schedule, as the user gave it.
        steps: decode steps that are looked at, instead of means over all.
        phases: each phase once, though schedules may share it.
        streams: sizes of the instructions for all lengths.
    """

    model: Model
    hardware: Hardware
    baseline: Generation
    generations: Mapping[str, Generation]
    steps: tuple[int, ...]
    phases: tuple[PhaseBreakdown, ...]
    streams: StreamSizes

    def speedup(self, generation: Generation) -> float:
        """Return how many times as fast as the float16 model it decodes, as Figure 5 of the PMPD paper counts."""
        return generation.decode_tokens_per_second / self.baseline.decode_tokens_per_second

    @property
    def title(self) -> str:
        """A line that says what was simulated."""
        run = self.baseline
        return f"{self.model.name} on {self.hardware.name}: {run.prompt:,} tokens of prompt, {run.tokens:,} new ones"

    @property
    def last(self) -> Generation:
        """The generation under the last schedule."""
        return list(self.generations.values())[-1]

    def by_module(self) -> tuple[PhaseBreakdown, ...]:
        """Return the phases, the float16 model's first, with the same node of all layers as one row."""
        return _phases([self.baseline, *self.generations.values()], self.model, "module", self.steps)

    def to_text(self, *, details: bool = True) -> str:
        """Return the table of schedules and, with `details`, that of each phase and the size of the instructions."""
        parts = [
            f"{self.title}\n{self.hardware.title}"
            + ("" if self.model.has_output_layer else "; the output layer on the host"),
            markdown_table(self._schedules()),
        ]
        if details:
            size = float(np.max(self.hardware.controller.instruction_bytes))
            for phase in self.phases:
                stream = f"{phase.instructions:,.0f} instructions, {phase.instructions * size / 1e3:,.0f} kB"
                parts.append(f"{phase.title}: {stream}\n\n{markdown_table(_operators(phase), left=2)}")
            streams = self.streams
            parts.append(
                f"Instructions for every length up to {streams.context_length:,}: {streams.each_bytes / 1e6:,.1f} MB; "
                f"with one program for {streams.granularity} lengths: {streams.reused_bytes / 1e6:,.1f} MB"
            )
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready data, with units in the names."""
        hardware, streams = self.hardware, self.streams
        return {
            "version": VERSION,
            "model": self.model.name,
            "hardware": {
                "name": hardware.name,
                "title": hardware.title,
                "macs": float(hardware.matrix_unit.macs),
                "bandwidth_bytes_per_second": float(hardware.bytes_per_second),
                "area_mm2": float(hardware.area_mm2),
            },
            "prompt_tokens": self.baseline.prompt,
            "new_tokens": self.baseline.tokens,
            "layers_only": not self.model.has_output_layer,
            "baseline": self._schedule(FP16, self.baseline),
            "schedules": [self._schedule(name, generation) for name, generation in self.generations.items()],
            "phases": [_phase(phase) for phase in self.phases],
            "instruction_streams": {
                "context_length": streams.context_length,
                "every_length_bytes": streams.each_bytes,
                "length_adaptive_bytes": streams.reused_bytes,
                "length_granularity_tokens": streams.granularity,
            },
        }

    def to_csv(self) -> str:
        """Return a line per group of operators and phase."""
        lines = []
        for phase in self.phases:
            of_phase = {name: value for name, value in _phase(phase).items() if name in _KEYS}
            for row in (_row(row, phase) for row in phase.rows):
                nbytes = {f"{data}_bytes": number for data, number in row.pop("bytes").items()}
                lines.append(of_phase | row | nbytes)
        return csv_text(lines)

    def to_listing(self) -> str:
        """Return the instructions of decode steps: `steps` of the last schedule, or the first at each precision."""
        last, texts = self.last, []
        for step in self.steps or last.first_steps:
            precision, _ = last.find(step)
            graph, past = decode_graph(self.model, precision), float(last.prompt + step)
            fp16 = precision == FP16_BITS
            program = lower(graph, self.hardware, tokens=1, past=past, fp16=fp16)
            texts.append(listing(program, self.hardware))
        return "\n\n".join(texts)

    def _schedule(self, name: str, generation: Generation) -> dict[str, Any]:
        seconds = generation.prefill_seconds + generation.decode_seconds
        return {
            "schedule": name,
            "average_bits": generation.average_bits,
            "time_to_first_token_s": generation.prefill_seconds,
            "decode_tokens_per_second": generation.decode_tokens_per_second,
            "decode_tokens_per_second_by_bits": _rates(generation),
            "tokens_per_second": generation.tokens_per_second,
            "decode_speedup_over_fp16": self.speedup(generation),
            "prefill_share": generation.prefill_seconds / seconds,
            "energy_per_token_j": generation.joules / generation.tokens,
            "average_power_w": generation.joules / seconds,
        }

    def _schedules(self) -> list[list[str]]:
        bits = sorted({bits for generation in self.generations.values() for bits in generation.decode}, reverse=True)
        mixed = any(len(generation.decode) > 1 for generation in self.generations.values())
        at = [FP16 if precision == FP16_BITS else f"{precision} bits" for precision in bits] if mixed else []
        table = [["schedule", "bits", "first token ms", *(f"at {name}" for name in at), "decode tokens/s", "× fp16"]]
        table[0] += ["tokens/s", "mJ/token", "W"]
        for name, generation in self.generations.items():
            row, rates = self._schedule(name, generation), _rates(generation)
            table.append(
                [
                    name,
                    f"{row['average_bits']:.2f}",
                    amount(row["time_to_first_token_s"] * 1e3),
                    *(f"{rates[precision]:,.2f}" if precision in rates else "–" for precision in bits if mixed),
                    f"{row['decode_tokens_per_second']:,.2f}",
                    f"{row['decode_speedup_over_fp16']:.2f}",
                    f"{row['tokens_per_second']:,.2f}",
                    amount(row["energy_per_token_j"] * 1e3),
                    amount(row["average_power_w"]),
                ]
            )
        return table


def study(
    model: Model,
    hardware: Hardware,
    *,
    prompt: int,
    tokens: int,
    schedules: Sequence[str] = (),
    layers_only: bool = False,
    by: str = "kind",
    steps: Sequence[int] = (),
) -> Report:
    """Simulate generations under schedules, and the float16 model beside them.

    Args:
        model: the graphs.
        hardware: the accelerator, of plain numbers.
        prompt, tokens: tokens of the prompt, and new ones.
        schedules: as `read_schedule` reads them; none is uniform at every precision.
        layers_only: leave the output layer to the host.
        by: group operators by a key of `breakdown.GROUPINGS`.
        steps: decode steps to look at, instead of means over all.

    Raises:
        PmpdError: as `generate` and `read_schedule` do, and for a step that is not there.
        BundleError: a node cannot be lowered.
    """
    if layers_only:
        model = model.without_output_layer()
    names = schedules or [FP16, *(f"uniform:{precision}" for precision in model.decode)]
    parsed = {name: read_schedule(name, model) for name in names}

    def simulated(schedule: Schedule | None) -> Generation:
        return generate(model, hardware, prompt=prompt, tokens=tokens, schedule=schedule)

    baseline = simulated(None)
    generations = {name: simulated(schedule) if schedule else baseline for name, schedule in parsed.items()}
    return Report(
        model=model,
        hardware=hardware,
        baseline=baseline,
        generations=generations,
        steps=tuple(steps),
        phases=_phases(generations.values(), model, by, steps),
        streams=stream_sizes(model, hardware),
    )


def _phases(
    generations: Iterable[Generation], model: Model, by: str, steps: Sequence[int]
) -> tuple[PhaseBreakdown, ...]:
    breakdowns = (
        phase for generation in generations for phase in phases(generation, model, by=GROUPINGS[by], steps=steps)
    )
    return tuple({phase.title: phase for phase in breakdowns}.values())


def _rates(generation: Generation) -> dict[float, float]:
    """Decode steps a second at each precision."""
    return {bits: 1 / float(np.mean(run.seconds)) for bits, run in generation.decode.items()}


def _phase(phase: PhaseBreakdown) -> dict[str, Any]:
    return {
        "title": phase.title,
        "phase": phase.phase,
        "bits": phase.precision,
        "first_step": phase.steps[0] if phase.steps else None,
        "last_step": phase.steps[-1] if phase.steps else None,
        "new_tokens": phase.tokens,
        "first_past_tokens": phase.first_past,
        "last_past_tokens": phase.last_past,
        "seconds": phase.seconds,
        "joules": phase.joules,
        "instructions": phase.instructions,
        "operators": [_row(row, phase) for row in phase.rows],
        "total": _row(phase.total, phase),
    }


def _row(row: OperatorGroup, phase: PhaseBreakdown) -> dict[str, Any]:
    return {
        "name": row.name,
        "count": row.count,
        "macs": row.macs,
        "special_elements": row.special_elements,
        "bytes": dict(row.nbytes),
        "intensity_macs_per_byte": row.intensity,
        "bound": row.bound,
        **{f"{unit}_s": seconds for unit, seconds in row.needs.items()},
        "seconds": row.seconds,
        "share": row.seconds / phase.seconds,
        "dynamic_energy_j": row.joules,
    }


def _operators(phase: PhaseBreakdown) -> list[list[str]]:
    moved = phase.total.nbytes
    shown = [data for data in get_args(Data) if data in moved and data not in _FEW]
    unit, scale = ("ms", 1e3) if phase.seconds >= 1e-3 else ("µs", 1e6)
    table = [["operator", "bound by", "count", "MMAC", "M special"]]
    table[0] += [*(f"{data.replace('_', ' ')} MB" for data in shown), "other MB", "MAC/byte", unit, "%"]
    for row in (*phase.rows, phase.total):
        other = sum(row.nbytes.get(data, 0.0) for data in _FEW)
        table.append(
            [
                row.name,
                row.bound,
                f"{row.count}" if row.count else "–",
                amount(row.macs / 1e6),
                amount(row.special_elements / 1e6),
                *(amount(row.nbytes.get(data, 0.0) / 1e6) for data in shown),
                amount(other / 1e6),
                amount(row.intensity),
                f"{row.seconds * scale:,.3f}",
                f"{100 * row.seconds / phase.seconds:.1f}",
            ]
        )
    return table
