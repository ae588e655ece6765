"""Repeat schedules: which steps run twice, how they are written, and what a stream makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pmpd.runtime import AdaptivePlan, Bundle, Generator, PmpdError, Prefill, RepeatSchedule, Sampling, parse_schedule
from pmpd.runtime.cli import main
from pmpd.runtime.decode import stream

BITS = (4, 3, 2)
PROMPT = [1, 5, 9]


@pytest.fixture(scope="module")
def generator(demo_bundle: Path) -> Iterator[Generator]:
    with Generator(Bundle.open(demo_bundle), context_length=64) as opened:
        yield opened


def begin(schedule: RepeatSchedule, logits: np.ndarray) -> AdaptivePlan:
    return schedule.begin(Prefill(tokens=(1,), logits=logits, kv=None))  # type: ignore[arg-type]


@given(arrays(np.float32, st.integers(2, 9), elements=st.integers(-3, 3).map(float)), st.sampled_from([0.5, 1.0, 2.5]))
def test_a_step_with_two_likely_tokens_is_run_again(logits: np.ndarray, threshold: float) -> None:
    plan = begin(RepeatSchedule(2, 4, threshold), logits)
    second, best = np.sort(logits)[-2:]
    assert plan.precision(0) == 2
    assert plan.observe(0, logits) == (4 if best - second < threshold else None)
    assert plan.precision(1) == 2


@pytest.mark.parametrize("text", ["repeat:3,4@0.5", "repeat:2,3@12", "prefill:3,repeat:2,4@1.25"])
def test_text_and_back(text: str) -> None:
    schedule = parse_schedule(text, BITS)
    assert isinstance(schedule, RepeatSchedule)
    assert str(schedule) == text
    assert parse_schedule(str(schedule), BITS) == schedule
    assert parse_schedule(text.replace("repeat", "adaptive"), BITS) != schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("repeat:3,4", "'3,4' does not fit the form repeat:LOW,HIGH@NATS"),
        ("repeat:4,3@1", "the first precision must be below the second, got 4 and 3"),
        ("repeat:4,4@1", "the first precision must be below the second, got 4 and 4"),
        ("repeat:3,4@0", "the threshold must be a number of nats above 0, got 0.0"),
        ("repeat:3,5@1", "unknown precision '5': choose one of 4, 3, 2"),
        ("repeat:3,4@1,2", "does not fit"),
        ("repeats:3,4@1", "unknown schedule"),
    ],
)
def test_bad_text_gets_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(PmpdError) as caught:
        parse_schedule(text, BITS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def keys_and_values(generator: Generator) -> list[np.ndarray]:
    view = generator.cache.view()
    return [np.array(part(layer)) for layer in range(view.layers) for part in (view.keys, view.values)]


@pytest.mark.parametrize(("low", "high"), [(2, 4), (3, 4), (2, 3)])
@pytest.mark.parametrize("prefill", ["", "prefill:3,"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_threshold_beyond_all_gaps_is_the_high_precision_throughout(
    generator: Generator, low: int, high: int, prefill: str, temperature: float
) -> None:
    answers = []
    for schedule in (f"{prefill}repeat:{low},{high}@999999", f"{prefill}uniform:{high}"):
        sampling = Sampling(temperature=temperature, seed=7)
        trace = generator.generate(PROMPT, max_new_tokens=12, schedule=schedule, sampling=sampling, stop_ids=())
        answers.append(([(token.id, token.precision) for token in trace.tokens], keys_and_values(generator), trace))
    (repeated, ours, trace), (uniform, theirs, _) = answers
    assert repeated == uniform
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert [token.passes for token in trace.tokens[1:]] == [(low, high)] * 11
    assert trace.average_bits == low + high


@pytest.mark.parametrize("low", [2, 3])
def test_a_threshold_below_all_gaps_is_the_low_precision_throughout(generator: Generator, low: int) -> None:
    repeated = generator.generate(PROMPT, max_new_tokens=12, schedule=f"repeat:{low},4@0.000001", stop_ids=())
    uniform = generator.generate(PROMPT, max_new_tokens=12, schedule=f"uniform:{low}", stop_ids=())
    assert [(t.id, t.passes) for t in repeated.tokens] == [(t.id, t.passes) for t in uniform.tokens]
    assert repeated.average_bits == low


def test_a_stream_decides_step_by_step(generator: Generator) -> None:
    tokens = list(generator.stream(PROMPT, max_new_tokens=24, schedule="repeat:2,4@1", stop_ids=()))
    generator.reset()
    ids, passes = [int(generator.prefill(PROMPT).argmax())], [(4,)]
    for _ in range(23):
        logits = generator.decode_step(ids[-1], precision=2)
        second, best = np.sort(logits)[-2:]
        passes.append((2,))
        if best - second < 1:
            generator.sequence.truncate(len(generator.tokens) - 1)
            logits = generator.decode_step(ids[-1], precision=4)
            passes[-1] = (2, 4)
        ids.append(int(logits.argmax()))
    assert [token.id for token in tokens] == ids
    assert [token.passes for token in tokens] == passes
    assert [token.precision for token in tokens] == [bits[-1] for bits in passes]
    assert {(2,), (2, 4)} == set(passes[1:])
    assert generator.trace.average_bits == sum(map(sum, passes[1:])) / 23
    assert generator.trace.tokens == tokens


class AlwaysAgain:
    """Asks for every step again, whatever it gave."""

    precisions = (4, 2)
    prefill = None

    def __init__(self, repeat_at: float = 4) -> None:
        self.repeat_at = repeat_at
        self.seen = list[tuple[int, int]]()

    def begin(self, prefill: Prefill) -> AlwaysAgain:
        return self

    def precision(self, step: int) -> float:
        return 2

    def observe(self, step: int, logits: np.ndarray) -> float:
        self.seen.append((step, int(logits.argmax())))
        return self.repeat_at


def test_a_step_runs_twice_at_most_and_the_plan_sees_its_first_pass(generator: Generator) -> None:
    schedule = AlwaysAgain()
    tokens = list(generator.stream(PROMPT, max_new_tokens=6, schedule=schedule, stop_ids=()))
    assert [token.passes for token in tokens] == [(4,), *[(2, 4)] * 5]
    generator.reset()
    generator.prefill(PROMPT)
    first_passes = []
    for token in tokens[:5]:
        first_passes.append(int(generator.decode_step(token.id, precision=2).argmax()))
        generator.sequence.truncate(len(generator.tokens) - 1)
        generator.decode_step(token.id, precision=4)
    assert schedule.seen == list(enumerate(first_passes))


def test_a_second_pass_at_a_precision_that_is_not_loaded(generator: Generator) -> None:
    with pytest.raises(PmpdError, match="unknown precision '7'"):
        list(generator.stream(PROMPT, max_new_tokens=6, schedule=AlwaysAgain(7), stop_ids=()))
    assert generator.cache.length == int(generator.cache.mask.sum()) == len(generator.tokens) == len(PROMPT)


def test_the_second_pass_is_as_exact_as_the_sampler_needs(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    margins = []
    step = stream.Sequence.step

    def watched(self: object, token: int, *, precision: float, margin: float) -> np.ndarray:
        margins.append((precision, margin))
        return step(self, token, precision=precision, margin=margin)  # type: ignore[arg-type]

    monkeypatch.setattr(stream.Sequence, "step", watched)
    list(generator.stream(PROMPT, max_new_tokens=2, schedule="repeat:2,4@99", stop_ids=()))
    assert margins == [(2, 99.0), (4, 0.0)]


@pytest.mark.parametrize("interrupted", ["observe", "before truncation", "after truncation", "second pass"])
def test_an_interrupt_between_the_passes_leaves_cache_and_tokens_alike(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    want = generator.generate(PROMPT, max_new_tokens=8, schedule="uniform:4", stop_ids=())
    kept = [token.id for token in want.tokens[:3]]

    truncate = generator.sequence.cache.truncate

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def truncate_and_interrupt(length: int) -> None:
        truncate(length)
        raise KeyboardInterrupt

    schedule = parse_schedule("repeat:2,4@999", BITS)
    tokens = generator.stream(PROMPT, max_new_tokens=8, schedule=schedule, stop_ids=())
    assert [next(tokens).id for _ in range(3)] == kept
    with monkeypatch.context() as patch:
        if interrupted == "observe":
            patch.setattr("pmpd.runtime.schedule.adaptive.RepeatPrecision.observe", interrupt)
        elif interrupted == "before truncation":
            patch.setattr(generator.sequence.cache, "truncate", interrupt)
        elif interrupted == "after truncation":
            patch.setattr(generator.sequence.cache, "truncate", truncate_and_interrupt)
        else:
            patch.setattr(generator.sequence._decode[4], "_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(tokens)
    assert [token.id for token in generator.trace.tokens] == kept
    assert generator.cache.length == int(generator.cache.mask.sum())
    # An interrupted truncation leaves more in the cache than in `tokens`, never less: what is kept is what was said.
    assert len(generator.tokens) <= generator.cache.length
    assert generator.tokens == [*PROMPT, *kept][: len(generator.tokens)]
    rest = generator.generate(
        [*PROMPT, *kept[:2]], max_new_tokens=6, schedule="uniform:4", stop_ids=(), keep_cache=True
    )
    assert rest.reused_tokens == len(PROMPT) + 1
    assert [token.id for token in rest.tokens] == [token.id for token in want.tokens[2:]]


def test_a_changed_conversation_ends_the_stream(generator: Generator) -> None:
    tokens = generator.stream(PROMPT, max_new_tokens=8, schedule="repeat:2,4@999", stop_ids=())
    next(tokens)
    next(tokens)
    generator.sequence.truncate(2)
    with pytest.raises(PmpdError, match="the conversation changed between two tokens"):
        next(tokens)


def test_a_cache_with_steps_that_ran_twice_is_kept(generator: Generator) -> None:
    want = generator.generate(PROMPT, max_new_tokens=9, schedule="repeat:2,4@999", stop_ids=())
    ids = [token.id for token in want.tokens]
    generator.generate(PROMPT, max_new_tokens=5, schedule="repeat:2,4@999", stop_ids=())
    assert generator.tokens == [*PROMPT, *ids[:4]]
    rest = generator.generate(
        [*PROMPT, *ids[:4]], max_new_tokens=5, schedule="repeat:2,4@999", stop_ids=(), keep_cache=True
    )
    assert rest.reused_tokens == len(PROMPT) + 3
    assert [token.id for token in rest.tokens] == ids[4:]


def test_a_full_cache_has_room_for_second_passes(demo_bundle: Path) -> None:
    with Generator(Bundle.open(demo_bundle), context_length=8) as small:
        trace = small.generate(PROMPT, schedule="repeat:2,4@999", stop_ids=())
        assert len(trace.tokens) == 6
        assert trace.finish_reason == "length"
        assert small.cache.length == 8


def test_second_passes_are_in_the_statistics_and_the_json(demo_bundle: Path) -> None:
    options = ["-p", "Once upon a time,", "-n", "4", "--schedule", "repeat:2,4@9999", "--json", "-"]
    result = CliRunner().invoke(main, [str(demo_bundle), *options], prog_name="pmpd-run")
    assert result.exit_code == 0, result.stderr
    assert "average 6.00 bits with 3 steps run twice, ended at" in result.stderr
    tokens = json.loads(result.stdout)["tokens"]
    assert [(token["precision"], token["first_pass"]) for token in tokens] == [(4, None), *[(4, 2)] * 3]
