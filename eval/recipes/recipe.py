"""The paper's experiments on any bundle: which rows a table or figure has, and what is measured for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pmpd.eval.metrics.base import Sample
from pmpd.eval.metrics.texts import BERTSCORE
from pmpd.eval.recipes.halves import HalvesExaminer, rows_of_halves
from pmpd.eval.recipes.paper import BASE_H, BASE_L, DNS, HIGH_LOW, LEARNED, LOW_HIGH, LOW_LOW, STATIC
from pmpd.eval.recipes.rows import choice_shares, dense_sparse_row, random_row
from pmpd.eval.recipes.tables import Part, RecipeResults
from pmpd.eval.report.results import QualityResults, QualityRow
from pmpd.eval.runner import Evaluation
from pmpd.eval.settings import Settings
from pmpd.eval.solve.race import Tolerance
from pmpd.eval.solve.search import SearchSettings, solve
from pmpd.eval.tasks.registry import TASKS
from pmpd.runtime import Bundle, Generator
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.schedule.learned import LearnedSchedule
from pmpd.runtime.schedule.registry import schedule_of

__all__ = ["RECIPES", "Recipe", "RecipeSettings", "run_recipe"]

RANDOM = ("random uniform", "random prior", "random shuffled")
SUMMARIES_AND_TRANSLATION = ("cnn_dailymail", "dialogsum", "iwslt")
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "cnn_dailymail": ("rougeL",),
    "dialogsum": ("rougeL",),
    "iwslt": ("bleu", "sacrebleu"),
    "mt_bench": ("rougeL",),
}
"""The paper's columns; with an encoder BERTScore is one, too, but for translations."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A table or figure of the paper.

    Attributes:
        title: what it shows.
        tasks: the paper's.
        rows: labels of its rows.
        halves: whether its rows are halves of an answer, and no schedules.
        normalized: whether scores are shown as a share of the high baseline's, the mean over tasks.
    """

    title: str
    tasks: tuple[str, ...]
    rows: tuple[str, ...]
    halves: bool = False
    normalized: bool = False


RECIPES: Mapping[str, Recipe] = {
    "table1": Recipe(
        title="Static and learned schedules beside uniform precisions and dense-and-sparse",
        tasks=SUMMARIES_AND_TRANSLATION,
        rows=(BASE_L, BASE_H, DNS, STATIC, LEARNED),
    ),
    "table2": Recipe(
        title="Open questions: likeness to the floating-point model's answers",
        tasks=("mt_bench",),
        rows=(BASE_L, BASE_H, LEARNED, DNS),
    ),
    "table4": Recipe(
        title="Low bits in the prompt and in the answer",
        tasks=("mt_bench",),
        rows=(LOW_LOW, HIGH_LOW, LOW_HIGH, BASE_H),
    ),
    "table5": Recipe(
        title="Static schedules of larger models", tasks=SUMMARIES_AND_TRANSLATION, rows=(BASE_L, BASE_H, STATIC)
    ),
    "table9": Recipe(
        title="Another quantization method (a bundle of pmpd-export --method gptq)",
        tasks=("dialogsum",),
        rows=(BASE_L, BASE_H, STATIC, LEARNED),
    ),
    "figure3": Recipe(
        title="The high precision in one half of the decode steps",
        tasks=("cnn_dailymail", "dialogsum", "mt_bench"),
        rows=tuple(rows_of_halves(0, 0)),
        halves=True,
    ),
    "figure6": Recipe(
        title="Phase-aware precision allocation",
        tasks=SUMMARIES_AND_TRANSLATION,
        rows=(LOW_LOW, HIGH_LOW, BASE_H),
    ),
    "figure7": Recipe(
        title="Learned schedules by what they read, and choices at random",
        tasks=("cnn_dailymail", "iwslt", "mt_bench"),
        rows=(BASE_H, LEARNED, *RANDOM),
        normalized=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """What to measure.

    Attributes:
        recipe: a name of `RECIPES`.
        data: a file for each task.
        dev: examples on which static schedules are found, by task.
        static: static schedules, by task, instead of those that a search finds.
        learned: names of the bundle's learned schedules, one row each; default ``learned``, if there is one.
        high, low: the two precisions; default the bundle's highest and lowest.
        dev_limit: use only so many examples of `dev`.
        tolerance: how much a static schedule may lose on them.
        dense_sparse: whether tables have the row of dense-and-sparse, which computes in transformers.
        evaluation: what else `Settings` has: limit, encoder, reference, threads, workers, …

    Raises:
        PmpdError: an unknown recipe or task, a task that the recipe does not have, or none.
    """

    recipe: str
    data: Mapping[str, Path]
    dev: Mapping[str, Path]
    static: Mapping[str, str]
    learned: tuple[str, ...] = ()
    high: float | None = None
    low: float | None = None
    dev_limit: int | None = None
    tolerance: str = "1%"
    dense_sparse: bool = True
    evaluation: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise PmpdError(unknown_choice("recipe", self.recipe, RECIPES))
        tasks = RECIPES[self.recipe].tasks
        for option, by_task in (("data", self.data), ("dev", self.dev), ("static", self.static)):
            for task in by_task:
                if task not in tasks:
                    raise PmpdError(f"--{option}: {unknown_choice('task of ' + self.recipe, task, tasks)}")
        if not self.data:
            raise PmpdError(f"{self.recipe} needs data: give --data {tasks[0]}=FILE (its tasks: {', '.join(tasks)})")
        Tolerance.parse(self.tolerance)
        for task, data in self.data.items():
            Settings(task=task, data=data, **self.evaluation)
        for task, data in self.dev.items():
            Settings(task=task, data=data)


def run_recipe(bundle: Bundle, settings: RecipeSettings, *, quiet: bool = True) -> RecipeResults:
    """Measure the rows of a table or figure on each task.

    Samples are kept in the user's cache, so what was interrupted goes on, and recipes share what they measure.

    Raises:
        PmpdError: an option or record that does not fit, or no reference.
        MissingExtraError: a package is missing.
    """
    high, low = _precisions(bundle, settings)
    parts = []
    for task in settings.data:
        part = _Part(bundle, settings, task, high, low, quiet)
        parts.append(part.halves() if RECIPES[settings.recipe].halves else part.measure())
    return RecipeResults(
        recipe=settings.recipe,
        title=RECIPES[settings.recipe].title,
        normalized=RECIPES[settings.recipe].normalized,
        parts=tuple(parts),
    )


def _precisions(bundle: Bundle, settings: RecipeSettings) -> tuple[float, float]:
    """Return the high and the low precision."""
    known = bundle.manifest.precisions
    high, low = settings.high or known[0], settings.low or known[-1]
    for precision in (high, low):
        if precision not in known:
            raise PmpdError(unknown_choice("precision", f"{precision:g}", known))
    if high <= low:
        raise PmpdError(f"the high precision must be above the low one, got {high:g} and {low:g}")
    return high, low


class _Part:
    """One task of a recipe."""

    def __init__(
        self, bundle: Bundle, settings: RecipeSettings, task: str, high: float, low: float, quiet: bool
    ) -> None:
        self.bundle, self.settings, self.task, self.quiet = bundle, settings, task, quiet
        self.high, self.low = high, low
        self.notes: list[str] = []

    def halves(self) -> Part:
        """Return the rows of Figure 3."""
        high = f"uniform:{self.high:g}"
        evaluation = Evaluation.prepare(self.bundle, self._evaluation(schedules=(high,)), quiet=self.quiet)
        evaluation = replace(evaluation, items=[replace(item, turns=()) for item in evaluation.items])
        results = evaluation.results()
        labels = rows_of_halves(self.high, self.low)
        samples = evaluation.custom_samples(
            list(labels.values()),
            f"halves-{self.high:g}-{self.low:g}",
            lambda load: HalvesExaminer(evaluation.task, load, self.high, self.low),
            results.rows[0].samples,
        )
        rows = [QualityRow.of(name, of_row, evaluation.task.metrics) for name, of_row in samples.items()]
        return self._part(labels, replace(results, rows=(results.rows[0], *rows)))

    def _part(self, labels: Mapping[str, str], results: QualityResults) -> Part:
        model = self.bundle.manifest.source.model
        return Part(task=self.task, model=model, labels=labels, results=results, notes=tuple(self.notes))

    def measure(self) -> Part:
        """Return the rows of the task, by label."""
        recipe = RECIPES[self.settings.recipe]
        labels: dict[str, str] = {}
        for label in recipe.rows:
            labels |= self._schedules(label)
        names = list(dict.fromkeys(labels.values()))
        learned = {label: self._learned(name) for label, name in labels.items() if label.startswith(LEARNED)}
        choices = [str(choice) for schedule in learned.values() for choice in schedule.choices]
        evaluation = Evaluation.prepare(
            self.bundle, self._evaluation(schedules=tuple(dict.fromkeys([*names, *choices]))), quiet=self.quiet
        )
        results = evaluation.results()
        by_name = {row.name: row for row in results.rows}
        rows = {label: by_name[name] for label, name in labels.items()}
        if DNS in recipe.rows and self.settings.dense_sparse:
            rows |= self._dense_sparse(evaluation, results, rows)
        if set(RANDOM) & set(recipe.rows):
            for label, schedule in learned.items():
                rows |= self._random(evaluation, label, schedule, by_name)
        ordered = {label: rows[label] for label in _order(rows, recipe.rows)}
        kept = dict.fromkeys([results.rows[0].name, *(row.name for row in ordered.values())])
        every = by_name | {row.name: row for row in rows.values()}
        labels = {label: row.name for label, row in ordered.items()}
        return self._part(labels, replace(results, rows=tuple(every[name] for name in kept)))

    def _evaluation(self, **options: Any) -> Settings:
        metrics = COLUMNS[self.task]
        if self.settings.evaluation.get("encoder") and self.task != "iwslt":
            metrics = (*metrics, BERTSCORE)
        values = {**self.settings.evaluation, "metrics": metrics, **options}
        return Settings(task=self.task, data=self.settings.data[self.task], **values)

    def _schedules(self, label: str) -> dict[str, str]:
        """Return the schedules of a row, by label, as full texts; none where the row is no schedule or cannot be."""
        fixed: Mapping[str, str] = {
            BASE_L: f"prefill:{self.low:g},uniform:{self.low:g}",
            LOW_LOW: f"prefill:{self.low:g},uniform:{self.low:g}",
            HIGH_LOW: f"uniform:{self.low:g}",
            LOW_HIGH: f"prefill:{self.low:g},uniform:{self.high:g}",
            BASE_H: f"uniform:{self.high:g}",
        }
        if label in fixed:
            return {label: str(schedule_of(self.bundle, fixed[label]))}
        if label == STATIC:
            text = self._static()
            return {} if text is None else {label: text}
        if label == LEARNED:
            known = self.bundle.manifest.schedules
            names = self.settings.learned or tuple(name for name in ("learned",) if name in known)
            if not names:
                self.notes.append(f"no {LEARNED}: the bundle has no learned schedule (pmpd-schedule learn).")
            length = self.settings.evaluation.get("max_new_tokens") or TASKS[self.task].default_new_tokens
            texts = {name: str(self._learned(name)).partition("@")[0] for name in names}
            return {
                LEARNED if len(names) == 1 else f"{LEARNED} ({name})": f"{text}@{length}"
                for name, text in texts.items()
            }
        return {}

    def _static(self) -> str | None:
        """Return the static schedule of the task: the one given, or what a search finds."""
        if (text := self.settings.static.get(self.task)) is not None:
            return str(schedule_of(self.bundle, text))
        if self.task not in self.settings.dev:
            self.notes.append(f"no {STATIC}: give --dev {self.task}=FILE to find one on, or --static {self.task}=SPEC.")
            return None
        options = {**self.settings.evaluation, "metrics": (), "encoder": None, "limit": self.settings.dev_limit}
        solution = solve(
            self.bundle,
            SearchSettings(
                evaluation=Settings(task=self.task, data=self.settings.dev[self.task], **options),
                tolerance=Tolerance.parse(self.settings.tolerance),
                workers=self.settings.evaluation.get("workers", 1),
                address=self.settings.evaluation.get("address"),
            ),
        )
        self.notes.append(f"{STATIC} was found on {solution.samples} samples of {solution.data}: {solution.verdict}.")
        return str(solution.best)

    def _learned(self, text: str) -> LearnedSchedule:
        schedule = schedule_of(self.bundle, text)
        if not isinstance(schedule, LearnedSchedule):
            raise PmpdError(f"{text} is not a learned schedule: name one that pmpd-schedule learn wrote")
        return schedule

    def _dense_sparse(
        self, evaluation: Evaluation, results: QualityResults, rows: Mapping[str, QualityRow]
    ) -> dict[str, QualityRow]:
        """Return the row of dense-and-sparse at the bits of the scheduler that does best."""
        metric = results.metrics[0]
        schedulers = [row for label, row in rows.items() if label == STATIC or label.startswith(LEARNED)]
        if not schedulers:
            return {}
        best = max(schedulers, key=lambda row: row.metrics[metric.name].value)
        fp: Sequence[Sample] = results.rows[0].samples
        row = dense_sparse_row(evaluation, best.average_bits or self.low, fp)
        if row is None:
            self.notes.append(f"no {DNS}: at {best.average_bits:.2f} bits there is nothing left for outliers.")
            return {}
        return {DNS: row}

    def _random(
        self, evaluation: Evaluation, label: str, schedule: LearnedSchedule, rows: Mapping[str, QualityRow]
    ) -> dict[str, QualityRow]:
        """Return what choices at random among those of a learned schedule give."""
        choices = [rows[str(choice)] for choice in schedule.choices]
        count = len(choices)
        items = evaluation.items
        generator = Generator(
            self.bundle, threads=evaluation.threads, context_length=max(map(evaluation.task.positions, items))
        )
        shares = {
            RANDOM[0]: [1 / count] * count,
            RANDOM[1]: _label_shares(self.bundle, schedule),
            RANDOM[2]: choice_shares(generator, schedule, items),
        }
        suffix = label.removeprefix(LEARNED)
        metrics = evaluation.task.metrics
        return {
            name + suffix: random_row(name + suffix, choices, share, metrics)
            for name, share in shares.items()
            if share is not None
        }


def _order(rows: Mapping[str, QualityRow], labels: Sequence[str]) -> list[str]:
    """Return the labels of rows in the order of the recipe; those of several learned schedules behind each other."""
    return [label for first in labels for label in rows if label == first or label.startswith(f"{first} (")]


def _label_shares(bundle: Bundle, schedule: LearnedSchedule) -> list[float] | None:
    """Return how often each choice was a label, by the report beside the network; None where there is none."""
    name = next((name for name, text in bundle.manifest.schedules.items() if text in str(schedule)), None)
    report = bundle.manifest.reports.get(name or "")
    if report is None:
        return None
    shares = json.loads((bundle.path / report).read_text(encoding="utf-8")).get("label_shares")
    return list(map(float, shares)) if shares and len(shares) == len(schedule.choices) else None
