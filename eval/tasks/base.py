"""What a task is: it makes items of data, runs a model on each, and scores what comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pmpd.eval.data.records import Record, Template
from pmpd.eval.measure.models import Answer, ModelUnderTest
from pmpd.eval.measure.scoring import Metric, Sample
from pmpd.runtime import Tokenizer
from pmpd.runtime.errors import PmpdError

__all__ = ["Baseline", "Item", "Task"]


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
    """A task, set up for one model. Subclasses say what is asked (`items`) and how it is scored (`measure`).

    Attributes:
        metrics: the columns that it fills (class).
        default_new_tokens: tokens per answer where the user asks for no other number (class).
        takes: which of the options `reference_field` and `chat` it has (class).
        chats: whether it uses the chat template of a model that has one (class).
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
    takes: ClassVar[frozenset[str]] = frozenset()
    chats: ClassVar[bool] = False

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
    def measure(self, model: ModelUnderTest, item: Item, baseline: Baseline | None) -> tuple[Sample, Baseline]:
        """Run one item; without a baseline the model is the floating-point one, and its own baseline."""

    def _prompt(self, record: Record, text: str) -> Item:
        if self.chat:
            ids = self.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        else:
            ids = self.tokenizer.encode(text)
        if not ids:
            raise PmpdError(f"{record.source}: the prompt is empty: remove the record or change --prompt-template")
        return Item(source=record.source, prompt=text, ids=tuple(ids))

    def _sample(
        self, item: Item, answer: Answer, references: tuple[str, ...], scores: dict[str, float], steps: int = 0
    ) -> Sample:
        return Sample(
            source=item.source,
            prompt=item.prompt,
            output=self.tokenizer.decode(answer.ids),
            reference=references,
            prompt_tokens=len(item.ids),
            output_tokens=len(answer.ids),
            precisions=answer.precisions,
            first_passes=answer.first_passes,
            segments=tuple(self._segments(answer)),
            seconds=answer.seconds,
            prefill_seconds=answer.prefill_seconds,
            scores=scores,
            scored_steps=steps,
        )

    def _segments(self, answer: Answer) -> Iterator[tuple[float, str]]:
        """Split the answer's text where the precision changes."""
        bits = answer.precisions
        done = ""
        for end in range(1, len(bits) + 1):
            if end == len(bits) or bits[end] != bits[end - 1]:
                text = self.tokenizer.decode(answer.ids[:end])
                if end < len(bits):
                    text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character whose bytes the switch divides
                yield bits[end - 1], text[len(done) :]
                done = text
