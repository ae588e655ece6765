"""A schedule for a task: the cheapest one that keeps the quality of the highest precision.

First the precisions of the whole answer (PMPD paper, Section 4.1): the lowest uniform one that keeps the quality is
what decoding starts with. Then the switch points (Section 4.2, Eq. 1-3): from when on lower ones will do. Then, where
asked for, adaptive schedules: from lower precisions up where the model is unsure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from pmpd.eval.measure.examiner import BundleExaminer, Job, Measured, Setup, open_bundle_examiner
from pmpd.eval.measure.samples import Samples
from pmpd.eval.measure.workers import Workers, check_workers
from pmpd.eval.metrics.base import Metric, Sample
from pmpd.eval.metrics.rouge import rouge_scorer
from pmpd.eval.runner import prepare, read_items
from pmpd.eval.settings import Settings
from pmpd.eval.solve.grid import mean_cost, pairs, static_schedules, switch_points
from pmpd.eval.solve.race import Race, Tolerance, best_of, cheapest
from pmpd.eval.solve.solution import Phase, Solution
from pmpd.eval.speed.traffic import step_bytes
from pmpd.eval.tasks.base import Item, Task
from pmpd.eval.tasks.registry import ANSWERING
from pmpd.runtime import AdaptiveSchedule, Bundle, Generator, RepeatSchedule, Schedule, StaticSchedule
from pmpd.runtime.console.progress import Progress, progress
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.bundle import sha256_of

__all__ = ["OBJECTIVES", "SearchSettings", "solve"]

OBJECTIVES = ("bits", "bytes", "time")
"""What may be minimized: mean bits of the decoder's layers, bytes that a step reads, or its measured time."""

TIMED_STEPS = 16  # a precision
THRESHOLDS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of adaptive schedules, in nats


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What to search for.

    Attributes:
        evaluation: task, data and options of its evaluation; its schedules and accuracies do not matter.
        tolerance: how much quality may be lost.
        minimize: one of `OBJECTIVES`.
        target_tps: tokens per second to reach: then the best quality at this speed is looked for, and `tolerance` and
            `minimize` do not matter.
        points: candidate switch points N, the start and the end of an answer included.
        metric: of the task; default its first.
        adaptive: whether adaptive schedules are tried, too.
        low_prefill: whether the prompt, too, may have fewer bits than the bundle gives it.
        early: whether candidates may leave the search before they have seen all samples (`race.cheapest`).
        workers: processes that answer, side by side; what is found is the same. `evaluation.threads` are of each.
        address: HOST:PORT of a Ray cluster for them; each of its nodes has the bundle at the same path.

    Raises:
        PmpdError: a value out of range, or an unknown choice.
    """

    evaluation: Settings
    tolerance: Tolerance
    minimize: str = "bits"
    target_tps: float | None = None
    points: int = 4
    metric: str | None = None
    adaptive: bool = False
    low_prefill: bool = False
    early: bool = True
    workers: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        check_workers(self.workers, self.address)
        if self.minimize not in OBJECTIVES:
            raise PmpdError(unknown_choice("objective", self.minimize, OBJECTIVES))
        if self.target_tps is not None and not 0 < self.target_tps < float("inf"):
            raise PmpdError(f"target must be a number of tokens per second above 0, got {self.target_tps}")
        switch_points(1, self.points)
        if self.evaluation.task not in ANSWERING:
            raise PmpdError(
                f"the task {self.evaluation.task} scores given texts, and a schedule is found by answers: choose one "
                f"of {', '.join(ANSWERING)}"
            )


def solve(bundle: Bundle, settings: SearchSettings) -> Solution:
    """Find a schedule. The bundle is not changed.

    Answers are kept in the user's cache (`measure/samples.py`), so a search that was interrupted goes on where it was.

    Raises:
        PmpdError: an option or record that does not fit, data without any usable item, or a speed that no schedule
            reaches.
        MissingExtraError: a package is missing.
    """
    with ExitStack() as stack:
        return _solve(_Search(bundle, settings, stack), settings)


def _solve(search: _Search, settings: SearchSettings) -> Solution:
    reference = search.reference
    if len(search.items) < 2:
        raise PmpdError(
            f"{settings.evaluation.data} gives one sample, and a schedule needs two: add records or raise --limit"
        )
    if settings.target_tps is None:
        return search.to_a_loss(reference)
    return search.to_a_speed(reference, settings.target_tps)


class _Search:
    """Everything that the phases share."""

    def __init__(self, bundle: Bundle, settings: SearchSettings, stack: ExitStack) -> None:
        task = _task(bundle, settings.evaluation)
        self.bundle, self.settings, self.task = bundle, settings, task
        self.metric = _metric(task.metrics, settings.metric)
        rouge_scorer()
        self.items, self.skipped = read_items(task, settings.evaluation)
        self.reference = StaticSchedule(((bundle.manifest.precisions[0], 0),))
        self._context_length = max(map(task.positions, self.items))
        evaluation = settings.evaluation
        self._setup = Setup(
            kernels=evaluation.kernels,
            accuracy=next(iter(evaluation.accuracies), None),
            require_fast_kernels=evaluation.require_fast_kernels,
        )
        path = self._setup.file(bundle, task)
        workers: Workers[Job, Measured] | None = None
        if settings.workers > 1 or settings.address is not None:
            opening = partial(
                open_bundle_examiner,
                path=bundle.path.absolute(),
                setup=self._setup,
                make_task=partial(_task, evaluation=evaluation),
                context_length=self._context_length,
                file=path.name,
            )
            workers = Workers(settings.workers, opening, address=settings.address, threads=evaluation.threads)
            stack.enter_context(workers)
        examiner = BundleExaminer(task, self._load)
        self.samples = Samples(task, examiner, self.items, path=path, workers=workers, reference=self.reference)
        self._generator: Generator | None = None
        self._seconds: dict[float, float] = {}

    def _load(self) -> Generator:
        """Return the bundle, loaded when it is needed first."""
        if self._generator is None:
            self._generator = self._setup.load(
                self.bundle, context_length=self._context_length, threads=self.settings.evaluation.threads
            )
        return self._generator

    def to_a_loss(self, reference: StaticSchedule) -> Solution:
        """Find the cheapest schedule within the tolerance."""
        find = partial(cheapest, tolerance=self.settings.tolerance, early=self.settings.early)
        cost = self._cost(self.settings.minimize)
        precisions = self.bundle.manifest.precisions
        uniform = sorted(pairs(precisions, self._prefills()), key=lambda pair: cost[pair.switches[0][0]])
        # If all lower ones are out at once, the reference goes on together with schedules that begin like it.
        phases = [self._run("allocate", partial(find, brief=True), uniform, reference)]
        if self._longest(reference) < self.task.max_new_tokens:  # a longer answer may come, and move the switch points
            phases[0] = self._again(phases[0], find, uniform, reference)
        start, prefill = phases[0].race.best.precisions[0], phases[0].race.best.prefill
        steps, lower = self._longest(reference) - 1, [p for p in precisions if p <= start]
        if steps > 0 and len(lower) > 1:
            # Schedules that start lower have been tried: they begin with a precision that did not do.
            switching = [
                schedule
                for schedule in static_schedules(lower, switch_points(steps, self.settings.points), prefill=prefill)
                if schedule.precisions[0] == start and len(schedule.precisions) > 1
            ]
            switching.sort(key=lambda schedule: mean_cost(schedule, cost, steps))
            phases.append(self._run("switch", find, switching, reference))
            if self.settings.adaptive:
                adaptive = [
                    kind(low, start, threshold, prefill)
                    for threshold in THRESHOLDS
                    for low in lower[:0:-1]
                    for kind in (AdaptiveSchedule, RepeatSchedule)
                ]
                phases.append(self._run("adapt", find, adaptive, reference))
        phases[0] = self._again(phases[0], find, uniform, reference)
        rows = [row for phase in phases for row in phase.race.contestants]
        good = [row.schedule for row in rows if row.keeps and len(row.scores) == len(self.items)]
        spent = {schedule: _spent(self.samples.known(schedule), cost) or 0.0 for schedule in good}
        best = min(good, key=lambda schedule: spent[schedule], default=reference)
        return self._solution(reference, best, phases, cost)

    def to_a_speed(self, reference: StaticSchedule, target_tps: float) -> Solution:
        """Find the best schedule at a speed."""
        cost = self._cost("time")
        precisions = self.bundle.manifest.precisions
        first = self._run("answers", best_of, [reference], reference)
        steps = self._longest(reference) - 1
        points = switch_points(max(steps, 0), self.settings.points)
        seconds = {schedule: mean_cost(schedule, cost, steps) for schedule in static_schedules(precisions, points)}
        ordered = sorted(seconds, key=lambda schedule: seconds[schedule])
        fast = [schedule for schedule in ordered if seconds[schedule] <= 1 / target_tps]
        if not fast:
            raise PmpdError(
                f"no schedule of this bundle reaches {target_tps:g} tokens/s here: {ordered[0]} has "
                f"{1 / seconds[ordered[0]]:.1f}; export lower precisions, or ask for less"
            )
        second = self._run("switch", best_of, fast, reference)
        return self._solution(reference, second.race.best, [first, second], cost)

    def _run(
        self, name: str, find: Callable[..., Race[Any]], candidates: Sequence[Schedule], reference: StaticSchedule
    ) -> Phase:
        before = self.samples.steps
        with progress(name, total=len(self.items), unit="sample") as shown:
            race = find(candidates, reference, partial(self._scores, shown=shown), samples=len(self.items))
        return Phase(name, race, self.samples.steps - before)

    def _again(
        self, phase: Phase, find: Callable[..., Race[Any]], candidates: Sequence[Schedule], reference: StaticSchedule
    ) -> Phase:
        """Return a phase with all samples of the reference. It comes out as before; what is known costs no step."""
        if len(phase.race.reference) == len(self.items):
            return phase
        whole = self._run(phase.name, find, candidates, reference)
        return replace(whole, steps=phase.steps + whole.steps)

    def _scores(self, part: range, schedules: Sequence[Schedule], *, shown: Progress) -> dict[Schedule, list[float]]:
        samples = dict[int, Mapping[Schedule | str, Sample]]()
        for index, answered in self.samples.of_each(part, schedules):
            samples[index] = answered
            shown.advance()
        name = self.metric.score
        return {schedule: [samples[index][schedule].scores[name] for index in part] for schedule in schedules}

    def _cost(self, objective: str) -> dict[float, float]:
        """Return what one pass of a decode step costs at each precision."""
        manifest = self.bundle.manifest
        if objective == "bits":
            return {precision: float(precision) for precision in manifest.precisions}
        if objective == "bytes":
            return {p: step_bytes(manifest, precision=p, positions=0) for p in manifest.precisions}
        if not self._seconds:
            self._seconds = _step_seconds(self._load(), self.items[0])
        return self._seconds

    def _prefills(self) -> list[float | None]:
        """Return the precisions that the prompt may have, low to high; the bundle's own is None."""
        manifest = self.bundle.manifest
        lower = sorted(p for p in manifest.precisions if p < manifest.prefill_precision)
        return [*(lower if self.settings.low_prefill else []), None]

    def _longest(self, schedule: StaticSchedule) -> int:
        """Return the tokens of the longest answer that is known of a schedule."""
        return max(sample.output_tokens for sample in self.samples.known(schedule))

    def _solution(
        self, reference: StaticSchedule, best: Schedule, phases: Sequence[Phase], cost: Mapping[float, float]
    ) -> Solution:
        schedules = [reference, *(row.schedule for phase in phases for row in phase.race.contestants)]
        samples = {schedule: self.samples.known(schedule) for schedule in schedules}
        return Solution(
            task=self.settings.evaluation.task,
            data=self.settings.evaluation.data.name,
            data_sha256=sha256_of(self.settings.evaluation.data),
            samples=len(self.items),
            skipped=self.skipped,
            metric=self.metric,
            tolerance=self.settings.tolerance,
            objective="time" if self.settings.target_tps else self.settings.minimize,
            target_tps=self.settings.target_tps,
            reference=reference,
            best=best,
            bits={schedule: _spent(known, self._cost("bits")) for schedule, known in samples.items()},
            costs={schedule: _spent(known, cost) for schedule, known in samples.items()},
            phases=tuple(phases),
        )


def _task(bundle: Bundle, evaluation: Settings) -> Task:
    return prepare(bundle, evaluation)[0]


def _spent(samples: Sequence[Sample], cost: Mapping[float, float]) -> float | None:
    """Return the mean cost of the answers' decode steps, all passes included; None if there are no steps."""
    steps = sum(sample.steps for sample in samples)
    return sum(cost[bits] for sample in samples for bits in sample.passes) / steps if steps else None


def _metric(metrics: Sequence[Metric], name: str | None) -> Metric:
    named = {metric.name: metric for metric in metrics}
    if name is not None and name not in named:
        raise PmpdError(unknown_choice("metric", name, named))
    return metrics[0] if name is None else named[name]


def _step_seconds(generator: Generator, item: Item) -> dict[float, float]:
    """Return the median time of a decode step at each precision, one after the other behind the same prompt."""
    sequence = generator.sequence
    sequence.reset()
    token = int(sequence.prefill(item.ids).argmax())
    times: dict[float, list[float]] = {precision: [] for precision in sequence.precisions}
    for _ in range(TIMED_STEPS + 1):
        for precision, seconds in times.items():
            begin = time.perf_counter()
            sequence.step(token, precision=precision, margin=0.0)
            seconds.append(time.perf_counter() - begin)
            sequence.truncate(len(item.ids))
    return {precision: median(seconds[1:]) for precision, seconds in times.items()}
