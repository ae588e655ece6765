"""Design-space exploration: thousands of accelerators at once, and which of them nothing beats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.npu_backend.hardware.description import Hardware, Number
from pmpd.npu_backend.machine.instructions import Program
from pmpd.npu_backend.machine.simulate import Run, simulate
from pmpd.npu_backend.program.graph import OnnxGraph
from pmpd.npu_backend.program.lower import FP16_BITS, lower
from pmpd.npu_backend.program.model import Model
from pmpd.npu_backend.study.generate import decode_graph, plan, read_schedule
from pmpd.runtime.console.output import amount, csv_text, markdown_table
from pmpd.runtime.errors import PmpdError

__all__ = ["Exploration", "Limits", "explore", "pareto_front"]

Column = npt.NDArray[np.float64]
_AT_ONCE = 16384  # numbers in an array of the simulation: a few hundred MB for all of them
_ROWS = 20  # of the front, in a table for people
# Metrics, what the table calls them, and by how much they are multiplied there.
_METRICS = {
    "tokens_per_second": ("tokens/s", 1.0),
    "decode_tokens_per_second": ("decode tokens/s", 1.0),
    "time_to_first_token_s": ("first token ms", 1e3),
    "area_mm2": ("mm²", 1.0),
    "energy_per_token_j": ("mJ/token", 1e3),
    "average_power_w": ("W", 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a design must keep; None is no limit."""

    max_area_mm2: float | None = None
    max_power_w: float | None = None
    min_tokens_per_second: float | None = None

    def kept(self, metrics: Mapping[str, Column]) -> npt.NDArray[np.bool_]:
        """Return which points keep all limits."""
        kept = np.ones(len(metrics["area_mm2"]), dtype=bool)
        if self.max_area_mm2 is not None:
            kept &= metrics["area_mm2"] <= self.max_area_mm2
        if self.max_power_w is not None:
            kept &= metrics["average_power_w"] <= self.max_power_w
        if self.min_tokens_per_second is not None:
            kept &= metrics["tokens_per_second"] >= self.min_tokens_per_second
        return kept


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """Designs and what they do: an entry per point in every column.

    Attributes:
        title: a line that says what was explored.
        axes: the numbers that vary, by ``section.field``.
        schedules: the schedule of each point.
        metrics: tokens a second with prefill and without, seconds to the first token, mm², joules a token, watts.
        kept: the points that keep all limits.
        front: the places of those that no other such point beats: as fast, as small and as frugal, and better in one
            of the three. Fastest first.
        impossible: points without metrics: more outputs than units, or an activation buffer too small for the model.
    """

    title: str
    axes: Mapping[str, Column]
    schedules: tuple[str, ...]
    metrics: Mapping[str, Column]
    kept: npt.NDArray[np.bool_]
    front: npt.NDArray[np.int64]
    impossible: int

    def to_text(self) -> str:
        """Return how many points there were, and the front as a table: all of it, or some spread over it."""
        front = self.front
        shown = front if len(front) <= _ROWS else front[np.linspace(0, len(front) - 1, _ROWS).round().astype(int)]
        lines = [
            self.title,
            f"{len(self.schedules):,} designs, {int(self.kept.sum()):,} within the limits, "
            f"{len(front):,} on the Pareto front"
            + (f" ({self.impossible:,} impossible ones left out)" if self.impossible else "")
            + (f"; {len(shown)} of them:" if len(shown) < len(front) else ":"),
        ]
        several = len(set(self.schedules)) > 1
        header = [*(["schedule"] if several else []), *self.axes, *(label for label, _ in _METRICS.values())]
        table = [
            [
                *([self.schedules[i]] if several else []),
                *(f"{values[i]:,.6g}" for values in self.axes.values()),
                *(amount(float(self.metrics[name][i]) * scale) for name, (_, scale) in _METRICS.items()),
            ]
            for i in shown
        ]
        return "\n".join(lines) + "\n\n" + markdown_table([header, *table], left=int(several))

    def to_dict(self) -> dict[str, Any]:
        """Return the front and how many points there were as JSON-ready data, with units in the names."""
        return {
            "version": 1,
            "title": self.title,
            "designs": len(self.schedules),
            "impossible_designs": self.impossible,
            "designs_within_limits": int(self.kept.sum()),
            "front": [self._point(int(i)) for i in self.front],
        }

    def to_csv(self) -> str:
        """Return a line per point that keeps the limits; the column ``on_front`` is 1 or 0."""
        front = set(self.front.tolist())
        return csv_text([self._point(i) | {"on_front": int(i in front)} for i in np.flatnonzero(self.kept).tolist()])

    def _point(self, i: int) -> dict[str, Any]:
        numbers = {name: float(values[i]) for name, values in (self.axes | self.metrics).items()}  # type: ignore[operator]
        return {"schedule": self.schedules[i], **numbers}


def explore(
    model: Model,
    hardware: Hardware,
    points: Mapping[str, Column],
    *,
    prompt: int,
    tokens: int,
    schedules: Sequence[str],
    limits: Limits | None = None,
    layers_only: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Exploration:
    """Simulate a generation on every point of a design space, under each schedule.

    Times and energies are those that `generate` gives: decode steps of lengths that run the same program are computed
    once. 10,000 points take seconds.

    Args:
        model: the graphs.
        hardware: what all points share.
        points: what varies: values by ``section.field``, an entry per point (`Space.points`).
        prompt, tokens: tokens of the prompt, and new ones.
        schedules: as `read_schedule` reads them.
        limits: what a design must keep.
        layers_only: leave the output layer to the host.
        progress: called with how many more points are done.

    Raises:
        PmpdError: as `generate` and `read_schedule` do, or no design is possible and keeps the limits.
        BundleError: a node cannot be lowered.
    """
    if layers_only:
        model = model.without_output_layer()
    plans = {name: plan(model, prompt=prompt, tokens=tokens, schedule=read_schedule(name, model)) for name in schedules}
    count = len(next(iter(points.values())))
    numbers: dict[str, list[Column]] = defaultdict(list)
    names: list[str] = []
    for name, precisions in plans.items():
        task = _Task(model, prompt, _lengths(precisions, prompt, _granularity(hardware, points)))
        possible = np.flatnonzero(task.fits(hardware, points) & np.ones(count, dtype=bool))
        progress(count - len(possible))
        names += [name] * len(possible)
        for at in np.array_split(possible, max(1, len(possible) * task.entries // _AT_ONCE)):
            chosen = {axis: values[at] for axis, values in points.items()}
            for column, values in (chosen | task.metrics(_varied(hardware, chosen), len(at))).items():
                numbers[column].append(values)
            progress(len(at))
    if not names:
        raise PmpdError(
            f"none of {count * len(plans):,} designs is possible: mv_outputs must be at most rows * mm_outputs, "
            "and activation_kib enough for a token"
        )
    columns = {column: np.concatenate(values) for column, values in numbers.items()}
    metrics = {metric: columns.pop(metric) for metric in _METRICS}
    kept = (limits or Limits()).kept(metrics)
    if not kept.any():
        raise PmpdError(
            f"none of {len(names):,} designs keeps the limits: at best they have {metrics['area_mm2'].min():.3g} mm², "
            f"{metrics['average_power_w'].min():.3g} W, {metrics['tokens_per_second'].max():.3g} tokens/s, "
            "each in a design of its own"
        )
    gains = np.stack([metrics["tokens_per_second"], -metrics["area_mm2"], -metrics["energy_per_token_j"]], axis=1)
    front = np.flatnonzero(kept)[pareto_front(gains[kept])]
    return Exploration(
        title=f"{model.name} around {hardware.name}: {prompt:,} tokens of prompt, {tokens:,} new ones",
        axes=columns,
        schedules=tuple(names),
        metrics=metrics,
        kept=kept,
        front=front[np.argsort(-gains[front, 0], kind="stable")],
        impossible=count * len(plans) - len(names),
    )


def pareto_front(gains: Column) -> npt.NDArray[np.int64]:
    """Return the rows of ``[points, goals]`` that no other row beats: nowhere less, and more in one goal or several."""
    # By the first goal, then the next: a row can only be beaten by one before it, or be its equal.
    order = np.lexsort(-gains.T[::-1])
    left = gains[order]
    front = []
    while len(order):
        front.append(order[0])
        stays = (left > left[0]).any(axis=1) | (left == left[0]).all(axis=1)
        stays[0] = False
        order, left = order[stays], left[stays]
    return np.sort(np.array(front, dtype=np.int64))


@dataclass(frozen=True)
class _Task:
    """A generation: `lengths` are those of decode steps by precision, and how many steps have each."""

    model: Model
    prompt: int
    lengths: Mapping[float, tuple[Column, Column]]

    @property
    def entries(self) -> int:
        """How many runs a point takes."""
        return 1 + sum(len(past) for past, _ in self.lengths.values())

    def fits(self, hardware: Hardware, points: Mapping[str, Column]) -> npt.NDArray[np.bool_]:
        """Return which points can be: no more outputs than units, and one token's activations fit on chip."""

        def value(axis: str) -> Any:
            section, _, field = axis.partition(".")
            return points.get(axis, getattr(getattr(hardware, section), field))

        formats = {axis: values for axis, values in points.items() if axis.startswith("formats.")}
        roomy = _varied(hardware, formats).varied(buffers__activation_kib=float(1 << 24))
        graphs = (self.model.prefill, *(decode_graph(self.model, bits) for bits in self.lengths))
        programs = [self._lower(graph, roomy, 1, np.zeros(1)) for graph in graphs]
        taken = reduce(
            np.maximum, (operator.activation_bytes for program in programs for operator in program.operators)
        )
        units = value("matrix_unit.rows") * value("matrix_unit.mm_outputs")
        room = 1024 * value("buffers.activation_kib")
        return np.asarray((value("matrix_unit.mv_outputs") <= units) & (np.ravel(taken) <= room))

    def metrics(self, hardware: Hardware, count: int) -> dict[str, Column]:
        """Return what `count` points do; numbers of `hardware` are ``[count, 1]``."""

        def columns(value: Number, entries: int) -> Column:
            return np.broadcast_to(value, (count, entries))

        prefill = self._run(self.model.prefill, hardware, self.prompt, np.zeros(1))
        first, joules = columns(prefill.seconds, 1)[:, 0], columns(prefill.joules, 1)[:, 0]
        decode = np.zeros(count)
        for bits, (past, steps) in self.lengths.items():
            run = self._run(decode_graph(self.model, bits), hardware, 1, past)
            decode = decode + columns(run.seconds, len(past)) @ steps
            joules = joules + columns(run.joules, len(past)) @ steps
        total = sum(float(steps.sum()) for _, steps in self.lengths.values())
        return {
            "tokens_per_second": (total + 1) / (first + decode),
            "decode_tokens_per_second": total / decode,
            "time_to_first_token_s": first,
            "area_mm2": np.array(columns(hardware.area_mm2, 1)[:, 0]),
            "energy_per_token_j": joules / (total + 1),
            "average_power_w": joules / (first + decode),
        }

    def _run(self, graph: OnnxGraph, hardware: Hardware, tokens: int, past: Column) -> Run:
        return simulate(self._lower(graph, hardware, tokens, past), hardware)

    def _lower(self, graph: OnnxGraph, hardware: Hardware, tokens: int, past: Column) -> Program:
        return lower(graph, hardware, tokens=tokens, past=past, fp16=FP16_BITS in self.lengths)


def _varied(hardware: Hardware, points: Mapping[str, Column]) -> Hardware:
    return hardware.varied(**{axis.replace(".", "__"): values[:, None] for axis, values in points.items()})


def _lengths(precisions: npt.NDArray[np.object_], prompt: int, granularity: int) -> dict[float, tuple[Column, Column]]:
    """Return contexts by precision, the longest of each program, and how many steps run it."""
    contexts = {}
    for bits in sorted(set(precisions.tolist()), reverse=True):
        past = prompt + np.flatnonzero(precisions == bits)
        _, steps = np.unique(-(-past // granularity), return_counts=True)
        contexts[bits] = past[np.cumsum(steps) - 1].astype(float), steps.astype(float)
    return contexts


def _granularity(hardware: Hardware, points: Mapping[str, Column]) -> int:
    """Return the largest number of lengths that run the same program on every point."""
    values = points.get("controller.length_granularity", hardware.controller.length_granularity)
    return int(np.gcd.reduce(np.ravel(values).astype(int)))
