"""Adaptive schedules: when a step gets more bits, how they are written, and what a stream makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pmpd.runtime import AdaptivePlan, AdaptiveSchedule, Bundle, Generator, PmpdError, Prefill, parse_schedule
from pmpd.runtime.decode import stream

BITS = (4, 3, 2)


def begin(schedule: AdaptiveSchedule, logits: np.ndarray) -> AdaptivePlan:
    return schedule.begin(Prefill(tokens=(1,), logits=logits, kv=None))  # type: ignore[arg-type]


@given(arrays(np.float32, st.integers(2, 9), elements=st.integers(-3, 3).map(float)), st.sampled_from([0.5, 1.0, 2.5]))
def test_the_step_after_two_likely_tokens_is_high(logits: np.ndarray, threshold: float) -> None:
    plan = begin(AdaptiveSchedule(2, 4, threshold), logits)
    second, best = np.sort(logits)[-2:]
    assert plan.precision(0) == (4 if best - second < threshold else 2)
    plan.observe(0, np.array([0, 9], np.float32))
    assert plan.precision(1) == 2
    plan.observe(1, logits)
    assert plan.precision(2) == (4 if best - second < threshold else 2)


def test_a_vocabulary_of_one_is_sure() -> None:
    assert begin(AdaptiveSchedule(2, 4, 1.0), np.zeros(1, np.float32)).precision(0) == 2


@pytest.mark.parametrize("text", ["adaptive:3,4@0.5", "adaptive:2,3@12", "prefill:3,adaptive:2,4@1.25"])
def test_text_and_back(text: str) -> None:
    schedule = parse_schedule(text, BITS)
    assert str(schedule) == text
    assert parse_schedule(str(schedule), BITS) == schedule
    assert isinstance(schedule.begin(Prefill(tokens=(1,), logits=np.zeros(3, np.float32), kv=None)), AdaptivePlan)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaptive:3,4", "'3,4' does not fit the form adaptive:LOW,HIGH@NATS"),
        ("adaptive:4,3@1", "the first precision must be below the second, got 4 and 3"),
        ("adaptive:3,4@0", "the threshold must be a number of nats above 0, got 0.0"),
        ("adaptive:3,5@1", "unknown precision '5': choose one of 4, 3, 2"),
        ("adaptive:3,4@-1", "does not fit"),
        ("adaptive:3,4@nan", "does not fit"),
    ],
)
def test_bad_text_gets_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(PmpdError) as caught:
        parse_schedule(text, BITS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def generator(demo_bundle: Path) -> Generator:
    return Generator(Bundle.open(demo_bundle), context_length=64)


def test_a_stream_decides_step_by_step(generator: Generator) -> None:
    schedule = AdaptiveSchedule(2, 4, 1.0)
    tokens = list(generator.stream([1, 5, 9], max_new_tokens=24, schedule=schedule, stop_ids=()))
    generator.reset()
    logits, bits, ids = generator.prefill([1, 5, 9]), [4], []
    for step in range(24):
        ids.append(int(logits.argmax()))
        second, best = np.sort(logits)[-2:]
        bits.append(4 if best - second < 1.0 else 2)
        if step < 23:
            logits = generator.decode_step(ids[-1], precision=bits[-1])
    assert [token.id for token in tokens] == ids
    assert [token.precision for token in tokens] == bits[:24]
    assert {2, 4} == set(bits[1:24])


class AnyLogit:
    """Its plan does not say how far it looks."""

    precisions = (4,)
    prefill = None

    def begin(self, prefill: Prefill) -> AnyLogit:
        return self

    def precision(self, step: int) -> int:
        return 4

    def observe(self, step: int, logits: np.ndarray) -> None:
        assert logits.shape == (4096,)


def test_logits_are_exact_as_far_as_the_plan_looks(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    margins = []
    step = stream.Sequence.step

    def seen(self: object, token: int, *, precision: float, margin: float) -> np.ndarray:
        margins.append(margin)
        return step(self, token, precision=precision, margin=margin)  # type: ignore[arg-type]

    monkeypatch.setattr(stream.Sequence, "step", seen)
    list(generator.stream([1, 5], max_new_tokens=3, schedule="adaptive:2,4@1.5", stop_ids=()))
    list(generator.stream([1, 5], max_new_tokens=3, schedule="uniform:4", stop_ids=()))
    list(generator.stream([1, 5], max_new_tokens=3, schedule=AnyLogit(), stop_ids=()))
    assert margins == [1.5, 1.5, 0, 0, np.inf, np.inf]
