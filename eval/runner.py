"""Runs an evaluation: the floating-point reference first, then each schedule over the same items."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, Self

from pmpd.eval.data.records import Template, read_records
from pmpd.eval.measure.environment import describe_bundle, describe_machine, package_versions
from pmpd.eval.measure.examiner import (
    FP,
    Baseline,
    BundleExaminer,
    Examiner,
    Job,
    Measured,
    ReferenceExaminer,
    Setup,
    logits_file,
    open_bundle_examiner,
    open_reference_examiner,
    reference_file,
)
from pmpd.eval.measure.reference import Reference, ReferenceCheckpoint
from pmpd.eval.measure.samples import Samples
from pmpd.eval.measure.workers import Workers
from pmpd.eval.metrics.base import Sample
from pmpd.eval.metrics.texts import BERTSCORE, TextScorer
from pmpd.eval.report.results import QualityResults, QualityRow
from pmpd.eval.settings import Settings
from pmpd.eval.speed.speed import SpeedSettings, measure_speed, prepare_speed
from pmpd.eval.speed.traffic import step_bytes
from pmpd.eval.tasks.answers import Answers
from pmpd.eval.tasks.base import Item, Task
from pmpd.eval.tasks.registry import TASKS
from pmpd.runtime import Bundle, Generator, Schedule, StaticSchedule, Tokenizer
from pmpd.runtime.console.progress import track
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bundle import sha256_of
from pmpd.runtime.schedule.registry import schedule_of

__all__ = ["Evaluation", "evaluate", "prepare", "read_items"]

log = logging.getLogger(__name__)

SPEED_TOKENS = 128  # decode steps, at most, of a row whose speed is measured


def prepare(bundle: Bundle, settings: Settings) -> tuple[Task, dict[str, Schedule]]:
    """Return the task, set up for the bundle's model, and the schedules to compare, each once, by their full text.

    Raises:
        PmpdError: an option does not fit the task or the model, or a schedule the bundle.
        BundleError: the bundle has no tokenizer that can be read.
        MissingExtraError: a package for texts is not installed.
    """
    names = settings.schedules or tuple(f"uniform:{p}" for p in bundle.manifest.precisions)
    schedules = {str(schedule): schedule for schedule in (schedule_of(bundle, name) for name in names)}
    kind = TASKS[settings.task]
    tokenizer = Tokenizer.from_bundle(bundle)
    if settings.chat and not tokenizer.has_chat_template:
        raise PmpdError(f"{bundle.path} has no chat template: leave --chat out")
    options: dict[str, Any] = {}
    if issubclass(kind, Answers):
        options["scorer"] = _scorer(kind, settings)
    task = kind(
        tokenizer=tokenizer,
        stop_ids=bundle.stop_ids,
        max_new_tokens=settings.max_new_tokens or kind.default_new_tokens,
        context_length=bundle.manifest.context_length,
        template=Template(settings.prompt_template) if settings.prompt_template is not None else None,
        reference_field=settings.reference_field,
        chat=kind.chats and tokenizer.has_chat_template if settings.chat is None else settings.chat,
        stride=settings.stride,
        **options,
    )
    return task, schedules


def _scorer(kind: type[Answers], settings: Settings) -> TextScorer:
    """Return what scores answers.

    Raises:
        PmpdError: an unknown metric, or an encoder that cannot be read.
    """
    names = settings.metrics or (*kind.default_metrics, *([BERTSCORE] if settings.encoder else []))
    TextScorer(tuple(name for name in names if name != BERTSCORE))  # an unknown one is refused before a model is loaded
    if not settings.encoder or BERTSCORE not in names:
        return TextScorer(names)
    from pmpd.eval.metrics.bertscore import Encoder

    return TextScorer(names, Encoder.load(settings.encoder))


def evaluate(bundle: Bundle, settings: Settings, *, quiet: bool = True) -> QualityResults:
    """Measure a bundle under each schedule, beside the floating-point model it was made from.

    Everything is read and checked before a model is loaded. Each sample is kept in the user's cache as soon as it is
    measured, and so are the floating-point model's logits, which a task may compare with (2 bytes x vocabulary x
    tokens). What was interrupted goes on from there, and what another evaluation has measured is not measured again.
    Unless `quiet`, progress is shown on stderr.

    Raises:
        PmpdError: an option, schedule or record that does not fit, data without any usable item, no reference.
        MissingExtraError: a package is missing.
    """
    evaluation = Evaluation.prepare(bundle, settings, quiet=quiet)
    speed = _speed_settings(evaluation) if settings.speed else None
    results = evaluation.results()
    return results if speed is None else _with_speed(results, evaluation, speed)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, checked and ready.

    Attributes:
        bundle, settings: what is measured, and how.
        task, schedules, accuracies, items: what of it.
        checkpoint: the floating-point model.
        skipped: how many items do not fit the model's context.
        quiet: show no progress.
    """

    bundle: Bundle
    settings: Settings
    task: Task
    schedules: Mapping[str, Schedule]
    accuracies: tuple[str, ...]
    checkpoint: ReferenceCheckpoint
    items: Sequence[Item]
    skipped: int
    quiet: bool

    @classmethod
    def prepare(cls, bundle: Bundle, settings: Settings, *, quiet: bool = True) -> Self:
        """Read and check everything; raises as `evaluate`."""
        task, schedules = prepare(bundle, settings)
        checkpoint = ReferenceCheckpoint.find(bundle, settings.reference)
        items, skipped = read_items(task, settings)
        accuracies = tuple(dict.fromkeys(settings.accuracies)) or (bundle.manifest.accuracy,)
        return cls(bundle, settings, task, schedules, accuracies, checkpoint, items, skipped, quiet)

    def results(self) -> QualityResults:
        """Measure everything; raises as `evaluate`."""
        fp = self.reference_samples()
        metrics, manifest = self.task.metrics, self.bundle.manifest
        rows = [QualityRow.of(FP, fp, metrics)]
        kernels = dict[str, list[str]]()
        bytes_at = {bits: step_bytes(manifest, precision=bits, positions=0) for bits in manifest.precisions}
        for accuracy in self.accuracies:
            by_schedule, kernels[accuracy] = self._bundle_samples(accuracy, fp)
            for schedule, samples in by_schedule.items():
                name = str(schedule) if len(self.accuracies) == 1 else f"{schedule} {accuracy}"
                rows.append(QualityRow.of(name, samples, metrics, accuracy=accuracy, bytes_at=bytes_at))
        return QualityResults(rows=tuple(rows), metrics=metrics, environment=_environment(self, kernels=kernels))

    @property
    def threads(self) -> int:
        """Threads to compute with."""
        return self.settings.threads or available_threads()

    def reference_samples(self) -> list[Sample]:
        """Run the floating-point model on every item."""
        path = self._reference_file
        logits = path.with_suffix("") if self.task.compares else None
        opening = partial(
            open_reference_examiner,
            path=self.bundle.path.absolute(),
            checkpoint=self.checkpoint,
            backend=self.settings.reference_backend,
            make_task=partial(_task_of, settings=self.settings),
            logits=logits,
        )
        with self._workers(opening) as workers:
            return self._by_transformers(FP, self.load_reference, path, workers=workers, logits=logits)

    def load_reference(self) -> Reference:
        """Return the floating-point model, loaded."""
        backend = self.settings.reference_backend
        log.info("reference: %s with %s, %d threads", self.checkpoint.path, backend, self.threads)
        return self.checkpoint.load(backend, threads=self.threads)

    def variant_samples(
        self, name: str, digest: str, load: Callable[[], Reference], fp: Sequence[Sample]
    ) -> list[Sample]:
        """Run a variant of the floating-point model on every item.

        Args:
            name: of the row.
            digest: what the variant is known by, beside the floating-point model.
            load: returns it; called if a sample is not on disk.
            fp: samples of the floating-point model, to compare with.
        """
        path = self._reference_file
        return self._by_transformers(name, load, path.with_name(f"{path.stem}-{digest}.jsonl"), texts=_texts(fp))

    def custom_samples(
        self,
        names: Sequence[str],
        kind: str,
        examiner: Callable[[Callable[[], Generator]], Examiner],
        fp: Sequence[Sample],
    ) -> dict[str, list[Sample]]:
        """Run the bundle on every item in a way that no schedule says.

        Args:
            names: of the rows.
            kind: what the way is known by.
            examiner: returns what measures all these rows of an item, given what loads the bundle.
            fp: samples of the floating-point model, to compare with.
        """
        setup = self._setup(self.accuracies[0])
        path = setup.file(self.bundle, self.task)
        samples = Samples(
            self.task,
            examiner(cache(partial(self._load, setup))),
            self.items,
            path=path.with_name(f"{path.stem}-{kind}.jsonl"),
            texts=_texts(fp),
        )
        return {str(name): of_each for name, of_each in self._all(samples, list(names), kind).items()}

    @property
    def _reference_file(self) -> Path:
        return reference_file(self.checkpoint, self.settings.reference_backend, self.task)

    def _by_transformers(
        self,
        name: str,
        load: Callable[[], Reference],
        path: Path,
        *,
        workers: Workers[Job, Measured] | None = None,
        texts: Sequence[tuple[str, ...]] | None = None,
        logits: Path | None = None,
    ) -> list[Sample]:
        samples = Samples(
            self.task,
            ReferenceExaminer(self.task, cache(load), logits),
            self.items,
            path=path,
            workers=workers,
            texts=texts,
            reference=FP,
            logits=logits,
        )
        return self._all(samples, [FP], name)[FP]

    def _bundle_samples(
        self, accuracy: str, fp: Sequence[Sample]
    ) -> tuple[dict[Schedule | str, list[Sample]], list[str]]:
        """Run the bundle on every item, under all schedules; return the samples, and the kernels that ran here."""
        settings = self.settings
        setup = self._setup(accuracy)
        opening = partial(
            open_bundle_examiner,
            path=self.bundle.path.absolute(),
            setup=setup,
            make_task=partial(_task_of, settings=settings),
            context_length=self._capacity,
            file=setup.file(self.bundle, self.task).name,
        )
        logits = self._reference_file.with_suffix("")
        baselines = [
            Baseline(sample.turns[0].ids, logits_file(logits, item) if self.task.compares else None)
            for item, sample in zip(self.items, fp, strict=True)
        ]
        with self._workers(opening) as workers:
            samples = Samples(
                self.task,
                BundleExaminer(self.task, cache(partial(self._load, setup))),
                self.items,
                path=setup.file(self.bundle, self.task, self.checkpoint.digest),
                workers=workers,
                baselines=baselines,
                texts=_texts(fp),
            )
            step = "schedules" if len(self.accuracies) == 1 else f"schedules, {accuracy}"
            by_schedule = self._all(samples, list(self.schedules.values()), step)
        return by_schedule, samples.kernels

    @property
    def _capacity(self) -> int:
        return max(map(self.task.positions, self.items))

    def _setup(self, accuracy: str) -> Setup:
        settings = self.settings
        return Setup(kernels=settings.kernels, accuracy=accuracy, require_fast_kernels=settings.require_fast_kernels)

    def _load(self, setup: Setup) -> Generator:
        return setup.load(self.bundle, context_length=self._capacity, threads=self.threads)

    def _workers(self, opening: Callable[[int], Any]) -> AbstractContextManager[Workers[Job, Measured] | None]:
        """Return the processes that measure, where there are several."""
        settings = self.settings
        if settings.workers == 1 and settings.address is None:
            return nullcontext()
        return Workers(settings.workers, opening, address=settings.address, threads=settings.threads)

    def _all(
        self, samples: Samples, schedules: Sequence[Schedule | str], step: str
    ) -> dict[Schedule | str, list[Sample]]:
        """Return the samples of all items, by schedule."""
        of_each = samples.of_each(range(len(self.items)), schedules)
        by_item = dict(track(of_each, step=step, total=len(self.items), unit="sample", quiet=self.quiet))
        return {schedule: [by_item[i][schedule] for i in range(len(self.items))] for schedule in schedules}


def _texts(fp: Sequence[Sample]) -> list[tuple[str, ...]]:
    """Return the floating-point model's answers."""
    return [tuple(turn.output for turn in sample.turns) for sample in fp]


def _task_of(bundle: Bundle, settings: Settings) -> Task:
    """Return the task, for a worker: answers are scored elsewhere."""
    return prepare(bundle, replace(settings, metrics=(), encoder=None))[0]


def _speed_settings(run: Evaluation) -> SpeedSettings:
    """Return how decode speed is measured: of all static rows, in answers of the task's length.

    Raises:
        PmpdError: there is no static row, or these answers do not fit the model's context.
    """
    static = tuple(name for name, schedule in run.schedules.items() if isinstance(schedule, StaticSchedule))
    if not static:
        raise PmpdError("--speed measures static schedules, and there is none: add one with --schedule")
    settings = SpeedSettings(
        schedules=static,
        accuracies=run.accuracies,
        kernels=run.settings.kernels,
        require_fast_kernels=run.settings.require_fast_kernels,
        max_new_tokens=min(SPEED_TOKENS, run.task.max_new_tokens),
        threads=run.settings.threads,
    )
    prepare_speed(run.bundle, settings)
    return settings


def _with_speed(results: QualityResults, run: Evaluation, settings: SpeedSettings) -> QualityResults:
    """Return results with the decode speed of each row: all rows in turn.

    Rows whose schedule looks at the prompt or the logits have none: what is decoded is random.
    """
    speed = measure_speed(run.bundle, settings, quiet=run.quiet)
    if speed.cause is not None:
        raise speed.cause
    by_name = {row.name: row for row in speed.rows}
    rows = []
    for row in results.rows:
        if (timed := by_name.get(row.name)) is not None:
            seconds = tuple(mean(step) for step in zip(*(timing.seconds for timing in timed.timings), strict=True))
            row = replace(row, decode_tps=timed.decode_tps, step_seconds=seconds)
        rows.append(row)
    prefill = {}
    for accuracy in run.accuracies:
        first = next((row for row in rows if row.accuracy == accuracy and not row.own_prefill), None)
        if first is not None and first.name in by_name:
            prefill[accuracy] = by_name[first.name].prefill_tps
    environment = {**results.environment, "speed": speed.environment["settings"]}
    return replace(results, rows=tuple(rows), prefill_tps=prefill, environment=environment)


def _environment(run: Evaluation, *, kernels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return where and with what it was measured, as JSON-ready data."""
    settings = run.settings
    scorer = run.task.scorer if isinstance(run.task, Answers) else None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        **describe_machine(),
        "threads": run.threads,
        "versions": package_versions(),
        "bundle": describe_bundle(run.bundle),
        "reference": {
            "name": run.checkpoint.path.resolve().name,
            "backend": settings.reference_backend,
            "dtype": "float32",
            "weights": run.checkpoint.weight_hashes(),
        },
        "data": {"name": settings.data.name, "sha256": sha256_of(settings.data), "skipped": run.skipped},
        "metrics": {} if scorer is None else scorer.describe([item.references for item in run.items]),
        "kernels": kernels,
        "limit": settings.limit,
        "settings": {
            **asdict(settings),
            "data": settings.data.name,
            "schedules": tuple(run.schedules),
            "accuracies": run.accuracies,
            "kernels": settings.kernels and settings.kernels.name,
            "reference": settings.reference and Path(settings.reference).name,
            "encoder": settings.encoder and Path(settings.encoder).name,
            "max_new_tokens": run.task.max_new_tokens,
            "chat": run.task.chat,
        },
        "samples": len(run.items),
    }


def _spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return so many of the items, from all over the data."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def read_items(task: Task, settings: Settings) -> tuple[list[Item], int]:
    """Return the items that fit the model's context, of the first `limit`, and how many do not fit.

    Windows of text are not the first ones, but spread over all of it.

    Raises:
        PmpdError: the data cannot be read, or have no such item.
    """
    every = task.items(read_records(settings.data))
    items = _spread(list(every), settings.limit) if task.spreads else list(islice(every, settings.limit))
    fitting = [item for item in items if task.positions(item) <= task.context_length]
    skipped = len(items) - len(fitting)
    if not fitting:
        why = (
            f"each prompt and {task.max_new_tokens} new tokens are longer than"
            if items
            else "no text is long enough in"
        )
        raise PmpdError(f"{settings.data} has nothing to measure: {why} the context of {task.context_length} tokens")
    if skipped:
        log.warning(
            "%d of %d prompts skipped: with %d new tokens they do not fit the model's context of %d tokens",
            *(skipped, len(items), task.max_new_tokens, task.context_length),
        )
    return fitting, skipped
