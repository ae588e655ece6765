"""Runs an evaluation: the floating-point reference first, then each schedule over the same items."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pmpd.eval.data.records import Template, read_records
from pmpd.eval.measure.metrics import rouge_scorer
from pmpd.eval.measure.models import ModelUnderTest, Scheduled
from pmpd.eval.measure.reference import BACKENDS, ReferenceCheckpoint
from pmpd.eval.measure.scoring import Sample
from pmpd.eval.report.environment import describe_bundle, describe_machine, package_versions
from pmpd.eval.report.results import FP, QualityResults, QualityRow
from pmpd.eval.speed.speed import SPEED
from pmpd.eval.speed.traffic import step_bytes
from pmpd.eval.tasks.base import Baseline, Item, Task
from pmpd.eval.tasks.registry import TASKS
from pmpd.runtime import Bundle, Generator, Schedule, Tokenizer
from pmpd.runtime.console.progress import track
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.bundle import sha256_of
from pmpd.runtime.format.manifest import ACCURACIES
from pmpd.runtime.schedule.registry import schedule_of

__all__ = ["Settings", "evaluate", "prepare", "read_items"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to evaluate and how.

    Attributes:
        task: a name of `TASKS`.
        data: JSON lines (``.jsonl``, also ``.jsonl.gz``), or a plain text.
        schedules: one row each; ``4`` and ``uniform:4`` are the same row. Default uniform at every precision of the
            bundle.
        accuracies: how kernels compute; each gives all rows again. Default the bundle's.
        kernels: a kernel library to use instead of the bundle's.
        require_fast_kernels: whether to refuse a bundle without compiled kernels for this machine.
        limit: use only the first items of the data, at most this many (records; for perplexity, windows of text).
        max_new_tokens: tokens per answer; default the task's.
        prompt_template: the prompt, with ``{field}``; default the task's.
        reference_field: field with the reference text; default the task's.
        chat: whether prompts go through the chat template; default where both task and model have one.
        reference: folder, alias or hub id of the floating-point model; default what the bundle was made from.
        reference_backend: a name of `BACKENDS`.
        threads: threads to compute with; default all processors this process may use.

    Raises:
        PmpdError: a value out of range, or an unknown choice.
    """

    task: str
    data: Path = Path()
    schedules: tuple[str, ...] = ()
    accuracies: tuple[str, ...] = ()
    kernels: Path | None = None
    require_fast_kernels: bool = False
    limit: int | None = None
    max_new_tokens: int | None = None
    prompt_template: str | None = None
    reference_field: str | None = None
    chat: bool | None = None
    reference: str | None = None
    reference_backend: str = "transformers"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise PmpdError(unknown_choice("task", self.task, [*TASKS, SPEED]))
        for accuracy in self.accuracies:
            if accuracy not in ACCURACIES:
                raise PmpdError(unknown_choice("accuracy", accuracy, ACCURACIES))
        if self.reference_backend not in BACKENDS:
            raise PmpdError(unknown_choice("reference backend", self.reference_backend, BACKENDS))
        if self.data == Path():
            raise PmpdError(f"the task {self.task} needs --data: a .jsonl or text file")
        if not self.data.is_file():
            raise PmpdError(f"data file {self.data} does not exist: give a .jsonl or text file")
        for name in ("limit", "max_new_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PmpdError(f"{name.replace('_', ' ')} must be 1 or more, got {value}")
        if self.prompt_template is not None:
            Template(self.prompt_template)


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
    task = kind(
        tokenizer=tokenizer,
        stop_ids=bundle.stop_ids,
        max_new_tokens=settings.max_new_tokens or kind.default_new_tokens,
        context_length=bundle.manifest.context_length,
        template=Template(settings.prompt_template) if settings.prompt_template is not None else None,
        reference_field=settings.reference_field,
        chat=kind.chats and tokenizer.has_chat_template if settings.chat is None else settings.chat,
    )
    return task, schedules


def evaluate(bundle: Bundle, settings: Settings, *, quiet: bool = True) -> QualityResults:
    """Measure a bundle under each schedule, beside the floating-point model it was made from.

    Everything is read and checked before a model is loaded. The floating-point model is dropped before the bundle's
    first row; logits that a task compares with lie in temporary files (4 bytes x vocabulary x tokens). Unless `quiet`,
    the progress of each row is shown on stderr.

    An interrupt (KeyboardInterrupt) or a PmpdError after at least one schedule is measured ends the evaluation: the
    finished rows are returned, with the names of the others as `unfinished` and the exception as `cause`.

    Raises:
        PmpdError: an option, schedule or record that does not fit, data without any usable item, no reference.
        MissingExtraError: a package is missing.
    """
    task, schedules = prepare(bundle, settings)
    rouge_scorer()
    checkpoint = ReferenceCheckpoint.find(bundle, settings.reference)
    items, skipped = read_items(task, settings)
    run = _Run(
        bundle=bundle,
        settings=settings,
        task=task,
        schedules=schedules,
        accuracies=tuple(dict.fromkeys(settings.accuracies)) or (bundle.manifest.accuracy,),
        items=items,
        threads=settings.threads or available_threads(),
        quiet=quiet,
    )
    kernels: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="pmpd-eval-") as scratch:
        reference, baselines = _measure_reference(run, checkpoint, Path(scratch))
        rows = [reference]
        cause: KeyboardInterrupt | PmpdError | None = None
        try:
            for row, accuracy, names in _measure_schedules(run, baselines):
                rows.append(row)
                kernels[accuracy] = names
        except (KeyboardInterrupt, PmpdError) as error:
            if len(rows) == 1:
                raise
            cause = error.with_traceback(None)
    return QualityResults(
        rows=tuple(rows),
        metrics=task.metrics,
        environment=_environment(run, checkpoint, kernels=kernels, skipped=skipped),
        unfinished=run.row_names[len(rows) :],
        cause=cause,
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """An evaluation, checked and ready: what every row shares."""

    bundle: Bundle
    settings: Settings
    task: Task
    schedules: Mapping[str, Schedule]
    accuracies: tuple[str, ...]
    items: Sequence[Item]
    threads: int
    quiet: bool

    def name(self, schedule: str, accuracy: str) -> str:
        """Return the name of a row."""
        return schedule if len(self.accuracies) == 1 else f"{schedule} {accuracy}"

    @property
    def row_names(self) -> tuple[str, ...]:
        """The names of all rows, in the order in which they are measured."""
        return (FP, *(self.name(schedule, accuracy) for accuracy in self.accuracies for schedule in self.schedules))

    def step(self, row: str) -> str:
        """Return what progress calls a row: ``[2/5] uniform:4``."""
        return f"[{self.row_names.index(row) + 1}/{len(self.row_names)}] {row}"

    def generator(self, accuracy: str) -> Generator:
        """Open the bundle with kernels that compute with an accuracy."""
        return Generator(
            self.bundle,
            threads=self.threads,
            context_length=max(map(self.task.positions, self.items)),
            kernels=self.settings.kernels or True,
            accuracy=accuracy,
            require_fast_kernels=self.settings.require_fast_kernels,
        )


def _measure_reference(run: _Run, checkpoint: ReferenceCheckpoint, scratch: Path) -> tuple[QualityRow, list[Baseline]]:
    """Run the floating-point model on every item; return its row, and what the other rows are compared with."""
    backend = run.settings.reference_backend
    log.info("reference: %s with %s, %d threads", checkpoint.path, backend, run.threads)
    model = checkpoint.load(backend, threads=run.threads)
    model.warm_up(run.items[0].ids)
    samples: list[Sample] = []
    baselines: list[Baseline] = []
    for item in track(run.items, step=run.step(FP), total=len(run.items), quiet=run.quiet):
        sample, baseline = run.task.measure(model, item, None)
        samples.append(sample)
        baselines.append(_spill(baseline, scratch / f"{len(baselines)}.npy"))
    return QualityRow.of(FP, samples, run.task.metrics), baselines


def _measure_schedules(run: _Run, baselines: Sequence[Baseline]) -> Iterator[tuple[QualityRow, str, list[str]]]:
    """Yield the row of each accuracy and schedule, the accuracy, and the kernels that have run with it so far."""
    pairs = list(zip(run.items, baselines, strict=True))
    manifest = run.bundle.manifest
    bytes_at = {bits: step_bytes(manifest, precision=bits, positions=0) for bits in manifest.precisions}
    for accuracy in run.accuracies:
        generator = run.generator(accuracy)
        for schedule_name, schedule in run.schedules.items():
            name = run.name(schedule_name, accuracy)
            model: ModelUnderTest = Scheduled(generator, schedule)
            model.warm_up(run.items[0].ids)
            tracked = track(pairs, step=run.step(name), total=len(pairs), quiet=run.quiet)
            samples = [run.task.measure(model, item, baseline)[0] for item, baseline in tracked]
            kernels = sorted({node.kernel for node in generator.kernels() if node.kernel})
            row = QualityRow.of(name, samples, run.task.metrics, accuracy=accuracy, bytes_at=bytes_at)
            yield row, accuracy, kernels
        del generator, model  # before the next maps a cache of its own


def _environment(
    run: _Run, checkpoint: ReferenceCheckpoint, *, kernels: Mapping[str, Sequence[str]], skipped: int
) -> dict[str, Any]:
    """Return where and with what it was measured, as JSON-ready data."""
    settings = run.settings
    return {
        **describe_machine(),
        "threads": run.threads,
        "versions": package_versions(),
        "bundle": describe_bundle(run.bundle),
        "reference": {
            "name": checkpoint.path.resolve().name,
            "backend": settings.reference_backend,
            "dtype": "float32",
        },
        "data": {"name": settings.data.name, "sha256": sha256_of(settings.data), "skipped": skipped},
        "kernels": kernels,
        "limit": settings.limit,
        "settings": {
            **asdict(settings),
            "data": settings.data.name,
            "schedules": tuple(run.schedules),
            "accuracies": run.accuracies,
            "kernels": settings.kernels and settings.kernels.name,
            "max_new_tokens": run.task.max_new_tokens,
            "chat": run.task.chat,
        },
        "samples": len(run.items),
    }


def read_items(task: Task, settings: Settings) -> tuple[list[Item], int]:
    """Return the items that fit the model's context, of the first `limit`, and how many do not fit.

    Raises:
        PmpdError: the data cannot be read, or have no such item.
    """
    items = list(islice(task.items(read_records(settings.data)), settings.limit))
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


def _spill(baseline: Baseline, path: Path) -> Baseline:
    """Move a baseline's logits to a file, to be mapped when they are needed."""
    if baseline.logits is None:
        return baseline
    np.save(path, baseline.logits, allow_pickle=False)
    return replace(baseline, logits=np.load(path, mmap_mode="r", allow_pickle=False))
