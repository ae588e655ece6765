"""What a model makes of items of a task: answers, and scores of given texts; here, or in the process of a worker.

A bundle answers an item under many schedules at once, and shares what they have in common (`forks.py`). The
floating-point model answers many items side by side.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pmpd.eval.measure.environment import instruction_sets, package_versions
from pmpd.eval.measure.forks import Forks
from pmpd.eval.measure.models import Answer, Forced, Scheduled
from pmpd.eval.measure.reference import Reference, ReferenceCheckpoint
from pmpd.eval.metrics.base import Sample, Turn
from pmpd.eval.tasks.base import Item, Task
from pmpd.runtime import Bundle, Generator, Schedule, StaticSchedule, Tokenizer
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bundle import sha256_of
from pmpd.runtime.schedule.learned import LearnedSchedule

__all__ = [
    "FP",
    "Baseline",
    "BundleExaminer",
    "Examiner",
    "Job",
    "Measured",
    "ReferenceExaminer",
    "Setup",
    "item_key",
    "logits_file",
    "open_bundle_examiner",
    "open_reference_examiner",
    "reference_file",
    "turn_of",
]

FP = "fp"
"""The name of the floating-point model's row."""

TOGETHER = 16  # prompts that the floating-point model answers side by side


@dataclass(frozen=True)
class Baseline:
    """What the floating-point model did with an item: its answer's tokens, and the file of its logits, if kept."""

    ids: tuple[int, ...]
    logits: Path | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """Items, the schedules to measure them under (`FP` of the floating-point model), and baselines where known."""

    items: tuple[Item, ...]
    schedules: tuple[Schedule | str, ...]
    baselines: tuple[Baseline | None, ...]


@dataclass(frozen=True)
class Measured:
    """What came of a job: for each item a sample by schedule; the decode steps it took, and the kernels that ran."""

    samples: tuple[Mapping[Schedule | str, Sample], ...]
    steps: int
    kernels: tuple[str, ...] = ()


class Examiner(Protocol):
    """Measures jobs of up to `chunk` items."""

    chunk: int

    def __call__(self, job: Job) -> Measured:
        """Return the samples of a job. Raises PmpdError for an answer that cannot be computed."""
        ...


class BundleExaminer:
    """Measures items under schedules of a bundle.

    Args:
        task: what is done with an item.
        generator: the bundle, loaded; called when the first job is there.
    """

    chunk = 1

    def __init__(self, task: Task, generator: Callable[[], Generator]) -> None:
        self._task, self._generator = task, generator

    def __call__(self, job: Job) -> Measured:
        """Return the samples of an item under its schedules.

        Raises:
            PmpdError: an answer cannot be computed.
        """
        (item,), (baseline,), generator = job.items, job.baselines, self._generator()
        schedules = [schedule for schedule in job.schedules if not isinstance(schedule, str)]
        turns: Mapping[Schedule, tuple[Turn, ...]] = {}
        steps = 0
        if self._task.generates:
            turns, steps = self._answers(generator, item, schedules)
        samples: dict[Schedule | str, Sample] = {}
        for schedule in schedules:
            model = Scheduled(generator, schedule)
            scores, count, forced = self._force(model, item, schedule, baseline) if self._task.forces else ({}, 0, ())
            samples[schedule] = Sample(turns=turns.get(schedule) or forced, scores=scores, scored_steps=count)
        kernels = sorted({node.kernel for node in generator.kernels() if node.kernel})
        return Measured((samples,), steps, tuple(kernels))

    def _force(
        self, model: Scheduled, item: Item, schedule: Schedule, baseline: Baseline | None
    ) -> tuple[dict[str, float], int, tuple[Turn, ...]]:
        prefill = schedule.precision(0) if self._task.decodes_prompt and isinstance(schedule, StaticSchedule) else None
        answer = item.answer or (baseline.ids if baseline else ())
        return _force_scores(self._task, item, answer, model.force(item.ids, answer, prefill=prefill), baseline)

    def _answers(
        self, generator: Generator, item: Item, schedules: Sequence[Schedule]
    ) -> tuple[dict[Schedule, tuple[Turn, ...]], int]:
        """Return the answers under each schedule: static ones share prompts and what their answers begin with.

        What a learned schedule chooses is one of them.
        """
        task = self._task
        turns: dict[Schedule, tuple[Turn, ...]] = dict.fromkeys(schedules, ())
        forks = Forks(generator, max_new_tokens=task.max_new_tokens, stop_ids=task.stop_ids)
        others = 0
        for _ in range(1 + len(item.turns)):
            prompts = defaultdict[tuple[int, ...], list[Schedule]](list)
            for schedule in schedules:
                prompts[task.turn(item, [turn.output for turn in turns[schedule]])].append(schedule)
            for ids, group in prompts.items():
                static = {schedule: _static(generator, schedule, ids) for schedule in group}
                answers = dict(forks.answers(ids, {choice for choice in static.values() if choice is not None}))
                for schedule in group:
                    if (choice := static[schedule]) is not None:
                        answer = answers[choice]
                    else:
                        model = Scheduled(generator, schedule)
                        answer = model.generate(ids, max_new_tokens=task.max_new_tokens, stop_ids=task.stop_ids)
                        others += len(answer.ids) - (len(answer.ids) == task.max_new_tokens)
                    turns[schedule] += (turn_of(task.tokenizer, len(ids), answer),)
        return turns, forks.steps + others


def _static(generator: Generator, schedule: Schedule, prompt: Sequence[int]) -> StaticSchedule | None:
    """Return the static schedule that a schedule is for a prompt; None for one that looks at each step."""
    if not isinstance(schedule, LearnedSchedule):
        return schedule if isinstance(schedule, StaticSchedule) else None
    generator.reset()
    plan = generator.begin(schedule, generator.prefill(prompt, precision=schedule.prefill))
    assert isinstance(plan, StaticSchedule)
    return plan


class ReferenceExaminer:
    """Measures items with the floating-point model.

    Args:
        task: what is done with an item.
        model: the model, loaded; called when the first job is there.
        logits: folder for the logits of a task that compares with them.
    """

    def __init__(self, task: Task, model: Callable[[], Reference], logits: Path | None) -> None:
        self._task, self._model, self._logits = task, model, logits
        self.chunk = TOGETHER if task.generates else 1

    def __call__(self, job: Job) -> Measured:
        """Return the samples of items.

        Raises:
            PmpdError: an answer cannot be computed.
        """
        task, model = self._task, self._model()
        turns: list[tuple[Turn, ...]] = [() for _ in job.items]
        for turn in range(max(1 + len(item.turns) for item in job.items) if task.generates else 0):
            asked = [i for i, item in enumerate(job.items) if len(item.turns) >= turn]
            prompts = [task.turn(job.items[i], [t.output for t in turns[i]]) for i in asked]
            answers = model.answers(prompts, max_new_tokens=task.max_new_tokens, stop_ids=task.stop_ids)
            for i, prompt, answer in zip(asked, prompts, answers, strict=True):
                turns[i] += (turn_of(task.tokenizer, len(prompt), answer),)
        samples: list[dict[Schedule | str, Sample]] = []
        for item, answered in zip(job.items, turns, strict=True):
            scores, count, forced = self._force(item, answered) if task.forces else ({}, 0, ())
            samples.append({FP: Sample(turns=answered or forced, scores=scores, scored_steps=count)})
        return Measured(tuple(samples), 0)

    def _force(self, item: Item, turns: tuple[Turn, ...]) -> tuple[dict[str, float], int, tuple[Turn, ...]]:
        answer = item.answer or turns[0].ids
        parts = list(self._model().force(item.ids, answer)) if answer else []
        if self._task.compares and self._logits is not None:
            _write_logits(logits_file(self._logits, item), [part.logits for part in parts])
        return _force_scores(self._task, item, answer, parts, None)


def _force_scores(
    task: Task, item: Item, answer: Sequence[int], parts: Iterable[Forced], baseline: Baseline | None
) -> tuple[dict[str, float], int, tuple[Turn, ...]]:
    """Return the mean scores over the scored positions, how many these are, and the given text as a turn."""
    if not answer:
        return {}, 0, ()
    reference = np.load(baseline.logits, mmap_mode="r") if baseline and baseline.logits else None
    scores: dict[str, list[float]] = defaultdict(list)
    precisions: list[float] = []
    first_passes: dict[int, float] = {}
    for part in parts:
        end = part.start + len(part.logits)
        precisions += [part.precision] * len(part.logits)
        if part.first_pass is not None:
            first_passes[part.start] = part.first_pass
        skipped = max(0, item.unscored - part.start)
        start = part.start + skipped
        if start >= end:
            continue
        theirs = None if reference is None else reference[start:end].astype(np.float32)
        for name, values in task.force_scores(answer[start:end], part.logits[skipped:], theirs).items():
            scores[name] += values
    count = max(0, len(answer) - item.unscored)
    segments = tuple((bits, len(list(run)), "") for bits, run in groupby(precisions))
    turn = Turn(prompt_tokens=len(item.ids), segments=segments, first_passes=first_passes)
    return {name: float(np.mean(values)) for name, values in scores.items()}, count, (turn,)


def turn_of(tokenizer: Tokenizer, prompt_tokens: int, answer: Answer) -> Turn:
    """Return an answer with its text, cut where the precision changes."""
    text, done = tokenizer.decode(answer.ids), 0
    segments: list[tuple[float, int, str]] = []
    end = 0
    for bits, run in groupby(answer.precisions):
        count = len(list(run))
        end += count
        before = text if end == len(answer.ids) else tokenizer.decode(answer.ids[:end])
        # Of a character whose bytes the switch divides, all is the next segment's.
        until = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, before, strict=False)))
        segments.append((bits, count, text[done:until]))
        done = max(done, until)
    return Turn(
        prompt_tokens=prompt_tokens, segments=tuple(segments), first_passes=answer.first_passes, ids=tuple(answer.ids)
    )


def logits_file(folder: Path, item: Item) -> Path:
    """Return where the logits of an item are kept."""
    return folder / f"{item_key(item)}.npy"


def _write_logits(path: Path, parts: Sequence[npt.NDArray[np.float32]]) -> None:
    """Keep logits in half the bytes: less the largest of each position, so the likely tokens are the exact ones."""
    logits = np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
    if logits.size:
        logits = logits - logits.max(-1, keepdims=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, np.maximum(logits, np.finfo(np.float16).min).astype(np.float16), allow_pickle=False)
    part.replace(path)


def item_key(item: Item) -> str:
    """Return what an item is known by: its tokens, wherever it came from."""
    asked = [item.ids, item.turns, item.answer, item.unscored]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


_NOT_THE_MODEL = ("README.md", "schedules/")
"""Files of a bundle that do not change how it answers under a schedule that is given."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a bundle computes.

    Attributes:
        kernels, accuracy, require_fast_kernels: as in `Settings`.
    """

    kernels: Path | None = None
    accuracy: str | None = None
    require_fast_kernels: bool = False

    def file(self, bundle: Bundle, task: Task, reference: str = "") -> Path:
        """Return the file for samples of a bundle and a task, with these packages on this kind of processor.

        Args:
            bundle: the model.
            task: what is asked, and how long answers are.
            reference: the digest of the floating-point model whose answers are scored, for a task that does so.
        """
        manifest = bundle.manifest
        return _cache_file(
            {
                "files": {n: entry.sha256 for n, entry in manifest.files.items() if not n.startswith(_NOT_THE_MODEL)},
                "prefill": manifest.prefill_precision,
                "kernels": self.kernels and sha256_of(self.kernels),
                "accuracy": self.accuracy or manifest.accuracy,
                "processor": instruction_sets(),
                "packages": package_versions("pmpd", "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers"),
                "reference": reference if task.compares else "",
                **_what_is_asked(task),
            }
        )

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


def reference_file(checkpoint: ReferenceCheckpoint, backend: str, task: Task) -> Path:
    """Return the file for samples of the floating-point model; its logits are in the folder of the same name."""
    packages = package_versions("pmpd", "numpy", "torch", "transformers", "optimum-onnx", "tokenizers")
    return _cache_file({"model": checkpoint.digest, "backend": backend, "packages": packages, **_what_is_asked(task)})


def _what_is_asked(task: Task) -> dict[str, object]:
    """Return what of a task samples depend on, beside the items: no metrics of texts, which are computed anew."""
    kind = next(kind for kind in type(task).__mro__ if "force_scores" in kind.__dict__).__name__
    return {
        "scores": kind if task.forces else "",
        "answers": task.max_new_tokens if task.generates else 0,
        "stop": task.stop_ids,
        "decodes_prompt": task.decodes_prompt,
        "chat": task.chat,
    }


def _cache_file(what: Mapping[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "pmpd" / "samples" / f"{digest[:16]}.jsonl"


def open_bundle_examiner(
    threads: int, *, path: Path, setup: Setup, make_task: Callable[[Bundle], Task], context_length: int, file: str
) -> BundleExaminer:
    """Return what measures a bundle in a worker.

    Args:
        threads: to compute with.
        path: the bundle.
        setup: how it computes.
        make_task: makes the task of the bundle.
        context_length: of the KV cache.
        file: the name of `setup.file` where the samples go, of a task that compares with no reference.

    Raises:
        PmpdError: here it would be another file: another bundle, other packages, or another kind of processor.
    """
    bundle = Bundle.open(path)
    task = make_task(bundle)
    if setup.file(bundle, task).name != file:
        raise PmpdError(
            f"{path} on {platform.node()} would give other answers: it is another bundle, packages there have other "
            "versions, or the processor has other instructions: make them the same, or leave that node out"
        )
    generator = setup.load(bundle, context_length=context_length, threads=threads)
    return BundleExaminer(task, lambda: generator)


def open_reference_examiner(
    threads: int,
    *,
    path: Path,
    checkpoint: ReferenceCheckpoint,
    backend: str,
    make_task: Callable[[Bundle], Task],
    logits: Path | None,
) -> ReferenceExaminer:
    """Return what measures the floating-point model in a worker; arguments as of `ReferenceExaminer` and above."""
    task = make_task(Bundle.open(path))
    model = checkpoint.load(backend, threads=threads)
    return ReferenceExaminer(task, lambda: model, logits)
