"""Corpus BLEU (Papineni et al., 2002) as sacrebleu computes it (Post, 2018), from counts that can be added up.

A corpus score is a function of sums over the segments, so a bootstrap over segments needs no text: it adds rows of
counts. `bleu_statistics` takes these counts from sacrebleu; `bleu_of` is sacrebleu's formula for many sums at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import MissingExtraError

__all__ = ["SMOOTHINGS", "Smoothing", "bleu_of", "bleu_statistics", "signature"]

Smoothing = Literal["exp", "none"]
Doubles = npt.NDArray[np.float64]
# The scores by name, and sacrebleu's name of how each smooths: `sacrebleu` is its default, `bleu` is without smoothing.
SMOOTHINGS: dict[str, Smoothing] = {"sacrebleu": "exp", "bleu": "none"}
_ORDERS = 4  # n-grams of 1 to 4 words


def bleu_statistics(output: str, references: Sequence[str]) -> tuple[float, ...]:
    """Return the ten counts of one segment: words of the output and of the reference, matches 1 to 4, n-grams 1 to 4.

    Words are those of the tokenizer 13a. Of several references, at least one, an n-gram may match any, and the length
    is that of the reference whose length is nearest to the output's (the shorter one of two).

    Raises:
        MissingExtraError: the package sacrebleu is not installed.
    """
    score = _metric("exp").sentence_score(output, references)
    return tuple(map(float, (score.sys_len, score.ref_len, *score.counts, *score.totals)))


def bleu_of(sums: npt.NDArray[Any], smoothing: Smoothing) -> Doubles:
    """Return BLEU, 0 to 100 ``[...]``, of sums ``[..., 10]`` of `bleu_statistics` over the segments of a corpus.

    The score is 0 where no word matches, where no output has four words, and without smoothing also where no n-gram of
    some order matches. Smoothing ``exp`` counts the k-th order without a match as 1 / 2^k matches (Chen and Cherry,
    2014, method 3).
    """
    lengths, matches, totals = np.split(np.asarray(sums, np.float64), (2, 2 + _ORDERS), axis=-1)
    output_length, reference_length = lengths[..., 0], lengths[..., 1]
    if smoothing == "exp":
        unmatched = matches == 0
        smoothed = np.where(unmatched, 0.5 ** np.cumsum(unmatched, axis=-1), matches)  # [..., 4]
    else:
        smoothed = matches
    scored: npt.NDArray[np.bool_] = matches.any(axis=-1) & np.all((smoothed > 0) & (totals > 0), axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):  # where nothing is scored
        precision = np.exp(np.log(smoothed / totals).mean(axis=-1))
        brevity = np.exp(np.minimum(0.0, 1.0 - reference_length / output_length))
        return np.where(scored, 100.0 * brevity * precision, 0.0)


def signature(smoothing: Smoothing, reference_counts: Collection[int]) -> str:
    """Return sacrebleu's signature of a score, such as ``nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0``.

    Args:
        smoothing: that of the score.
        reference_counts: how many references the segments have, each count at least once.

    Raises:
        MissingExtraError: the package sacrebleu is not installed.
    """
    counts = set(reference_counts)
    streams = list(zip_longest(*([""] * count for count in counts)))  # the n-th references, None where there is none
    metric = _metric(smoothing, whole_corpus=True)
    metric.corpus_score([""] * len(counts), streams)
    return str(metric.get_signature())


@cache
def _metric(smoothing: Smoothing, whole_corpus: bool = False) -> Any:
    """Return sacrebleu's metric; one for single segments has the effective order, without which sacrebleu warns."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise MissingExtraError("sacrebleu", "eval") from None
    return BLEU(tokenize="13a", smooth_method=smoothing, effective_order=not whole_corpus)
