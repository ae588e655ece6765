"""Tasks whose answers are compared with texts: summaries, translations, open questions, and the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, takewhile, zip_longest
from typing import ClassVar

from pmpd.eval.data.records import Record, Template
from pmpd.eval.metrics.base import Metric, Sample
from pmpd.eval.metrics.rouge import ROUGE
from pmpd.eval.metrics.texts import TextScorer
from pmpd.eval.tasks.base import Item, Task
from pmpd.runtime.errors import PmpdError

__all__ = ["Answers", "CnnDailyMail", "DialogSum", "Iwslt", "MtBench"]

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
    "iwslt": (
        "French: {fr}\n\nTranslate the French text to English.\n\nEnglish:",
        "Translate this French text to English. Answer with the translation alone.\n\n{fr}",
    ),
    "mt_bench": ("Question:\n{turns[0]}\n\nAnswer:\n", "{turns[0]}"),
}
TURN_MARKUP = 32  # tokens that a chat template puts around a message, at most


@dataclass(frozen=True, kw_only=True)
class Answers(Task):
    """Greedy answers against reference texts, or against the floating-point model's answers where none exist.

    Without a template and a reference field of its own this is the task ``jsonl``: any records, any prompt.

    Attributes:
        scorer: computes the scores of answers; default those of `default_metrics`.
    """

    default_new_tokens = 256
    default_metrics: ClassVar[tuple[str, ...]] = ROUGE
    generates = True
    prompts: ClassVar[tuple[str, str] | None] = None
    default_reference: ClassVar[str | None] = None
    takes = frozenset({"template", "reference_field", "chat"})

    scorer: TextScorer | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is None and self.prompts is None:
            raise PmpdError("this task has no prompt of its own: give --prompt-template, with {field} for its fields")
        if self.scorer is None:
            object.__setattr__(self, "scorer", TextScorer(self.default_metrics))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that the scorer computes."""
        assert self.scorer is not None
        return self.scorer.metrics

    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make prompts and references of records."""
        plain, chat = self.prompts or ("", "")
        template = self.template or Template(chat if self.chat else plain)
        for record in records:
            yield replace(self._prompt(record, template.render(record)), references=self._references(record))

    def scored(self, sample: Sample) -> Sample:
        """Return a sample with its scores against its references."""
        assert self.scorer is not None
        return self.scorer.scored(sample)

    def _references(self, record: Record) -> tuple[str, ...]:
        """Return the texts of the reference field: one, a list of them, or those of ``field1``, ``field2``, …"""
        field = self.reference_field or self.default_reference
        if field is None:
            return ()
        numbered = list(takewhile(record.fields.__contains__, (f"{field}{i}" for i in count(1))))
        if field not in record.fields and numbered:
            names = numbered
        else:
            value = record.value(field)
            names = [f"{field}[{i}]" for i in range(len(value))] if isinstance(value, list) and value else [field]
        texts = tuple(record.text(name) for name in names)
        for name, text in zip(names, texts, strict=True):
            if not text.strip():
                raise PmpdError(f"{record.source}: the reference {name!r} is empty: remove the record, or fill it in")
        return texts


class DialogSum(Answers):
    """Dialogue summarization (Chen et al., 2021); the test split has three references, ``summary1`` to ``summary3``."""

    prompts = PROMPTS["dialogsum"]
    default_reference = "summary"
    default_new_tokens = 33  # the paper's output length for this task
    chats = True


class CnnDailyMail(Answers):
    """News summarization (Hermann et al., 2015), against ``highlights``."""

    prompts = PROMPTS["cnn_dailymail"]
    default_reference = "highlights"
    chats = True


class Iwslt(Answers):
    """Translation of TED talks from French (field ``fr``) to English (``en``; Cettolo et al., 2017).

    As in the paper, of sentences that have more than 60 tokens: the French ones, in the model's own tokens.
    """

    prompts = PROMPTS["iwslt"]
    default_reference = "en"
    default_metrics = ("sacrebleu", "bleu")
    chats = True
    longer_than = 60

    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make prompts and references of the records with long sentences."""
        encode = self.tokenizer.encode
        yield from super().items(
            r for r in records if len(encode(r.text("fr"), special_tokens=False)) > self.longer_than
        )


class MtBench(Answers):
    """Open questions of two turns, against the floating-point model's answers (Table 2 of the paper).

    In the second turn the model sees its own first answer. A template of the user's is a question of one turn.
    """

    prompts = PROMPTS["mt_bench"]
    chats = True

    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make the first prompt of records, with what follows it."""
        for record in records:
            (item,) = super().items([record])
            turns = record.fields.get("turns")
            later = () if self.template or not isinstance(turns, list) else range(1, len(turns))
            yield replace(item, turns=tuple(record.text(f"turns[{i}]") for i in later))

    def positions(self, item: Item) -> int:
        """Return how many positions the whole conversation takes, at most."""
        later = sum(len(self.tokenizer.encode(text)) + TURN_MARKUP + self.max_new_tokens for text in item.turns)
        return super().positions(item) + later

    def turn(self, item: Item, answers: Sequence[str]) -> tuple[int, ...]:
        """Return the tokens of a conversation up to the next answer."""
        if not answers:
            return item.ids
        later = item.turns[: len(answers)]
        if self.chat:
            texts = [item.prompt, *chain.from_iterable(zip_longest(answers, later))]
            roles = ("user", "assistant")
            return tuple(
                self.tokenizer.apply_chat_template(
                    [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
                )
            )
        asked = (f"{answer}\n\nQuestion:\n{text}\n\nAnswer:\n" for answer, text in zip(answers, later, strict=True))
        return tuple(self.tokenizer.encode(item.prompt + "".join(asked)))
