"""A schedule for any task, learned from prompts (PMPD paper, Section 4.3 and Appendix A.1).

Each prompt is answered under every schedule of the grid. Its label is the lowest one whose answer is as near to the
floating-point model's as that of the high precision is. A network learns to tell the label from what the prompt left in
the KV cache. Prompts that it has never seen say what that is worth, beside choices made at random.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.eval.data.records import Template, read_records
from pmpd.eval.measure.examiner import (
    FP,
    BundleExaminer,
    Job,
    Measured,
    ReferenceExaminer,
    Setup,
    item_key,
    open_bundle_examiner,
    reference_file,
)
from pmpd.eval.measure.reference import ReferenceCheckpoint
from pmpd.eval.measure.samples import Samples
from pmpd.eval.measure.workers import Workers, check_workers
from pmpd.eval.metrics.base import Sample
from pmpd.eval.metrics.texts import TextScorer
from pmpd.eval.solve.grid import mean_cost, static_schedules, switch_points
from pmpd.eval.solve.lesson import Lesson
from pmpd.eval.solve.network import Network, Prompt, Training, to_onnx, train
from pmpd.eval.solve.prompts import cut, write_prompts
from pmpd.eval.tasks.answers import Answers
from pmpd.eval.tasks.base import Item
from pmpd.eval.tasks.registry import TASKS
from pmpd.runtime import Bundle, Generator, StaticSchedule, Tokenizer
from pmpd.runtime.console.progress import progress, track
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.schedule.learned import LearnedSchedule, SchedulerCard, weights_digest

__all__ = ["HIGHEST", "LAYERS", "LearnSettings", "learn"]

log = logging.getLogger(__name__)

HIGHEST = "highest"
"""In place of a reference model: the answers of the bundle's highest precision."""

LAYERS = {"first": 0.0, "middle": 0.5, "last": 1.0}
"""Which layer's keys and values the network reads, as a share of the way through the model (Figure 7)."""

FEWEST = 16  # prompts
FOLDS = 5  # of the prompts, each chosen for by a network that has seen the others only
TIMED_TOKENS = 128
COMPLETION = 64  # new tokens


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """What to learn from.

    Attributes:
        task: a name of `TASKS`; None for completions of texts.
        data: its examples, or the texts; None for what the model writes itself.
        samples: how many.
        max_new_tokens: tokens per answer; default the task's, 64 of a completion.
        prompt_template, reference_field, chat: as in `Settings`.
        precisions: of the schedules to choose from; default the bundle's highest and lowest.
        points: candidate switch points N, the start and the end of an answer included.
        reference: the floating-point model, as in `Settings`, or `HIGHEST`. Where the data have references, they count.
        tolerance: how much ROUGE-L a label may lose, of 1.
        layer: one of `LAYERS`.
        confidence: how likely a choice must be good enough to be taken.
        hidden: width of the hidden layer.
        seeds: how many networks are trained; the best on validation prompts stays.
        threads: threads to compute with; default all processors this process may use.
        workers, address: what answers under the schedules, as in `SearchSettings`.

    Raises:
        PmpdError: a value out of range, or an unknown choice.
    """

    task: str | None = None
    data: Path | None = None
    samples: int = 256
    max_new_tokens: int | None = None
    prompt_template: str | None = None
    reference_field: str | None = None
    chat: bool | None = None
    precisions: tuple[float, ...] = ()
    points: int = 4
    reference: str | None = None
    tolerance: float = 0.0
    layer: str = "last"
    confidence: float = 0.5
    hidden: int = 64
    seeds: int = 5
    threads: int | None = None
    workers: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        check_workers(self.workers, self.address)
        if self.layer not in LAYERS:
            raise PmpdError(unknown_choice("layer", self.layer, LAYERS))
        if self.samples < FEWEST:
            raise PmpdError(f"a schedule is learned from {FEWEST} prompts or more, got {self.samples}")
        for name in ("max_new_tokens", "hidden", "seeds", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise PmpdError(f"{name.replace('_', ' ')} must be 1 or more, got {value}")
        if not 0 < self.confidence < 1:
            raise PmpdError(f"confidence must be between 0 and 1, got {self.confidence}")
        if not 0 <= self.tolerance < 1:
            raise PmpdError(f"tolerance must be a share of ROUGE-L from 0 to below 1, got {self.tolerance}")
        switch_points(1, self.points)
        if self.task is not None and self.data is None:
            raise PmpdError(f"the task {self.task} needs --data: its examples")
        if self.task is not None and (self.task not in TASKS or not issubclass(TASKS[self.task], Answers)):
            answering = [name for name, kind in TASKS.items() if issubclass(kind, Answers)]
            raise PmpdError(unknown_choice("task", self.task, answering))


def learn(bundle: Bundle, settings: LearnSettings) -> tuple[Lesson, bytes]:
    """Train the network of a learned schedule. The bundle is not changed.

    Answers are kept in the user's cache, so what was interrupted goes on where it was.

    Returns: what was learned, and the ONNX file.

    Raises:
        PmpdError: an option or record that does not fit, too few usable prompts, or no floating-point model.
        MissingExtraError: a package is missing.
    """
    manifest = bundle.manifest
    precisions = _precisions(manifest.precisions, settings)
    task = _task(bundle, settings)
    by_references = task.reference_field or task.default_reference
    checkpoint = None
    if settings.reference != HIGHEST and not by_references:
        checkpoint = ReferenceCheckpoint.find(bundle, settings.reference)
    generator = Generator(bundle, threads=settings.threads)
    items = _items(task, generator, settings)
    if checkpoint is not None:
        items = _answered(task, items, checkpoint, settings)
    steps = max(1, task.max_new_tokens - 1)
    choices = _choices(precisions, steps, settings.points)
    table = _samples(task, items, choices, generator, settings)
    if not any(sample.passes for row in table for sample in row):
        raise PmpdError("all answers have one token, so there is no decode step to lower: use other prompts")
    layer = round(LAYERS[settings.layer] * (manifest.kv_cache.layers - 1))
    labels = [_label(row, settings.tolerance) for row in table]
    prompts = _prompts(generator, items, labels, layer)
    network, course, chosen = _fit(prompts, len(choices), settings)
    card = SchedulerCard(
        choices=tuple(",".join(f"{precision}@{start}" for precision, start in c.switches) for c in choices),
        length=steps,
        layer=layer,
        prefill=manifest.prefill_precision,
        confidence=settings.confidence,
        weights=weights_digest(manifest),
    )
    data = to_onnx(network, card, heads=manifest.kv_cache.heads, dtype=manifest.kv_cache.dtype)
    schedule = LearnedSchedule(data, manifest, file="network")
    milliseconds, share = _cost(generator, schedule, [token for item in items for token in item.ids])
    lesson = Lesson(
        choices=choices,
        length=steps,
        labels=tuple(labels),
        samples=tuple(map(tuple, table)),
        chosen=chosen,
        course=course,
        settings=_public(settings),
        reference="references" if by_references else HIGHEST if checkpoint is None else checkpoint.path.name,
        milliseconds=milliseconds,
        share_of_prefill=share,
    )
    return lesson, data


def _precisions(known: Sequence[float], settings: LearnSettings) -> list[float]:
    """Return the precisions of the choices, high to low."""
    if len(known) < 2:
        raise PmpdError("the bundle has one precision, so there is nothing to choose: export two or more")
    for precision in settings.precisions:
        if precision not in known:
            raise PmpdError(unknown_choice("precision", precision, known))
    precisions = sorted(set(settings.precisions or (known[0], known[-1])), reverse=True)
    if len(precisions) < 2:
        raise PmpdError(f"a schedule is learned over two precisions or more, got {precisions[0]}")
    return precisions


def _task(bundle: Bundle, settings: LearnSettings) -> Answers:
    tokenizer = Tokenizer.from_bundle(bundle)
    kind = TASKS[settings.task or "jsonl"]
    assert issubclass(kind, Answers)
    chats = tokenizer.has_chat_template and (kind.chats or settings.data is None)
    template = settings.prompt_template or (None if settings.task else "{text}")
    return kind(
        tokenizer=tokenizer,
        stop_ids=bundle.stop_ids,
        max_new_tokens=settings.max_new_tokens or (kind.default_new_tokens if settings.task else COMPLETION),
        context_length=bundle.manifest.context_length,
        template=None if template is None else Template(template),
        reference_field=settings.reference_field,
        chat=chats if settings.chat is None else settings.chat,
        scorer=TextScorer(["rougeL"]),
    )


def _items(task: Answers, generator: Generator, settings: LearnSettings) -> list[Item]:
    """Return the prompts that fit the context."""
    data, count = settings.data, settings.samples
    if data is None:
        data = Setup().file(generator.bundle, task).with_suffix(".prompts.jsonl")
        written = write_prompts(generator, task.tokenizer, count=count, chat=task.chat, file=data)
        for _ in track(written, step="prompts", total=count, unit="prompt"):
            pass
    every = list(islice(task.items(read_records(data)), count))
    if settings.task is None and not task.chat:
        every = [part for item in every if (part := cut(item, task.tokenizer)) is not None]
    longest = generator.cache.capacity - task.max_new_tokens
    items = list({item_key(item): item for item in every if len(item.ids) <= longest}.values())
    if len(items) < len(every):
        log.warning("%d of %d prompts left out: too long, or there twice", len(every) - len(items), len(every))
    if len(items) < FEWEST:
        raise PmpdError(
            f"{len(items)} prompts are usable and {FEWEST} are needed: give more or longer ones with --data, or raise "
            "--samples"
        )
    return items


def _answered(
    task: Answers, items: Sequence[Item], checkpoint: ReferenceCheckpoint, settings: LearnSettings
) -> list[Item]:
    """Return the items with the floating-point model's answers as references; they are kept on disk as they come."""
    load = cache(partial(checkpoint.load, "transformers", threads=settings.threads or available_threads()))
    samples = Samples(
        task,
        ReferenceExaminer(task, load, None),
        items,
        path=reference_file(checkpoint, "transformers", task),
        reference=FP,
    )
    of_each = track(samples.of_each(range(len(items)), [FP]), step="reference", total=len(items), unit="prompt")
    answers = {index: by_name[FP].output for index, by_name in of_each}
    return [replace(item, references=(answers[index],)) for index, item in enumerate(items)]


def _choices(precisions: Sequence[float], steps: int, points: int) -> tuple[StaticSchedule, ...]:
    """Return the schedules of the grid, low to high in bits."""
    bits = {precision: float(precision) for precision in precisions}
    schedules = static_schedules(precisions, switch_points(steps, points))
    return tuple(sorted(schedules, key=lambda schedule: mean_cost(schedule, bits, steps)))


def _samples(
    task: Answers,
    items: Sequence[Item],
    choices: Sequence[StaticSchedule],
    generator: Generator,
    settings: LearnSettings,
) -> list[list[Sample]]:
    """Return what each prompt gave under each choice."""
    bundle, setup = generator.bundle, Setup()
    path = setup.file(bundle, task)
    table: list[list[Sample]] = [[] for _ in items]
    with ExitStack() as stack, progress("answers", total=len(items), unit="prompt") as shown:
        workers: Workers[Job, Measured] | None = None
        if settings.workers > 1 or settings.address is not None:
            opening = partial(
                open_bundle_examiner,
                path=bundle.path.absolute(),
                setup=setup,
                make_task=partial(_task, settings=settings),
                context_length=generator.cache.capacity,
                file=path.name,
            )
            workers = stack.enter_context(
                Workers(settings.workers, opening, address=settings.address, threads=settings.threads)
            )
        examiner = BundleExaminer(task, lambda: generator)
        highest = StaticSchedule(((bundle.manifest.precisions[0], 0),))
        samples = Samples(task, examiner, items, path=path, workers=workers, reference=highest)
        for index, by_choice in samples.of_each(range(len(items)), choices):
            table[index] = [by_choice[choice] for choice in choices]
            shown.advance()
    return table


def _label(row: Sequence[Sample], tolerance: float) -> int:
    """Return the lowest choice that is as good as the highest, of ROUGE-L rounded to three decimals (of 1)."""
    scores = [round(sample.scores["rougeL"] / 100, 3) for sample in row]
    return next(i for i, score in enumerate(scores) if score >= scores[-1] - tolerance)


def _prompts(generator: Generator, items: Sequence[Item], labels: Sequence[int], layer: int) -> list[Prompt]:
    """Return what each prompt left in a layer of the cache."""
    prompts = []
    for item, label in track(zip(items, labels, strict=True), step="read prompts", total=len(items), unit="prompt"):
        generator.reset()
        generator.prefill(item.ids)
        view = generator.cache.view()
        prompts.append(Prompt(view.keys(layer).copy(), view.values(layer).copy(), label))
    return prompts


def _fit(prompts: Sequence[Prompt], choices: int, settings: LearnSettings) -> tuple[Network, Training, tuple[int, ...]]:
    """Return a network, its training, and for each prompt the choice of a network that has not seen it."""
    fit = partial(train, choices=choices, hidden=settings.hidden, seeds=range(settings.seeds))
    order = np.random.default_rng(0).permutation(len(prompts))
    chosen = [0] * len(prompts)
    with progress("train", total=FOLDS + 1, unit="network") as shown:
        for held_out in np.array_split(order, FOLDS):
            network, _ = fit(*_parts(prompts, order[~np.isin(order, held_out)]))
            for i in held_out:
                chosen[i] = network.choose(prompts[i], settings.confidence)
            shown.advance()
        network, course = fit(*_parts(prompts, order))
        shown.advance()
    return network, course, tuple(chosen)


def _public(settings: LearnSettings) -> dict[str, Any]:
    """Return the settings as a bundle may say them: files by name alone, and nothing of the machine."""
    every = asdict(settings)
    names = {name: every[name] and Path(every[name]).name for name in ("data", "reference")}
    return {name: value for name, value in every.items() if name not in ("threads", "workers", "address")} | names


def _parts(prompts: Sequence[Prompt], chosen: npt.NDArray[np.intp]) -> tuple[list[Prompt], list[Prompt]]:
    """Divide some of the prompts into those to train on, and a sixth to stop by."""
    count = max(1, len(chosen) // 6)
    return [prompts[i] for i in chosen[count:]], [prompts[i] for i in chosen[:count]]


def _cost(generator: Generator, schedule: LearnedSchedule, tokens: Sequence[int]) -> tuple[float, float]:
    """Return the milliseconds of a choice after a prompt of `TIMED_TOKENS`, and what share of its prefill they are."""
    prefills, choices = [], []
    prompt = tokens[: min(TIMED_TOKENS, generator.cache.capacity)]
    for _ in range(5):
        generator.reset()
        begin = time.perf_counter()
        generator.prefill(prompt)
        prefills.append(time.perf_counter() - begin)
        view = generator.cache.view()
        for _ in range(5):
            begin = time.perf_counter()
            schedule.choose(view.keys(schedule.card.layer), view.values(schedule.card.layer))
            choices.append(time.perf_counter() - begin)
    return 1000 * median(choices), median(choices) / median(prefills)
