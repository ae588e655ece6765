"""A tokenizer of words, and models whose every logit is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from pmpd.eval.data.records import Record
from pmpd.eval.measure.models import Answer, Forced
from pmpd.eval.tasks.base import Task
from pmpd.eval.tasks.registry import TASKS
from pmpd.runtime import Plan, Prefill, Schedule

WORDS = ["<s>", "</s>", *"abcdefgh", "=", "Title", "Question:", "Answer:"]
V = len(WORDS)
USER, MODEL = 8, 9  # what stands before each message in the chat template


class WordTokenizer:
    """One token per word."""

    has_chat_template = True

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return [0] * special_tokens + [WORDS.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(WORDS[i] for i in ids if i > 1)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        ids = [0]
        for message in messages:
            ids += [{"user": USER, "assistant": MODEL}[message["role"]]]
            ids += self.encode(message["content"], special_tokens=False)
        return [*ids, MODEL]


def make(name: str, **options: Any) -> Task:
    """Return a task for the tokenizer of words."""
    values = {"max_new_tokens": 4, "context_length": 100, **options}
    return TASKS[name](tokenizer=WordTokenizer(), stop_ids=(1,), **values)  # type: ignore[arg-type]


def records(*fields: dict[str, Any]) -> list[Record]:
    return [Record(f"f:{i}", each) for i, each in enumerate(fields, start=1)]


def one_hot(token: int, p: float = 0.5) -> np.ndarray:
    """Return logits ``[V]`` that give a token the probability `p`, and all others the same."""
    row = np.full(V, (1 - p) / (V - 1))
    row[token] = p
    logits: np.ndarray = np.log(row).astype(np.float32)
    return logits


class FakeGenerator:
    """A bundle whose next token is a function of the tokens so far and of the bits of the last step.

    Attributes:
        prefills: the prompts that were run, each with its bits.
    """

    def __init__(self, following: Callable[[Sequence[int], float], int], *, p: float = 0.5) -> None:
        self._following, self._p = following, p
        self._tokens: list[int] = []
        self.prefills: list[tuple[tuple[int, ...], float]] = []
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(prefill_precision=4))
        self.engine = SimpleNamespace(bundle=self.bundle)
        self.sequence = self

    def kernels(self) -> list[Any]:
        return []

    def reset(self) -> None:
        self._tokens = []

    def truncate(self, length: int) -> None:
        del self._tokens[length:]

    def prefill(self, ids: Sequence[int], *, precision: float | None = None) -> np.ndarray:
        self._tokens += ids
        self.prefills.append((tuple(ids), precision or 4))
        return one_hot(self._following(self._tokens, precision or 4), self._p)

    def step(self, token: int, *, precision: float, margin: float = 0.0) -> np.ndarray:
        self._tokens.append(token)
        return one_hot(self._following(self._tokens, precision), self._p)

    def decode(self, ids: Sequence[int], *, precision: float) -> np.ndarray:
        return np.stack([self.step(token, precision=precision) for token in ids])

    def begin(self, schedule: Schedule, logits: np.ndarray) -> Plan:
        return schedule.begin(Prefill(tokens=(), logits=logits, kv=None))  # type: ignore[arg-type]


class FakeReference:
    """A floating-point model that gives these answers one after the other, and each target the probability `p`.

    Attributes:
        prompts: what it was asked, call by call.
    """

    def __init__(self, *answers: Sequence[int], p: float = 0.5) -> None:
        self._answers, self._p = iter(answers), p
        self.prompts: list[list[tuple[int, ...]]] = []

    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[Answer]:
        self.prompts.append([tuple(prompt) for prompt in prompts])
        texts = [tuple(next(self._answers))[:max_new_tokens] for _ in prompts]
        return [Answer(ids=ids, precisions=(16,) * len(ids)) for ids in texts]

    def force(self, prompt: Sequence[int], answer: Sequence[int]) -> Iterator[Forced]:
        for start, token in enumerate(answer):
            yield Forced(start=start, logits=one_hot(token, self._p)[None], precision=16)
