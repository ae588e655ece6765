"""Answers items of a task under schedules, and scores the answers: here, or in the process of a worker."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pmpd.eval.measure.metrics import rouge_scorer
from pmpd.eval.measure.models import Answer, Scheduled
from pmpd.eval.report.environment import package_versions
from pmpd.eval.solve.forks import Forks
from pmpd.eval.tasks.base import Baseline, Item
from pmpd.eval.tasks.rouge import Rouge
from pmpd.runtime import Bundle, Generator, Schedule, StaticSchedule
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bundle import sha256_of

__all__ = ["Examiner", "Job", "Measured", "Outcome", "Setup", "open_examiner"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One answer: the task's scores of it, its tokens, the passes of its decode steps at each precision, and its text.

    A step that was run again has two passes. The step that gives the token that ends an answer is not counted.
    """

    scores: Mapping[str, float]
    tokens: int
    passes: Mapping[str, int]
    text: str

    def __post_init__(self) -> None:
        kinds = ((self.scores, dict), (self.tokens, int), (self.passes, dict), (self.text, str))
        if not all(isinstance(value, kind) for value, kind in kinds):  # from a file that somebody has changed
            raise TypeError("an outcome has scores, tokens, passes and a text")


@dataclass(frozen=True, kw_only=True)
class Job:
    """An item and the schedules to answer it under; `reference` is the outcome under the reference, where known."""

    item: Item
    schedules: tuple[Schedule, ...]
    reference: Outcome | None


@dataclass(frozen=True)
class Measured:
    """What came of a job, and the decode steps that it took."""

    outcomes: Mapping[Schedule, Outcome]
    steps: int


class Examiner:
    """Answers items under schedules, and scores the answers.

    Args:
        task: how answers are scored. Where an item has no references, the answer under `reference` is one.
        reference: the schedule that others are compared with.
        generator: makes answers; called when the first job is there.
    """

    def __init__(self, task: Rouge, reference: Schedule, generator: Callable[[], Generator]) -> None:
        self.reference = reference
        self._task, self._generator = task, generator
        self._steps = 0

    def __call__(self, job: Job) -> Measured:
        """Return the outcomes of a job's item under its schedules.

        Raises:
            PmpdError: an answer cannot be computed.
        """
        before = self._steps
        outcomes = self._measure(job.item, job.schedules, job.reference)
        return Measured(outcomes, self._steps - before)

    def _measure(self, item: Item, schedules: Sequence[Schedule], reference: Outcome | None) -> dict[Schedule, Outcome]:
        needed = not item.references and reference is None and self.reference not in schedules
        answers = self._answers(item, [*schedules, *([self.reference] if needed else [])])
        if reference is not None:
            text = reference.text
        else:
            text = self._task.tokenizer.decode(answers[self.reference].ids) if self.reference in answers else ""
        outcomes = dict[Schedule, Outcome]()
        for schedule, answer in answers.items():
            sample, _ = self._task.score(item, answer, Baseline(text=text))
            passes = dict(Counter(map(str, (*answer.precisions[1:], *answer.first_passes.values()))))
            outcomes[schedule] = Outcome(
                scores=sample.scores, tokens=len(answer.ids), passes=passes, text=sample.output
            )
        return outcomes

    def _answers(self, item: Item, schedules: Sequence[Schedule]) -> dict[Schedule, Answer]:
        """Return the answer under each schedule: those of static ones share what they have in common."""
        generator, task = self._generator(), self._task
        static = [schedule for schedule in schedules if isinstance(schedule, StaticSchedule)]
        forks = Forks(generator, max_new_tokens=task.max_new_tokens, stop_ids=task.stop_ids)
        answers: dict[Schedule, Answer] = dict(forks.answers(item.ids, static))
        self._steps += forks.steps
        for schedule in schedules:
            if schedule not in answers:
                model = Scheduled(generator, schedule)
                answer = model.generate(item.ids, max_new_tokens=task.max_new_tokens, stop_ids=task.stop_ids)
                self._steps += len(answer.ids) - (len(answer.ids) == task.max_new_tokens)
                answers[schedule] = answer
        return answers


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What answers depend on beside the bundle and the prompts.

    Attributes:
        task: a name for how answers are scored.
        kernels, accuracy, require_fast_kernels: as in `Settings`.
    """

    task: str
    kernels: Path | None = None
    accuracy: str | None = None
    require_fast_kernels: bool = False

    def file(self, bundle: Bundle, *, tokens: int) -> Path:
        """Return the file for answers of up to `tokens` tokens, of a bundle and these packages, in the user's cache."""
        manifest = bundle.manifest
        files = {name: entry.sha256 for name, entry in manifest.files.items() if not name.startswith("schedules/")}
        what = {
            "files": files,
            "prefill": manifest.prefill_precision,
            "kernels": self.kernels and sha256_of(self.kernels),
            "accuracy": self.accuracy or manifest.accuracy,
            "packages": package_versions(),
            "task": self.task,
            "tokens": tokens,
        }
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return root / "pmpd" / "schedules" / f"{digest[:16]}.jsonl"

    def load(self, bundle: Bundle, *, context_length: int, threads: int | None) -> Generator:
        """Return the bundle, loaded. Raises as `Generator`."""
        return Generator(
            bundle,
            threads=threads,
            context_length=context_length,
            kernels=self.kernels or True,
            accuracy=self.accuracy,
            require_fast_kernels=self.require_fast_kernels,
        )


def open_examiner(
    threads: int,
    *,
    path: Path,
    setup: Setup,
    make_task: Callable[[Bundle], Rouge],
    context_length: int,
    file: str,
) -> Examiner:
    """Return what answers in a worker.

    Args:
        threads: to compute with.
        path: the bundle.
        setup: how to answer.
        make_task: makes the task of the bundle.
        context_length: of the KV cache.
        file: the name of `setup.file` where the answers go.

    Raises:
        PmpdError: here it would be another file: another bundle, or other packages.
    """
    bundle = Bundle.open(path)
    task = make_task(bundle)
    if setup.file(bundle, tokens=task.max_new_tokens).name != file:
        raise PmpdError(
            f"{path} on {platform.node()} is another bundle, or packages there have other versions: copy the bundle "
            "there, and install the same versions"
        )
    rouge_scorer()
    generator = setup.load(bundle, context_length=context_length, threads=threads)
    return Examiner(task, StaticSchedule(((bundle.manifest.precisions[0], 0),)), lambda: generator)
