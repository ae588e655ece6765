"""What one item gave (`Sample`), and how the samples of a row become a column of the table (`Metric`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from pmpd.eval.metrics.statistics import Estimate, bootstrap
from pmpd.runtime.errors import PmpdError

__all__ = ["Metric", "Perplexity", "Sample", "Turn"]

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """An answer of a model, or a given text that it scored.

    Attributes:
        prompt_tokens: tokens before it.
        segments: the answer cut where the precision changes: bits, tokens and text. The first token comes from prefill.
        first_passes: bits of the first pass of decode steps that the schedule had run again, by index of the token.
        ids: its tokens; empty for a given text.
    """

    prompt_tokens: int
    segments: tuple[tuple[float, int, str], ...]
    first_passes: Mapping[int, float] = field(default_factory=dict)
    ids: tuple[int, ...] = ()

    @property
    def output(self) -> str:
        """The text."""
        return "".join(text for _, _, text in self.segments)

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return sum(count for _, count, _ in self.segments)

    @property
    def precisions(self) -> tuple[float, ...]:
        """Bits that each token was computed with."""
        return tuple(chain.from_iterable([bits] * count for bits, count, _ in self.segments))

    @property
    def passes(self) -> tuple[float, ...]:
        """Bits of each pass of each decode step: the first token has none."""
        return (*self.precisions[1:], *self.first_passes.values())


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one model did with one item.

    Attributes:
        source: where the item comes from (``file:line``).
        group: what it belongs to: samples of one document are not independent.
        prompt: the text, of a conversation its first message.
        reference: the texts it was compared with (empty where the task keeps none); of a conversation one a turn.
        turns: the answers.
        scores: this sample's scores.
        counts: sums of this sample for metrics of all texts together, by metric.
        scored_steps: positions that were scored by teacher forcing.
    """

    source: str = ""
    group: str = ""
    prompt: str = ""
    reference: tuple[str, ...] = ()
    turns: tuple[Turn, ...]
    scores: Mapping[str, float]
    counts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    scored_steps: int = 0

    @property
    def output(self) -> str:
        """The answer, or those of all turns."""
        return "\n\n".join(turn.output for turn in self.turns)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the first prompt."""
        return self.turns[0].prompt_tokens

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(turn.tokens for turn in self.turns)

    @property
    def steps(self) -> int:
        """Decode steps: all tokens but the first of each answer."""
        return sum(max(0, turn.tokens - 1) for turn in self.turns)

    @property
    def passes(self) -> tuple[float, ...]:
        """Bits of each pass of each decode step."""
        return tuple(chain.from_iterable(turn.passes for turn in self.turns))


@dataclass(frozen=True)
class Metric:
    """A column of the table: the mean of one score over samples.

    A metric of all texts together (BLEU, say) is a subclass with `statistics` and a `value` of its own: what it needs
    of a sample is in `Sample.counts`.

    Attributes:
        name: its key in results.
        label: its heading.
        higher_is_better: which way is up.
        per_step: samples weigh as much as they have scored positions, not all alike.
        digits: decimals shown.
        highest: the largest possible value, where there is one.
    """

    name: str
    label: str
    higher_is_better: bool = True
    per_step: bool = False
    digits: int = 2
    highest: float | None = None

    @property
    def score(self) -> str:
        """Its key in `Sample.scores`."""
        return self.name

    @property
    def arrow(self) -> str:
        """Which way is better, for a heading."""
        return "↑" if self.higher_is_better else "↓"

    def scored(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples that have this score."""
        return [sample for sample in samples if self.score in sample.scores]

    def counted(self, samples: Sequence[Sample]) -> str:
        """Return what the value is a mean of, for a heading: ``96 tokens`` or ``8 answers``."""
        scored = self.scored(samples)
        count, unit = (sum(s.scored_steps for s in scored), "token") if self.per_step else (len(scored), "answer")
        return f"{count:,} {unit}{'s' * (count != 1)}"

    def statistics(self, samples: Sequence[Sample]) -> Doubles:
        """Return what is summed over samples, ``[samples, k]``: here the weighted score and the weight."""
        weights = np.array([float(s.scored_steps) if self.per_step else 1.0 for s in samples])
        scores = np.array([s.scores[self.score] for s in samples], dtype=np.float64)
        return np.stack([weights * scores, weights], 1)

    def value(self, sums: Doubles) -> Doubles:
        """Return the metric of such sums, ``[..., k]`` to ``[...]``."""
        return np.asarray(sums[..., 0] / sums[..., 1])

    def estimate(self, samples: Sequence[Sample]) -> Estimate:
        """Return the metric over samples, with a bootstrap interval over their groups.

        Raises:
            PmpdError: no sample has the score.
        """
        scored = self._weighing(samples)
        return bootstrap(self.statistics(scored), [s.group for s in scored], self.value)

    def difference(self, samples: Sequence[Sample], others: Sequence[Sample]) -> Estimate:
        """Return the metric of samples minus that of others, paired: both are of the same items, in the same order.

        Raises:
            PmpdError: no sample has the score in both.
        """
        pairs = [
            (s, o) for s, o in zip(samples, others, strict=True) if self.score in s.scores and self.score in o.scores
        ]
        ours, theirs = (self._weighing([pair[i] for pair in pairs]) for i in (0, 1))
        statistics = np.concatenate([self.statistics(ours), self.statistics(theirs)], 1)
        half = statistics.shape[1] // 2

        def gap(sums: Doubles) -> Doubles:
            return self.value(sums[..., :half]) - self.value(sums[..., half:])

        return bootstrap(statistics, [s.group for s in ours], gap)

    def _weighing(self, samples: Sequence[Sample]) -> list[Sample]:
        scored = self.scored(samples)
        if not scored or (self.per_step and not any(s.scored_steps for s in scored)):
            raise PmpdError("no decode step to score: every answer is shorter than two tokens: use other prompts")
        return scored


@dataclass(frozen=True)
class Perplexity(Metric):
    """exp of the mean of a negative log-likelihood in nats a token."""

    @property
    def score(self) -> str:
        """The mean negative log-likelihood of a sample's scored positions."""
        return "nll"

    def value(self, sums: Doubles) -> Doubles:
        """Return the perplexity of sums of nats and tokens."""
        return np.exp(super().value(sums))
