"""The tasks: what each asks of a model, and how the answers are scored. One class per kind, one registry."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pmpd.eval.data.records import Record, Template
from pmpd.eval.measure.metrics import (
    ROUGE,
    kl_divergence,
    negative_log_likelihood,
    rouge,
    top1_agreement,
    weighted_mean,
)
from pmpd.eval.measure.models import Generation, Model
from pmpd.eval.report.results import Metric, Sample
from pmpd.runtime import Tokenizer
from pmpd.runtime.errors import PmpdError

__all__ = [
    "TASKS",
    "Baseline",
    "CnnDailyMail",
    "DialogSum",
    "Fidelity",
    "Item",
    "MtBench",
    "Perplexity",
    "Rouge",
    "Task",
]

# Zero-shot prompts in this project's own words: the paper gives none (Section 5 "Models and Datasets"). The second of a
# pair is the user's message to a model with a chat template.
PROMPTS = {
    "dialogsum": (
        "Dialogue:\n{dialogue}\n\nSummarize the dialogue in one or two sentences.\n\nSummary:",
        "Summarize this dialogue in one or two sentences.\n\n{dialogue}",
    ),
    "cnn_dailymail": (
        "Article:\n{article}\n\nSummarize the article in three or four sentences.\n\nSummary:",
        "Summarize this article in three or four sentences.\n\n{article}",
    ),
    "mt_bench": ("Question:\n{turns[0]}\n\nAnswer:\n", "{turns[0]}"),
}
COMPLETION_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to measure: a prompt, and what to compare the answer with.

    Attributes:
        source: where it comes from (``file:line``, and the first token of a window).
        prompt: its text; `ids` its tokens.
        references: texts to compare with; none means the floating-point model's own answer.
        answer: tokens to score after the prompt, instead of generating.
    """

    source: str
    prompt: str
    ids: tuple[int, ...]
    references: tuple[str, ...] = ()
    answer: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What the floating-point model did with an item; `logits` ``[n - 1, V]`` as in `Forced`, if a task keeps them."""

    ids: tuple[int, ...] = ()
    text: str = ""
    logits: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task, set up for one model.

    Attributes:
        tokenizer: the bundle's.
        stop_ids: tokens that end an answer.
        max_new_tokens: tokens per answer (the paper's OL).
        context_length: positions that the model has.
        template: the prompt; default the task's own.
        reference_field: the record's field with the reference text or texts; default the task's own.
        chat: whether prompts go through the model's chat template.

    Raises:
        PmpdError: an option that the task lacks or cannot use.
    """

    metrics: ClassVar[tuple[Metric, ...]]
    default_new_tokens: ClassVar[int]
    takes: ClassVar[frozenset[str]] = frozenset()  # which of the options `reference_field` and `chat` it has
    chats: ClassVar[bool] = False  # whether it uses the chat template of a model that has one

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    context_length: int
    template: Template | None = None
    reference_field: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        for option in ("reference_field", "chat"):
            if getattr(self, option) and option not in self.takes:
                raise PmpdError(f"--{option.replace('_', '-')} does not apply to this task: leave it out")

    @abstractmethod
    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make the items of a data file. Raises PmpdError for a record that does not fit."""

    def positions(self, item: Item) -> int:
        """Return how many positions of the model's context an item takes."""
        return len(item.ids) + (len(item.answer) or self.max_new_tokens)

    @abstractmethod
    def measure(self, model: Model, item: Item, baseline: Baseline | None) -> tuple[Sample, Baseline]:
        """Run one item; without a baseline the model is the floating-point one, and its own baseline."""

    def summarize(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Return each metric over all samples, and its standard error as ``<metric>_stderr``."""
        summary: dict[str, float] = {}
        for metric in self.metrics:
            scored = [(sample.scores[metric.name], sample) for sample in samples if metric.name in sample.scores]
            weights = [float(sample.scored_steps) if metric.per_step else 1.0 for _, sample in scored]
            estimate = weighted_mean([score for score, _ in scored], weights)
            summary |= {metric.name: estimate.mean, f"{metric.name}_stderr": estimate.stderr}
        return summary

    def _prompt(self, record: Record, text: str) -> Item:
        if self.chat:
            ids = self.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        else:
            ids = self.tokenizer.encode(text)
        if not ids:
            raise PmpdError(f"{record.source}: the prompt is empty: remove the record or change --prompt-template")
        return Item(source=record.source, prompt=text, ids=tuple(ids))

    def _sample(
        self, item: Item, generation: Generation, references: tuple[str, ...], scores: dict[str, float], steps: int = 0
    ) -> Sample:
        return Sample(
            source=item.source,
            prompt=item.prompt,
            output=self.tokenizer.decode(generation.ids),
            reference=references,
            prompt_tokens=len(item.ids),
            output_tokens=len(generation.ids),
            precisions=generation.precisions,
            segments=tuple(self._segments(generation)),
            seconds=generation.seconds,
            prefill_seconds=generation.prefill_seconds,
            scores=scores,
            scored_steps=steps,
        )

    def _segments(self, generation: Generation) -> Iterator[tuple[int, str]]:
        """Split the answer's text where the precision changes."""
        bits = generation.precisions
        done = ""
        for end in range(1, len(bits) + 1):
            if end == len(bits) or bits[end] != bits[end - 1]:
                text = self.tokenizer.decode(generation.ids[:end])
                if end < len(bits):
                    text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character whose bytes the switch divides
                yield bits[end - 1], text[len(done) :]
                done = text


class Perplexity(Task):
    """How well the model predicts a text, decoding as the schedule says (teacher forcing).

    A text is cut into windows of twice `max_new_tokens` (less at its end, or where the model's context is shorter). The
    first half of a window is prefilled as context; the other half is the answer, whose tokens after the first are
    scored, each by the decode step that the schedule gives to it. Perplexity is exp of the mean over all scored tokens.
    """

    metrics = (Metric("perplexity", "perplexity", higher_is_better=False, per_step=True),)
    default_new_tokens = 256

    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make windows of the text of each record (field ``text``, or the template)."""
        size = min(2 * self.max_new_tokens, self.context_length)
        for record in records:
            text = self.template.render(record) if self.template else record.text("text")
            ids = self.tokenizer.encode(text)
            for start in range(0, len(ids), size):
                window = ids[start : start + size]
                half = len(window) // 2
                if half > 0 and len(window) - half >= 2:
                    context, answer = window[:half], window[half:]
                    yield Item(source=f"{record.source}+{start}", prompt="", ids=tuple(context), answer=tuple(answer))

    def measure(self, model: Model, item: Item, baseline: Baseline | None) -> tuple[Sample, Baseline]:
        """Score a window."""
        forced = model.force(item.ids, item.answer)
        nll = negative_log_likelihood(forced.logits, item.answer[1:])
        sample = Sample(
            source=item.source,
            prompt_tokens=len(item.ids),
            output_tokens=len(item.answer),
            precisions=forced.precisions,
            prefill_seconds=forced.prefill_seconds,
            scores={"nll": float(nll.mean())},
            scored_steps=len(nll),
        )
        return sample, baseline or Baseline()

    def summarize(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Return the perplexity over all scored tokens; its standard error is that of the exponent, times it."""
        nll = weighted_mean([s.scores["nll"] for s in samples], [float(s.scored_steps) for s in samples])
        perplexity = math.exp(nll.mean)
        return {"perplexity": perplexity, "perplexity_stderr": perplexity * nll.stderr, "nll": nll.mean}


class Fidelity(Task):
    """How closely the bundle follows the floating-point model, on its own greedy answers.

    Teacher forcing of the floating-point model's answer gives KL divergence and top-1 agreement at each decode step;
    the bundle's own greedy answer gives ROUGE-L. Prompts are the field ``prompt``, else the first 32 tokens of ``text``
    (a completion task as in Appendix A.1.2), else a template.
    """

    metrics = (
        Metric("kl_divergence", "KL divergence (nats)", higher_is_better=False, per_step=True, digits=4),
        Metric("top1_agreement", "top-1 agreement (%)", per_step=True),
        Metric("rougeL", "ROUGE-L to fp"),
    )
    default_new_tokens = 64
    takes = frozenset({"chat"})

    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make prompts of records."""
        for record in records:
            if self.template:
                yield self._prompt(record, self.template.render(record))
            elif "prompt" in record.fields or "text" not in record.fields:
                yield self._prompt(record, record.text("prompt"))
            else:
                start = self.tokenizer.encode(record.text("text"), special_tokens=False)[:COMPLETION_TOKENS]
                yield self._prompt(record, self.tokenizer.decode(start))

    def measure(self, model: Model, item: Item, baseline: Baseline | None) -> tuple[Sample, Baseline]:
        """Generate, and force the floating-point model's answer; an answer of one token has no decode step to force."""
        answer = model.generate(item.ids, max_new_tokens=self.max_new_tokens, stop_ids=self.stop_ids)
        baseline_ids = baseline.ids if baseline else answer.ids
        logits = model.force(item.ids, baseline_ids).logits if len(baseline_ids) > 1 else None
        baseline = baseline or Baseline(ids=answer.ids, text=self.tokenizer.decode(answer.ids), logits=logits)
        scores = {"rougeL": rouge(self.tokenizer.decode(answer.ids), [baseline.text])["rougeL"]}
        if logits is not None and baseline.logits is not None:
            scores["kl_divergence"] = float(kl_divergence(baseline.logits, logits).mean())
            scores["top1_agreement"] = 100 * float(top1_agreement(baseline.logits, logits).mean())
        steps = 0 if logits is None else len(logits)
        return self._sample(item, answer, (baseline.text,), scores, steps), baseline


class Rouge(Task):
    """ROUGE of greedy answers against reference texts, or against the floating-point model's answers where none exist.

    Without a template and a reference field of its own this is the task ``jsonl``: any records, any prompt.
    """

    metrics = tuple(Metric(name, f"ROUGE-{name[5:]}") for name in reversed(ROUGE))
    default_new_tokens = 256
    prompts: ClassVar[tuple[str, str] | None] = None
    default_reference: ClassVar[str | None] = None
    takes = frozenset({"reference_field", "chat"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is None and self.prompts is None:
            raise PmpdError("this task has no prompt of its own: give --prompt-template, with {field} for its fields")

    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make prompts and references of records."""
        plain, chat = self.prompts or ("", "")
        template = self.template or Template(chat if self.chat else plain)
        for record in records:
            yield replace(self._prompt(record, template.render(record)), references=self._references(record))

    def _references(self, record: Record) -> tuple[str, ...]:
        """Return the texts of the reference field: one, a list of them, or those of ``field1``, ``field2``, …"""
        field = self.reference_field or self.default_reference
        if field is None:
            return ()
        numbered = list(takewhile(record.fields.__contains__, (f"{field}{i}" for i in count(1))))
        if field not in record.fields and numbered:
            return tuple(record.text(name) for name in numbered)
        value = record.value(field)
        names = [f"{field}[{i}]" for i in range(len(value))] if isinstance(value, list) and value else [field]
        return tuple(record.text(name) for name in names)

    def measure(self, model: Model, item: Item, baseline: Baseline | None) -> tuple[Sample, Baseline]:
        """Generate and compare."""
        answer = model.generate(item.ids, max_new_tokens=self.max_new_tokens, stop_ids=self.stop_ids)
        text = self.tokenizer.decode(answer.ids)
        baseline = baseline or Baseline(ids=answer.ids, text=text)
        references = item.references or (baseline.text,)
        return self._sample(item, answer, references, rouge(text, references)), baseline


class DialogSum(Rouge):
    """Dialogue summarization (Chen et al., 2021); the test split has three references, ``summary1`` to ``summary3``."""

    prompts = PROMPTS["dialogsum"]
    default_reference = "summary"
    default_new_tokens = 33  # the paper's output length for this task
    chats = True


class CnnDailyMail(Rouge):
    """News summarization (Hermann et al., 2015), against ``highlights``."""

    prompts = PROMPTS["cnn_dailymail"]
    default_reference = "highlights"
    chats = True


class MtBench(Rouge):
    """Open questions, first turn only, against the floating-point model's answer (Table 2 of the paper)."""

    prompts = PROMPTS["mt_bench"]
    chats = True


TASKS: dict[str, type[Task]] = {
    "perplexity": Perplexity,
    "fidelity": Fidelity,
    "dialogsum": DialogSum,
    "cnn_dailymail": CnnDailyMail,
    "mt_bench": MtBench,
    "jsonl": Rouge,
}
