"""ROUGE of a text, by the package rouge-score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from pmpd.runtime.errors import MissingExtraError

__all__ = ["ROUGE", "rouge", "rouge_scorer"]

ROUGE = ("rougeL", "rouge2", "rouge1")


@cache
def rouge_scorer() -> Any:
    """Return the scorer of `rouge`. Raises MissingExtraError where the package rouge-score is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtraError("rouge-score", "eval") from None
    return RougeScorer(ROUGE, use_stemmer=True)


def rouge(output: str, references: Sequence[str]) -> dict[str, float]:
    """Return ROUGE-1, -2 and -L, F-measure with stemming, 0 to 100 as in the paper (Section 5, Table 1).

    Of several references the mean counts, as if each were a record of its own. Equal texts score 100 even where ROUGE
    finds no word in them (it counts only Latin letters and digits).

    Raises:
        MissingExtraError: the package rouge-score is not installed.
    """
    scorer = rouge_scorer()
    totals = dict.fromkeys(ROUGE, 0.0)
    for reference in references:
        same = output.strip() == reference.strip()
        scores = None if same else scorer.score(reference, output)
        for name in ROUGE:
            totals[name] += 100.0 if scores is None else 100.0 * scores[name].fmeasure
    return {name: total / len(references) for name, total in totals.items()}
