"""Values and their intervals: by hand, against Student's t, and by how often they cover what is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from pmpd.eval.metrics.base import Metric, Perplexity, Sample, Turn
from pmpd.eval.metrics.statistics import Estimate, bootstrap
from pmpd.eval.metrics.texts import TEXT_METRICS, TextScorer
from pmpd.runtime import PmpdError

ROUGE = Metric("rougeL", "ROUGE-L")
PER_STEP = Metric("kl", "KL", higher_is_better=False, per_step=True)
PERPLEXITY = Perplexity("perplexity", "perplexity", higher_is_better=False, per_step=True)


def sample(steps: int = 0, group: str = "", **scores: float) -> Sample:
    turn = Turn(prompt_tokens=1, segments=((4, 1, "x"),))
    return Sample(group=group, turns=(turn,), scores=scores, scored_steps=steps)


def rouges(values: Sequence[float]) -> list[Sample]:
    return [sample(group=str(i), rougeL=value) for i, value in enumerate(values)]


def mean_of(values: npt.ArrayLike, groups: Sequence[int] | None = None) -> Estimate:
    x = np.asarray(values, dtype=np.float64)
    return bootstrap(
        np.stack([x, np.ones_like(x)], 1), groups or range(len(x)), lambda sums: sums[..., 0] / sums[..., 1]
    )


def width(estimate: Estimate) -> float:
    assert estimate.ci95 is not None
    return estimate.ci95


def test_an_interval_is_students() -> None:
    """Of 1 to 5: mean 3, standard error sqrt(2.5 / 5); the 97.5 % quantile of four degrees of freedom is 2.776."""
    estimate = Estimate.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (estimate.value, estimate.count) == (3.0, 5)
    assert estimate.ci95 == pytest.approx(2.776 * math.sqrt(0.5), rel=2e-3)
    assert Estimate.of([0.0, 1.0] * 5000).ci95 == pytest.approx(1.96 * 0.5 / 100, rel=1e-3)
    assert estimate.text(1) == "3.0 ± 2.0"


def test_one_sample_has_no_interval() -> None:
    estimate = Estimate.of([5.0])
    assert (estimate.ci95, estimate.is_zero, estimate.text(1, scale=100)) == (None, None, "500.0")


@pytest.mark.parametrize("seed", range(4))
def test_the_bootstrap_of_a_mean_is_students_interval(seed: int) -> None:
    values = np.random.default_rng(seed).normal(20, 5, 30)
    estimate, students = mean_of(values), Estimate.of(values.tolist())
    assert estimate.value == pytest.approx(students.value)
    assert estimate.count == 30
    assert estimate.ci95 == pytest.approx(students.ci95, rel=0.05)


@pytest.mark.parametrize("count", [10, 40])
@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_intervals_cover_the_mean_in_95_of_100_cases(count: int, kind: str) -> None:
    rng = np.random.default_rng(1)
    draw = rng.normal if kind == "normal" else rng.exponential
    truth = 0.0 if kind == "normal" else 1.0
    estimates = [mean_of(draw(size=count)) for _ in range(600)]
    covered = np.mean([abs(estimate.value - truth) <= width(estimate) for estimate in estimates])
    # Skewed data are covered less often, by Student's interval too (90 of 100 for ten samples).
    assert (0.93 if kind == "normal" else 0.88) <= covered <= 0.975


def test_intervals_cover_a_perplexity() -> None:
    """Documents of four windows; what they share is most of how they differ."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(300):
        documents = 2.0 + 0.3 * rng.normal(size=(20, 1)) + 0.05 * rng.normal(size=(20, 4))
        samples = [sample(7, str(i), nll=nll) for i, document in enumerate(documents) for nll in document]
        estimate = PERPLEXITY.estimate(samples)
        covered += abs(estimate.value - math.exp(2.0)) <= width(estimate)
    assert 0.91 <= covered / 300 <= 0.98


def test_samples_of_one_group_say_less_than_as_many_groups() -> None:
    """Four equal samples a group: as sure as one sample a group, half as sure as they look."""
    once = np.random.default_rng(3).normal(size=40)
    values, groups = np.repeat(once, 4), np.repeat(range(40), 4).tolist()
    clustered = mean_of(values, groups)
    assert clustered.count == 40
    assert width(clustered) == pytest.approx(width(mean_of(once)))
    assert width(clustered) == pytest.approx(2 * width(mean_of(values)), rel=0.1)
    # Where groups tell nothing, they cost nothing.
    loose = np.random.default_rng(4).normal(size=160)
    assert width(mean_of(loose, groups)) == pytest.approx(width(mean_of(loose)), rel=0.25)


def test_one_group_has_no_interval() -> None:
    assert mean_of([1.0, 2.0, 6.0], [0, 0, 0]) == Estimate(3.0, None, 1)


def test_intervals_are_the_same_every_time_and_do_not_depend_on_the_order_within_groups() -> None:
    values = np.random.default_rng(5).normal(size=12)
    groups = [i // 3 for i in range(12)]
    swapped = [1, 0, 2, *range(3, 12)]
    assert mean_of(values, groups) == mean_of(values, groups)
    assert width(mean_of(values[swapped], groups)) == pytest.approx(width(mean_of(values, groups)))


def test_a_difference_is_paired() -> None:
    """Both rows scatter by far more than they differ: only pairs show which is better."""
    gaps = np.random.default_rng(6).normal(1.5, 0.5, 20)
    ours = [10.0, 30.0, 50.0, 70.0] * 5
    gap = ROUGE.difference(rouges(ours), rouges((ours + gaps).tolist()))
    assert gap.value == pytest.approx(-gaps.mean())
    assert gap.ci95 == pytest.approx(width(Estimate.of(gaps.tolist())), rel=0.06)
    assert gap.is_zero is False
    assert width(ROUGE.estimate(rouges(ours))) > 8


def test_steps_weigh() -> None:
    samples = [sample(3, "a", kl=1.0), sample(1, "b", kl=5.0), sample(0, "c", rougeL=1.0)]
    assert PER_STEP.estimate(samples).value == pytest.approx(2.0)
    assert PER_STEP.estimate(samples).count == 2
    assert PER_STEP.counted(samples) == "4 tokens"
    assert ROUGE.counted(samples) == "1 answer"


@pytest.mark.parametrize("samples", [[], [sample(2, rougeL=1.0)], [sample(0, kl=1.0)]])
def test_nothing_to_average_is_an_error(samples: list[Sample]) -> None:
    with pytest.raises(PmpdError, match="no decode step"):
        PER_STEP.estimate(samples)
    with pytest.raises(PmpdError, match="no decode step"):
        PER_STEP.difference(samples, samples)


def test_perplexity_and_its_difference() -> None:
    ours = [sample(2, "a", nll=math.log(8.0)), sample(1, "b", nll=math.log(8.0))]
    theirs = [sample(2, "a", nll=math.log(4.0)), sample(1, "b", nll=math.log(4.0))]
    assert PERPLEXITY.estimate(ours) == Estimate(pytest.approx(8.0), pytest.approx(0.0), 2)
    assert PERPLEXITY.difference(ours, theirs).value == pytest.approx(4.0)
    # Windows that are hard for both tell nothing about the difference.
    hard = [sample(2, "a", nll=math.log(1000.0)), sample(1, "b", nll=math.log(2.0))]
    same = PERPLEXITY.difference(hard, hard)
    assert (same.value, same.ci95) == (pytest.approx(0.0), pytest.approx(0.0))
    assert PERPLEXITY.estimate(hard).value == pytest.approx(2_000_000 ** (1 / 3))


OURS = ["the cat sat on the mat today", "a dog ran over the green hill", "one two three four five six", "birds sing"]
# No four words in a row are right: without smoothing they score 0.
THEIRS = ["a cat sat near the red mat", "dogs ran over a hill at noon", "one two three for six", "the birds sing loud"]
REFERENCES = ["the cat sat on the red mat", "a dog ran over the hill at noon", "one two three four five", "birds sing"]


@pytest.mark.parametrize("name", ["sacrebleu", "bleu"])
def test_bleu_of_a_row_is_that_of_the_corpus(name: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    metric, scorer = TEXT_METRICS[name], TextScorer([name])
    smooth = "exp" if name == "sacrebleu" else "none"

    def answered(texts: Sequence[str]) -> list[Sample]:
        turns = [Turn(prompt_tokens=1, segments=((4, 1, text),)) for text in texts]
        samples = [
            Sample(group=str(i), reference=(reference,), turns=(turn,), scores={})
            for i, (turn, reference) in enumerate(zip(turns, REFERENCES, strict=True))
        ]
        return [scorer.scored(each) for each in samples]

    def corpus(texts: Sequence[str], references: Sequence[str] = REFERENCES) -> float:
        return float(sacrebleu.corpus_bleu(texts, [references], smooth_method=smooth).score)

    ours, theirs = answered(OURS), answered(THEIRS)
    assert metric.estimate(ours).value == pytest.approx(corpus(OURS))
    assert (corpus(THEIRS) > 0) is (name == "sacrebleu")
    gap = metric.difference(ours, theirs)
    assert gap.value == pytest.approx(corpus(OURS) - corpus(THEIRS))
    assert metric.difference(ours, ours) == Estimate(0.0, 0.0, 4)
    # Its spread is that of scores of corpora which are drawn from the segments.
    rng = np.random.default_rng(6)
    drawn = [rng.integers(0, 4, 4) for _ in range(400)]
    scores = [corpus([OURS[i] for i in some], [REFERENCES[i] for i in some]) for some in drawn]
    wide = np.quantile(np.abs(np.array(scores) - corpus(OURS)), 0.95)
    assert width(metric.estimate(ours)) == pytest.approx(3.182 / 1.96 * math.sqrt(4 / 3) * wide, rel=0.1)
    assert "nrefs:1" in scorer.describe([each.reference for each in ours])[name]


def test_a_sentence_without_a_long_match_counts_in_the_corpus() -> None:
    """Without smoothing one such sentence alone scores 0, and the corpus does not."""
    scorer = TextScorer(["bleu"])
    turn = Turn(prompt_tokens=1, segments=((4, 1, "birds sing"),))
    short = scorer.scored(Sample(reference=("birds sing",), turns=(turn,), scores={}))
    assert short.scores["bleu"] == 0
    assert short.counts["bleu"] == (2, 2, 2, 1, 0, 0, 2, 1, 0, 0)
