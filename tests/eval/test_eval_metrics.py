"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pmpd.eval.metrics.logits import kl_divergence, negative_log_likelihood, top1_agreement
from pmpd.eval.metrics.rouge import rouge
from pmpd.runtime import PmpdError


def logits_of(*rows: list[float]) -> np.ndarray:
    """Logits whose softmax is `rows`, shifted to show that shifts do not count."""
    logits: np.ndarray = (np.log(np.array(rows)) + 3.0).astype(np.float32)
    return logits


def test_negative_log_likelihood_by_hand() -> None:
    logits = logits_of([0.5, 0.25, 0.25], [0.1, 0.2, 0.7])
    assert negative_log_likelihood(logits, [1, 2]) == pytest.approx([math.log(4), -math.log(0.7)], rel=1e-6)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary() -> None:
    assert np.exp(negative_log_likelihood(np.zeros((5, 37), np.float32), [0, 1, 2, 3, 36]).mean()) == pytest.approx(37)


def test_kl_divergence_by_hand() -> None:
    p, q = [0.5, 0.5], [0.9, 0.1]
    want = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(logits_of(p), logits_of(q)) == pytest.approx([want], rel=1e-6)
    assert kl_divergence(logits_of(q), logits_of(p)) != pytest.approx([want], rel=1e-2)


@given(hnp.arrays(np.float32, (2, 3, 7), elements=st.floats(-50, 50, width=32)))
def test_kl_divergence_is_no_less_than_zero_and_zero_for_the_same(pair: np.ndarray) -> None:
    assert (kl_divergence(pair[0], pair[1]) >= -1e-12).all()
    assert kl_divergence(pair[0], pair[0]) == pytest.approx(np.zeros(3), abs=1e-12)


def test_huge_logits_do_not_overflow() -> None:
    assert negative_log_likelihood(np.array([[1e30, 0.0]], np.float32), [0]) == pytest.approx([0.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(PmpdError, match="not finite"):
        negative_log_likelihood(np.array([[0.0, bad]], np.float32), [0])


def test_top1_agreement() -> None:
    a, b = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[[0, 2, 2]]
    assert top1_agreement(a, b).tolist() == [True, False, True]


def test_rouge_by_hand() -> None:
    # Five words against four; four in common, in order; bigrams: the cat, on mats / the cat, cat slept, on mats …
    scores = rouge("the cat slept on mats", ["the cat on mats"])
    assert scores["rouge1"] == pytest.approx(100 * 2 * (4 / 5) * (4 / 4) / (4 / 5 + 4 / 4))
    assert scores["rouge2"] == pytest.approx(100 * 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert scores["rougeL"] == scores["rouge1"]
    # In another order the longest common subsequence is shorter, the words in common are not.
    assert rouge("mats on the cat", ["the cat on mats"])["rougeL"] == pytest.approx(50.0)


def test_rouge_stems_words() -> None:
    assert rouge("the cat walks", ["the cat walked"])["rouge1"] == pytest.approx(100.0)


def test_rouge_of_several_references_is_the_mean() -> None:
    assert rouge("a b", ["a b", "c d"])["rougeL"] == pytest.approx(50.0)


def test_rouge_of_texts_without_latin_words() -> None:
    assert rouge("你好", ["你好 "])["rougeL"] == 100.0
    assert rouge("你好", ["再见"])["rougeL"] == 0.0
    assert rouge("", [""])["rouge2"] == 100.0
