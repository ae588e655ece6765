"""The search for a schedule without any model: its candidates, and which of them it finds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmpd.eval.solve.grid import mean_cost, pairs, static_schedules, switch_points
from pmpd.eval.solve.race import ENOUGH, ROUND, Race, Tolerance, best_of, cheapest
from pmpd.runtime import PmpdError

NOTHING = Tolerance(0.0, relative=False)


@pytest.mark.parametrize(
    ("steps", "count", "points"), [(30, 4, (0, 10, 20, 30)), (32, 2, (0, 32)), (2, 4, (0, 1, 2)), (0, 4, (0,))]
)
def test_switch_points_are_even(steps: int, count: int, points: tuple[int, ...]) -> None:
    assert switch_points(steps, count) == points


def test_one_switch_point_is_none() -> None:
    with pytest.raises(PmpdError, match="switch points must be 2 or more"):
        switch_points(10, 1)


@given(st.integers(1, 4), st.integers(0, 6), st.integers(2, 5))
def test_the_grid_has_every_schedule_of_the_paper_once(count: int, steps: int, points: int) -> None:
    precisions, allowed = (5, 4, 3.25, 2)[:count], switch_points(steps, points)
    found = [tuple(map(s.precision, range(steps))) for s in static_schedules(precisions, allowed)]
    # By brute force: all sequences that never rise, and change at switch points only.
    every = [
        bits
        for bits in product(precisions, repeat=steps)
        if all(a >= b for a, b in pairwise(bits))
        and all(bits[i - 1] == bits[i] or i in allowed for i in range(1, steps))
    ]
    assert sorted(found) == sorted(every)


def test_pairs_are_all_of_them() -> None:
    texts = [str(pair) for pair in pairs((4, 3), (3, None))]
    assert texts == ["prefill:3,uniform:4", "uniform:4", "prefill:3,uniform:3", "uniform:3"]


def test_the_cost_is_the_mean_over_steps() -> None:
    (schedule,) = [s for s in static_schedules((4, 2), (0, 3, 12)) if len(s.switches) == 2]
    assert mean_cost(schedule, {4: 4.0, 2: 2.0}, 12) == pytest.approx((3 * 4 + 9 * 2) / 12)
    assert mean_cost(schedule, {4: 4.0, 2: 2.0}, 0) == 4.0


@pytest.mark.parametrize(
    ("text", "reference", "allowed"), [("0.5", 20, 0.5), ("1%", 20, 0.2), (" 0 ", 20, 0), (".5%", 200, 1)]
)
def test_tolerances(text: str, reference: float, allowed: float) -> None:
    assert Tolerance.parse(text).allows(reference) == pytest.approx(allowed)
    assert Tolerance.parse(str(Tolerance.parse(text))) == Tolerance.parse(text)


@pytest.mark.parametrize("text", ["", "-1", "1 %", "one", "nan", "1e3", "%"])
def test_a_tolerance_that_is_none(text: str) -> None:
    with pytest.raises(PmpdError, match="give a number in units of the metric, or a share such as 1%"):
        Tolerance.parse(text)


class Samples:
    """Scores that are known beforehand, and a count of how many were asked for."""

    def __init__(self, scores: dict[str, Sequence[float]]) -> None:
        self.scores = scores
        self.asked = dict.fromkeys(scores, 0)

    def __call__(self, part: range, schedules: Sequence[str]) -> dict[str, list[float]]:
        for schedule in schedules:
            assert self.asked[schedule] == part.start, "a candidate that was left out is not asked again"
            self.asked[schedule] = part.stop
        return {schedule: list(self.scores[schedule][part.start : part.stop]) for schedule in schedules}


def race(
    scores: dict[str, Sequence[float]], candidates: Sequence[str], tolerance: Tolerance = NOTHING, *, early: bool = True
) -> tuple[Race[str], dict[str, int]]:
    samples = Samples(scores)
    count = len(scores["high"])
    return cheapest(candidates, "high", samples, samples=count, tolerance=tolerance, early=early), samples.asked


@given(
    st.integers(1, 20).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1, max_size=6)
    ),
    st.integers(0, 2),
)
def test_without_early_ends_it_is_brute_force(scores: list[list[int]], allowed: int) -> None:
    named = {("high" if i == 0 else f"s{i}"): list(map(float, values)) for i, values in enumerate(scores)}
    found, _ = race(named, list(named), Tolerance(float(allowed), relative=False), early=False)
    good = [
        name
        for name, values in named.items()
        if name != "high" and sum(values) >= sum(named["high"]) - allowed * len(values) - 1e-9
    ]
    assert found.best == (good[0] if good else "high")


def test_what_is_surely_worse_is_asked_one_round() -> None:
    rng = np.random.default_rng(0)
    high = rng.normal(20, 5, 100)
    scores = {"high": high, "bad": high - 10 + rng.normal(0, 1, 100), "good": high + rng.normal(0.5, 1, 100)}
    found, asked = race(scores, ["bad", "good"], Tolerance(0.01, relative=True))
    assert found.best == "good"
    assert asked == {"high": 100, "bad": ROUND, "good": 100}
    bad, good = found.contestants
    assert (bad.keeps, good.keeps) == (False, True)
    assert len(bad.scores) == ROUND
    assert bad.difference.value == pytest.approx(-10, abs=1)


def test_what_costs_more_than_a_sure_one_is_left_out() -> None:
    rng = np.random.default_rng(0)
    high = rng.normal(20, 5, 100)
    scores = {"high": high, "cheap": high + rng.normal(2, 1, 100), "dear": high + 5}
    found, asked = race(scores, ["cheap", "dear"])
    assert found.best == "cheap"
    assert asked == {"high": 100, "cheap": 100, "dear": ENOUGH}


def test_equal_answers_are_sure_of_nothing_before_there_are_enough() -> None:
    scores = {"high": [1.0] * 40, "same": [1.0] * 39 + [0.0], "dear": [1.0] * 40}
    found, asked = race(scores, ["same", "dear"])
    assert asked["dear"] == 40  # a margin of 0 is never surely above it
    assert found.best == "dear"


@given(st.integers(0, 1000))
def test_early_ends_find_the_same_where_differences_are_clear(seed: int) -> None:
    rng = np.random.default_rng(seed)
    high = rng.normal(30, 8, 64)
    drops = {"a": 6.0, "b": 3.0, "c": -1.0, "d": -1.5}
    scores = {"high": high} | {name: high - drop + rng.normal(0, 1.5, 64) for name, drop in drops.items()}
    assert race(scores, list(drops))[0].best == race(scores, list(drops), early=False)[0].best == "c"


def test_nothing_that_is_good_enough() -> None:
    found, _ = race({"high": [2.0] * 9, "low": [1.0] * 9}, ["low", "high"])
    assert found.best == "high"
    assert [c.keeps for c in found.contestants] == [False, True]


def test_a_brief_race_ends_with_its_last_candidate() -> None:
    scores = {"high": [2.0 + i % 2 for i in range(40)], "low": [1.0] * 40}
    for brief, count in ((True, ROUND), (False, 40)):
        samples = Samples(dict(scores))
        ended = cheapest(["low", "high"], "high", samples, samples=40, tolerance=NOTHING, brief=brief)
        assert ended.best == "high"
        assert (len(ended.reference), samples.asked) == (count, {"high": count, "low": ROUND})


def test_a_single_sample_is_no_reason_to_leave() -> None:
    found, _ = race({"high": [2.0], "low": [1.0]}, ["low"], Tolerance(1.0, relative=False))
    assert found.best == "low"


def test_the_best_and_of_equal_ones_the_cheapest() -> None:
    samples = Samples({"high": [3.0] * 10, "a": [1.0] * 10, "b": [2.0] * 10, "c": [2.0] * 10})
    found = best_of(["a", "b", "c"], "high", samples, samples=10)
    assert found.best == "b"
    assert set(samples.asked.values()) == {10}
