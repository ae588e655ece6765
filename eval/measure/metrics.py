"""Scores of one sample: from logits (nats, per position) and from texts (ROUGE)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import MissingExtraError, PmpdError

__all__ = [
    "ROUGE",
    "kl_divergence",
    "log_softmax",
    "negative_log_likelihood",
    "rouge",
    "rouge_scorer",
    "top1_agreement",
]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
ROUGE = ("rouge1", "rouge2", "rougeL")


def log_softmax(logits: Floats) -> Doubles:
    """Return log probabilities ``[..., V]`` in float64.

    Raises:
        PmpdError: a logit is NaN or infinite.
    """
    x = logits.astype(np.float64)
    if not np.isfinite(x).all():
        raise PmpdError(
            "the model computes logits that are not finite: its weights or kernels are broken, export again"
        )
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def negative_log_likelihood(logits: Floats, targets: Sequence[int]) -> Doubles:
    """Return ``-log p(target)`` in nats ``[T]`` for logits ``[T, V]`` and T token ids.

    The perplexity of a text is exp of its mean.
    """
    index = np.asarray(targets, dtype=np.int64)[:, None]
    return -np.take_along_axis(log_softmax(logits), index, axis=-1)[:, 0]


def kl_divergence(reference: Floats, logits: Floats) -> Doubles:
    """Return ``KL(reference || logits)`` in nats ``[T]``, from logits of both ``[T, V]``."""
    log_p = log_softmax(reference)
    divergence: Doubles = (np.exp(log_p) * (log_p - log_softmax(logits))).sum(axis=-1)
    return divergence


def top1_agreement(reference: Floats, logits: Floats) -> npt.NDArray[np.bool_]:
    """Return for each position of logits ``[T, V]`` whether both have the same most likely token, ``[T]``."""
    agreement: npt.NDArray[np.bool_] = reference.argmax(axis=-1) == logits.argmax(axis=-1)
    return agreement


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
