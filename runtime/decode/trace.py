"""What a generation did: each token with its precision and time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Token", "Trace"]


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        id: the token id.
        index: its place in the answer, from 0.
        precision: bits of the weights that produced it; token 0 has the prefill precision.
        seconds: wall time of the step that produced it (for token 0: of the whole prefill), sampling included.
        text: the text it adds, when the generator has a tokenizer (bytes of an unfinished character come with a later
            token).
        first_pass: bits of the step's first pass, where the schedule had it run again at `precision`; else None.
    """

    id: int
    index: int
    precision: float
    seconds: float
    text: str | None = None
    first_pass: float | None = None

    @property
    def passes(self) -> tuple[float, ...]:
        """Bits of every pass of the step, in their order: one, or two if it was run again."""
        return (self.precision,) if self.first_pass is None else (self.first_pass, self.precision)


@dataclass
class Trace:
    """The record of one answer, complete as far as its stream has run.

    Attributes:
        prompt_tokens: length of the prompt.
        reused_tokens: how many of them were in the cache already.
        prefill_seconds: time that the others took.
        tokens: the tokens of the answer, as the stream yielded them: none of a stop string.
        finish_reason: ``stop_id``, ``stop_string``, ``length`` (`max_new_tokens` or the cache's end) or, while the
            stream runs and after it was cancelled, None.
    """

    prompt_tokens: int
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """The text of the answer; empty when the generator has no tokenizer."""
        return "".join(token.text or "" for token in self.tokens)

    @property
    def decode_seconds(self) -> float:
        """Wall time of all decode steps."""
        return sum(token.seconds for token in self.tokens[1:])

    @property
    def average_bits(self) -> float | None:
        """Mean precision over the decode steps (PMPD paper, Section 5 "Baselines"); None before the first step.

        A step that was run again counts with the bits of both passes, so the mean may exceed the highest precision.
        """
        steps = self.tokens[1:]
        return sum(sum(token.passes) for token in steps) / len(steps) if steps else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Decode steps per second; None before the first step."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds > 0 else None

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens computed per second; None if there was no prefill."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_seconds if self.prefill_seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the trace as JSON-ready data."""
        return asdict(self)
