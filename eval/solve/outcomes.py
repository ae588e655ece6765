"""What each schedule made of each sample: measured once, kept on disk, and read again by whoever asks next.

A search that was killed, one with another tolerance, and one of other switch points all use what is there. Each line of
the file is what one sample gave; a line that a kill cut off is measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pmpd.eval.measure.models import Answer, Scheduled
from pmpd.eval.solve.forks import Forks
from pmpd.eval.solve.workers import Workers
from pmpd.eval.tasks.base import Baseline, Item
from pmpd.eval.tasks.rouge import Rouge
from pmpd.runtime import Generator, Schedule, StaticSchedule

__all__ = ["Examiner", "Job", "Measured", "Outcome", "Outcomes"]


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


class Outcomes:
    """Outcomes of a task's items under schedules.

    Args:
        task: how answers are scored. Where an item has no references, the answer under `reference` is one.
        items: what is asked.
        reference: the schedule that others are compared with.
        generator: makes answers; called when the first is missing.
        path: the file that outcomes are kept in.
        workers: compute what is missing instead of `generator`, several items at once.

    Attributes:
        steps: decode steps that were computed, not those that were on disk.
    """

    def __init__(
        self,
        task: Rouge,
        items: Sequence[Item],
        *,
        reference: Schedule,
        generator: Callable[[], Generator],
        path: Path,
        workers: Workers[Job, Measured] | None = None,
    ) -> None:
        self._items, self._reference = items, reference
        self._keys = [_key(item) for item in items]
        self._examiner, self._workers = Examiner(task, reference, generator), workers
        self.steps = 0
        self._path = path
        self._known, self._whole = _read(path)

    def known(self, schedule: Schedule) -> list[Outcome]:
        """Return the outcomes of a schedule that are known, item by item."""
        outcomes = (self._known.get(key, {}).get(str(schedule)) for key in self._keys)
        return [outcome for outcome in outcomes if outcome is not None]

    def of(self, index: int, schedules: Iterable[Schedule]) -> dict[Schedule, Outcome]:
        """Return the outcomes of one item, computing those that are not known.

        Raises:
            PmpdError: an answer cannot be computed.
        """
        return dict(self.of_each([index], schedules))[index]

    def of_each(
        self, indices: Iterable[int], schedules: Iterable[Schedule]
    ) -> Iterator[tuple[int, dict[Schedule, Outcome]]]:
        """Yield the index and the outcomes of each item, known ones first, then each as soon as it is computed.

        What is computed is on disk before it is given.

        Raises:
            PmpdError: an answer cannot be computed.
        """
        asked = list(schedules)
        jobs = dict[str, Job]()
        places = dict[str, list[int]]()  # an item that the data have twice is computed once
        for index in indices:
            key = self._keys[index]
            known = self._known.setdefault(key, {})
            missing = tuple(schedule for schedule in asked if str(schedule) not in known)
            if not missing:
                yield index, {schedule: known[str(schedule)] for schedule in asked}
                continue
            item = self._items[index]
            jobs.setdefault(key, Job(item=item, schedules=missing, reference=known.get(str(self._reference))))
            places.setdefault(key, []).append(index)
        for key, measured in self._measured(jobs):
            self.steps += measured.steps
            self._keep(key, measured.outcomes)
            for index in places[key]:
                yield index, {schedule: self._known[key][str(schedule)] for schedule in asked}

    def _measured(self, jobs: Mapping[str, Job]) -> Iterator[tuple[str, Measured]]:
        if self._workers is not None:
            yield from self._workers.run(jobs, name=lambda key: jobs[key].item.source)
            return
        for key, job in jobs.items():
            yield key, self._examiner(job)

    def _keep(self, key: str, outcomes: Mapping[Schedule, Outcome]) -> None:
        self._known[key] |= {str(schedule): outcome for schedule, outcome in outcomes.items()}
        line = {"item": key, "outcomes": {str(schedule): asdict(outcome) for schedule, outcome in outcomes.items()}}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("" if self._whole else "\n") + json.dumps(line) + "\n")
        self._whole = True


class Examiner:
    """Answers items under schedules, and scores the answers.

    Args:
        task: how answers are scored. Where an item has no references, the answer under `reference` is one.
        reference: the schedule that others are compared with.
        generator: makes answers; called when the first job is there.
    """

    def __init__(self, task: Rouge, reference: Schedule, generator: Callable[[], Generator]) -> None:
        self._task, self._reference, self._generator = task, reference, generator
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
        needed = not item.references and reference is None and self._reference not in schedules
        answers = self._answers(item, [*schedules, *([self._reference] if needed else [])])
        if reference is not None:
            text = reference.text
        else:
            text = self._task.tokenizer.decode(answers[self._reference].ids) if self._reference in answers else ""
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


def _key(item: Item) -> str:
    """Return what an item is known by: its tokens and references, wherever it came from."""
    return hashlib.sha256(json.dumps([item.ids, item.references]).encode()).hexdigest()[:16]


def _read(path: Path) -> tuple[dict[str, dict[str, Outcome]], bool]:
    """Return what a file holds, and whether its last line is whole."""
    known = dict[str, dict[str, Outcome]]()
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            document = json.loads(line)
            outcomes = {name: Outcome(**outcome) for name, outcome in document["outcomes"].items()}
            key = str(document["item"])
        except (ValueError, TypeError, KeyError):  # cut off
            continue
        known.setdefault(key, {}).update(outcomes)
    return known, not text or text.endswith("\n")
