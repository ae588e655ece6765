"""Tasks scored by ROUGE: ``dialogsum``, ``cnn_dailymail``, ``mt_bench`` and ``jsonl``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count, takewhile
from typing import ClassVar

from pmpd.eval.data.records import Record, Template
from pmpd.eval.measure.metrics import ROUGE, rouge
from pmpd.eval.measure.models import Answer, ModelUnderTest
from pmpd.eval.measure.scoring import Metric, Sample
from pmpd.eval.tasks.base import Baseline, Item, Task
from pmpd.runtime.errors import PmpdError

__all__ = ["CnnDailyMail", "DialogSum", "MtBench", "Rouge"]

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


class Rouge(Task):
    """ROUGE of greedy answers against reference texts, or against the floating-point model's answers where none exist.

    Without a template and a reference field of its own this is the task ``jsonl``: any records, any prompt.
    """

    metrics = tuple(Metric(name, f"ROUGE-{name[5:]}", highest=100) for name in reversed(ROUGE))
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

    def measure(self, model: ModelUnderTest, item: Item, baseline: Baseline | None) -> tuple[Sample, Baseline]:
        """Generate and compare."""
        return self.score(
            item, model.generate(item.ids, max_new_tokens=self.max_new_tokens, stop_ids=self.stop_ids), baseline
        )

    def score(self, item: Item, answer: Answer, baseline: Baseline | None) -> tuple[Sample, Baseline]:
        """Compare an answer to an item; without references in the data it is compared with the baseline's text."""
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
