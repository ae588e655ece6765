"""What one item gave (`Sample`), and how the samples of a row become a column of the table (`Metric`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pmpd.eval.measure.statistics import Estimate, weighted_mean

__all__ = ["Metric", "Perplexity", "Sample"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one model did with one item.

    Attributes:
        source: where the item comes from (``file:line``).
        prompt, output, reference: the texts, and those it was compared with (empty where the task keeps none).
        prompt_tokens, output_tokens: their lengths.
        precisions: bits that each output token was computed with; the first comes from prefill.
        first_passes: bits of the first pass of decode steps that the schedule had run again, by index of the token.
        segments: the output cut where the precision changes: bits and text.
        seconds: time of each output token (of the first: the whole prefill); empty under teacher forcing.
        prefill_seconds: time of the prompt.
        scores: this sample's scores.
        scored_steps: decode steps that were scored by teacher forcing.
    """

    source: str
    prompt: str = ""
    output: str = ""
    reference: tuple[str, ...] = ()
    prompt_tokens: int
    output_tokens: int
    precisions: tuple[float, ...]
    first_passes: Mapping[int, float] = field(default_factory=dict)
    segments: tuple[tuple[float, str], ...] = ()
    seconds: tuple[float, ...] = ()
    prefill_seconds: float
    scores: Mapping[str, float]
    scored_steps: int = 0


@dataclass(frozen=True)
class Metric:
    """A column of the table: the mean of one score over samples.

    A metric of all texts together (BLEU, say) is a subclass with an `estimate` and a `difference` of its own: both get
    the samples, with their outputs and references.

    Attributes:
        name: its key in results.
        label: its heading.
        higher_is_better: which way is up.
        per_step: samples weigh as much as they have scored decode steps, not all alike.
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
        """Return what the value is a mean of, for a heading: ``96 steps`` or ``8 answers``."""
        scored = self.scored(samples)
        count, unit = (sum(s.scored_steps for s in scored), "step") if self.per_step else (len(scored), "answer")
        return f"{count:,} {unit}{'s' * (count != 1)}"

    def estimate(self, samples: Sequence[Sample]) -> Estimate:
        """Return the metric over samples.

        Raises:
            PmpdError: no sample has a scored step.
        """
        scored = self.scored(samples)
        mean, stderr = weighted_mean([sample.scores[self.score] for sample in scored], self._weights(scored))
        return Estimate.from_stderr(mean, stderr, len(scored))

    def difference(self, samples: Sequence[Sample], others: Sequence[Sample]) -> Estimate:
        """Return the metric of samples minus that of others, paired: both are of the same items, in the same order."""
        pairs = [
            (s, o) for s, o in zip(samples, others, strict=True) if self.score in s.scores and self.score in o.scores
        ]
        gaps = [sample.scores[self.score] - other.scores[self.score] for sample, other in pairs]
        mean, stderr = weighted_mean(gaps, self._weights([sample for sample, _ in pairs]))
        return Estimate.from_stderr(mean, stderr, len(pairs))

    def _weights(self, samples: Sequence[Sample]) -> list[float]:
        return [float(sample.scored_steps) if self.per_step else 1.0 for sample in samples]


@dataclass(frozen=True)
class Perplexity(Metric):
    """exp of the mean of a negative log-likelihood in nats; errors are those of the exponent, carried over (delta)."""

    @property
    def score(self) -> str:
        """The mean negative log-likelihood of a sample's scored steps."""
        return "nll"

    def estimate(self, samples: Sequence[Sample]) -> Estimate:
        """Return the perplexity over all scored steps."""
        scored = self.scored(samples)
        mean, stderr = weighted_mean([sample.scores[self.score] for sample in scored], self._weights(scored))
        return Estimate.from_stderr(math.exp(mean), math.exp(mean) * stderr, len(scored))

    def difference(self, samples: Sequence[Sample], others: Sequence[Sample]) -> Estimate:
        """Return the perplexity of samples minus that of others on the same windows."""
        weights = self._weights(samples)
        ours, theirs = (
            weighted_mean([sample.scores[self.score] for sample in group], weights)[0] for group in (samples, others)
        )
        pairs = zip(samples, others, strict=True)
        slopes = math.exp(ours), math.exp(theirs)
        gaps = [slopes[0] * s.scores[self.score] - slopes[1] * o.scores[self.score] for s, o in pairs]
        return Estimate.from_stderr(slopes[0] - slopes[1], weighted_mean(gaps, weights)[1], len(gaps))
