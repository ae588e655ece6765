"""Means, intervals and paired differences against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from pmpd.eval.measure.scoring import Metric, Perplexity, Sample
from pmpd.eval.measure.statistics import Estimate, weighted_mean
from pmpd.runtime import PmpdError

ROUGE = Metric("rougeL", "ROUGE-L")
PER_STEP = Metric("kl", "KL", higher_is_better=False, per_step=True)
PERPLEXITY = Perplexity("perplexity", "decode perplexity", higher_is_better=False, per_step=True)


def sample(steps: int = 0, output: str = "", **scores: float) -> Sample:
    return Sample(
        source="x",
        output=output,
        prompt_tokens=1,
        output_tokens=1,
        precisions=(4,),
        prefill_seconds=0.1,
        scores=scores,
        scored_steps=steps,
    )


def test_weighted_mean_of_equal_weights_is_mean_and_standard_error() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    assert weighted_mean(values, [1.0] * 4) == pytest.approx((4.0, np.std(values, ddof=1) / 2))


def test_weighted_mean_weighs() -> None:
    assert weighted_mean([1.0, 5.0], [3.0, 1.0])[0] == pytest.approx(2.0)
    assert weighted_mean([7.0, 100.0], [2.0, 0.0]) == (7.0, 0.0)


def test_weighted_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(PmpdError, match="no decode step"):
        weighted_mean([1.0], [0.0])


def test_an_interval_is_students() -> None:
    """Of 1 to 5: mean 3, standard error sqrt(2.5 / 5); the 97.5 % quantile of four degrees of freedom is 2.776."""
    estimate = Estimate.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (estimate.value, estimate.count) == (3.0, 5)
    assert estimate.ci95 == pytest.approx(2.776 * math.sqrt(0.5), rel=2e-3)
    assert Estimate.from_stderr(0.0, 1.0, 10_000).ci95 == pytest.approx(1.96, rel=1e-3)
    assert estimate.text(1) == "3.0 ± 2.0"


def test_one_sample_has_no_interval() -> None:
    estimate = Estimate.of([5.0])
    assert (estimate.ci95, estimate.is_zero, estimate.text(1, scale=100)) == (None, None, "500.0")


def test_a_difference_is_paired() -> None:
    """Both rows scatter by far more than they differ: only pairs show which is better."""
    ours = [sample(rougeL=value) for value in (10.0, 30.0, 50.0, 70.0)]
    theirs = [sample(rougeL=value) for value in (11.0, 32.0, 51.0, 72.0)]
    gap = ROUGE.difference(ours, theirs)
    assert gap.value == pytest.approx(-1.5)
    assert gap.ci95 == pytest.approx(3.182 * np.std([1, 2, 1, 2], ddof=1) / 2, rel=2e-3)
    assert gap.is_zero is False
    unpaired = ROUGE.estimate(ours).ci95
    assert unpaired is not None
    assert unpaired > 40


def test_steps_weigh() -> None:
    samples = [sample(3, kl=1.0), sample(1, kl=5.0), sample(0, rougeL=1.0)]
    assert PER_STEP.estimate(samples).value == pytest.approx(2.0)
    assert PER_STEP.counted(samples) == "4 steps"
    assert ROUGE.counted(samples) == "1 answer"


def test_perplexity_and_its_difference() -> None:
    ours = [sample(2, nll=math.log(8.0)), sample(1, nll=math.log(8.0))]
    theirs = [sample(2, nll=math.log(4.0)), sample(1, nll=math.log(4.0))]
    assert PERPLEXITY.estimate(ours) == Estimate(pytest.approx(8.0), pytest.approx(0.0), 2)
    assert PERPLEXITY.difference(ours, theirs).value == pytest.approx(4.0)
    # Windows that are hard for both tell nothing about the difference.
    hard = [sample(2, nll=math.log(1000.0)), sample(1, nll=math.log(2.0))]
    same = PERPLEXITY.difference(hard, hard)
    assert (same.value, same.ci95) == (pytest.approx(0.0), pytest.approx(0.0))


def test_a_metric_of_all_texts_together() -> None:
    """A subclass sees the samples with their texts: here, how many different words all outputs have."""

    class Words(Metric):
        def estimate(self, samples: Sequence[Sample]) -> Estimate:
            return Estimate(len({word for sample in samples for word in sample.output.split()}), None, len(samples))

        def difference(self, samples: Sequence[Sample], others: Sequence[Sample]) -> Estimate:
            gap = self.estimate(samples).value - self.estimate(others).value
            return Estimate(gap, None, len(samples))

    metric = Words("words", "different words")
    ours, theirs = [sample(output="a b"), sample(output="b c")], [sample(output="a"), sample(output="a")]
    assert metric.estimate(ours).value == 3
    assert metric.difference(ours, theirs).value == 2
