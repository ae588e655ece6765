"""What a task is: it makes items of data, says what a model does with each, and scores what comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pmpd.eval.data.records import Record, Template
from pmpd.eval.metrics.base import Metric, Sample
from pmpd.runtime import Tokenizer
from pmpd.runtime.errors import PmpdError

__all__ = ["OPTIONS", "Item", "Task"]

Floats = npt.NDArray[np.float32]
OPTIONS = {
    "template": "--prompt-template",
    "reference_field": "--reference-field",
    "chat": "--chat",
    "stride": "--stride",
}
"""Attributes of a task that not every task has a use for, and what users call them."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to measure: a prompt, and what to compare the answer with.

    Attributes:
        source: where it comes from (``file:line``, and the first token of a window).
        group: what it belongs to (`Sample.group`); default its source.
        prompt: its text; `ids` its tokens.
        turns: what the user says after each answer; nothing in most tasks.
        references: texts to compare with; none means the floating-point model's own answer.
        answer: tokens to score after the prompt.
        unscored: positions of `answer` that are context only.
    """

    source: str
    group: str = ""
    prompt: str = ""
    ids: tuple[int, ...]
    turns: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    answer: tuple[int, ...] = ()
    unscored: int = 0


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task, set up for one model. Subclasses say what is asked (`items`), and how answers are scored.

    Attributes:
        default_new_tokens: tokens per answer where the user asks for no other number (class).
        default_data: what is asked where the user gives no data (class).
        generates: whether the model answers prompts (class).
        forces: whether it scores a given text: the item's `answer`, or where that is empty the floating-point model's
            answer (class).
        compares: whether scores of given texts need the floating-point model's logits (class).
        decodes_prompt: whether prompts, too, have the precision of decode steps (class).
        spreads: whether a limited number of items comes from all over the data, not from their start (class).
        takes: which of the options of `OPTIONS` it has (class).
        chats: whether it uses the chat template of a model that has one (class).
        tokenizer: the bundle's.
        stop_ids: tokens that end an answer.
        max_new_tokens: tokens per answer (the paper's OL).
        context_length: positions that the model has.
        template: the prompt; default the task's own.
        reference_field: the record's field with the reference text or texts; default the task's own.
        chat: whether prompts go through the model's chat template.
        stride: tokens between the starts of windows of text; default their length.

    Raises:
        PmpdError: an option that the task lacks or cannot use.
    """

    default_new_tokens: ClassVar[int]
    default_data: ClassVar[Path | None] = None
    generates: ClassVar[bool] = False
    forces: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    decodes_prompt: ClassVar[bool] = False
    spreads: ClassVar[bool] = False
    takes: ClassVar[frozenset[str]] = frozenset()
    chats: ClassVar[bool] = False

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    context_length: int
    template: Template | None = None
    reference_field: str | None = None
    chat: bool = False
    stride: int | None = None

    def __post_init__(self) -> None:
        for attribute, option in OPTIONS.items():
            if getattr(self, attribute) and attribute not in self.takes:
                raise PmpdError(f"{option} does not apply to this task: leave it out")

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """The columns that it fills; the first one is what verdicts are about."""

    @abstractmethod
    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make the items of a data file. Raises PmpdError for a record that does not fit."""

    def positions(self, item: Item) -> int:
        """Return how many positions of the model's context an item takes, at most."""
        return len(item.ids) + max(len(item.answer), self.max_new_tokens if self.generates else 0)

    def turn(self, item: Item, answers: Sequence[str]) -> tuple[int, ...]:
        """Return the prompt of the turn after these answers of the model, in tokens."""
        assert not answers, "this task has one turn"
        return item.ids

    def force_scores(self, targets: Sequence[int], logits: Floats, reference: Floats | None) -> dict[str, list[float]]:
        """Return scores of positions of a given text.

        Args:
            targets: the tokens ``[n]``.
            logits: of the model before each, ``[n, V]``.
            reference: the floating-point model's, for a task that compares.

        Returns: a list of `n` for each score; none for a task that does not force.
        """
        return {}

    def scored(self, sample: Sample) -> Sample:
        """Return a sample with the scores of its texts."""
        return sample

    def _prompt(self, record: Record, text: str) -> Item:
        if self.chat:
            ids = self.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        else:
            ids = self.tokenizer.encode(text)
        if not ids:
            raise PmpdError(f"{record.source}: the prompt is empty: remove the record or change --prompt-template")
        return Item(source=record.source, group=record.source, prompt=text, ids=tuple(ids))
