"""Metrics of answers against reference texts, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmpd.eval.metrics.base import Metric, Sample
from pmpd.eval.metrics.bleu import SMOOTHINGS, Smoothing, bleu_of, bleu_statistics, signature
from pmpd.eval.metrics.rouge import ROUGE, rouge, rouge_scorer
from pmpd.runtime.errors import PmpdError, unknown_choice

if TYPE_CHECKING:
    from pmpd.eval.metrics.bertscore import Encoder

__all__ = ["BERTSCORE", "TEXT_METRICS", "Bleu", "TextScorer"]

BERTSCORE = "bertscore"


@dataclass(frozen=True)
class Bleu(Metric):
    """BLEU of all answers together: the sacrebleu package's; its `value` is of sums of its statistics."""

    smoothing: Smoothing = "exp"

    def statistics(self, samples: Sequence[Sample]) -> npt.NDArray[np.float64]:
        """Return lengths, matches and totals, ``[samples, 10]``."""
        return np.array([sample.counts["bleu"] for sample in samples], dtype=np.float64)

    def value(self, sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return BLEU, 0 to 100."""
        return bleu_of(sums, self.smoothing)


TEXT_METRICS: Mapping[str, Metric] = {
    **{name: Metric(name, f"ROUGE-{name[5:]}", highest=100) for name in ROUGE},
    "sacrebleu": Bleu("sacrebleu", "sacreBLEU", highest=100, smoothing=SMOOTHINGS["sacrebleu"]),
    "bleu": Bleu("bleu", "BLEU", highest=100, smoothing=SMOOTHINGS["bleu"]),
    BERTSCORE: Metric(BERTSCORE, "BERTScore", highest=100),
}
"""By the names that users give."""


class TextScorer:
    """Computes the scores of answers.

    Args:
        names: of `TEXT_METRICS`.
        encoder: of BERTScore.

    Raises:
        PmpdError: an unknown metric, or BERTScore without an encoder.
        MissingExtraError: a metric's package is not installed.
    """

    def __init__(self, names: Sequence[str], encoder: Encoder | None = None) -> None:
        for name in names:
            if name not in TEXT_METRICS:
                raise PmpdError(unknown_choice("metric", name, TEXT_METRICS))
        if BERTSCORE in names and encoder is None:
            raise PmpdError(f"the metric {BERTSCORE} needs an encoder: give a folder or hub id with --encoder")
        self.metrics = tuple(TEXT_METRICS[name] for name in dict.fromkeys(names))
        self._encoder = encoder
        if any(metric.name in ROUGE for metric in self.metrics):
            rouge_scorer()
        if any(isinstance(metric, Bleu) for metric in self.metrics):
            bleu_statistics("", [""])

    def scored(self, sample: Sample) -> Sample:
        """Return a sample with its scores: of a conversation the means over its turns, each with its own reference.

        Raises:
            PmpdError: it has no reference.
            MissingExtraError: a metric's package is not installed.
        """
        if not sample.reference:
            raise PmpdError(f"{sample.source}: there is no reference text to compare with")
        if len(sample.turns) > 1:
            pairs = [(turn.output, [text]) for turn, text in zip(sample.turns, sample.reference, strict=True)]
        else:
            pairs = [(sample.turns[0].output, list(sample.reference))]
        names = [metric.name for metric in self.metrics]
        scores, counts = dict(sample.scores), dict(sample.counts)
        if any(name in ROUGE for name in names):
            turns = [rouge(output, references) for output, references in pairs]
            scores |= {name: float(np.mean([turn[name] for turn in turns])) for name in ROUGE if name in names}
        if any(isinstance(metric, Bleu) for metric in self.metrics):
            sums = np.sum([bleu_statistics(output, references) for output, references in pairs], 0)
            counts["bleu"] = tuple(sums.tolist())
            scores |= {m.name: float(m.value(sums)) for m in self.metrics if isinstance(m, Bleu)}
        if BERTSCORE in names and self._encoder is not None:
            from pmpd.eval.metrics.bertscore import bertscore_f1  # it imports transformers

            scores[BERTSCORE] = float(np.mean(bertscore_f1(self._encoder, pairs)))
        return replace(sample, scores=scores, counts=counts)

    def describe(self, references: Sequence[tuple[str, ...]]) -> dict[str, Any]:
        """Return what the metrics depend on, JSON-ready: the signature of BLEU, the encoder of BERTScore.

        Args:
            references: of each sample.
        """
        counts = {len(texts) or 1 for texts in references}
        facts: dict[str, Any] = {m.name: signature(m.smoothing, counts) for m in self.metrics if isinstance(m, Bleu)}
        if self._encoder is not None:
            facts[BERTSCORE] = self._encoder.describe()
        return facts
