"""Answers under many schedules at once, and the samples that are kept of them, on the demo model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pmpd.eval.data.records import Template
from pmpd.eval.measure.examiner import BundleExaminer
from pmpd.eval.measure.forks import Forks
from pmpd.eval.measure.models import Scheduled
from pmpd.eval.measure.samples import Samples
from pmpd.eval.solve.grid import pairs, static_schedules, switch_points
from pmpd.eval.solve.search import _spent
from pmpd.eval.tasks.answers import Answers
from pmpd.eval.tasks.base import Item
from pmpd.runtime import AdaptiveSchedule, Bundle, Generator, RepeatSchedule, StaticSchedule, Tokenizer, parse_schedule

PROMPTS = ["Once upon a time, there was a little girl named Lily.", "Tom had a red ball. He"]
TOKENS = 9
BITS = (4, 3, 2)
HIGH = StaticSchedule(((4, 0),))
BAD = '{"item": "a", "samples": {"uniform:4": {"turns": [{"ids": 3}], "scores": {}, "scored_steps": 0}}}'


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def generator(bundle: Bundle) -> Generator:
    return Generator(bundle, context_length=64)


@pytest.fixture(scope="module")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.from_bundle(bundle)


def test_forks_are_the_answers_that_the_generator_gives(
    bundle: Bundle, generator: Generator, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(PROMPTS[0])
    schedules = [
        *static_schedules(BITS, switch_points(TOKENS - 1, 4)),
        *static_schedules((3, 2), (0, 3, TOKENS - 1), prefill=2),
        *pairs((3,), (3,)),
    ]
    forks = Forks(generator, max_new_tokens=TOKENS, stop_ids=bundle.stop_ids)
    found = dict(forks.answers(ids, schedules))
    assert set(found) == set(schedules)
    for schedule in schedules:
        alone = Scheduled(generator, schedule).generate(ids, max_new_tokens=TOKENS, stop_ids=bundle.stop_ids)
        assert found[schedule].ids == alone.ids, schedule
        assert found[schedule].precisions == alone.precisions, schedule
    # As many steps as there are different beginnings: prompts of 4, 3 and 2 bits apart.
    steps = [(s.prefill, *map(s.precision, range(TOKENS - 1))) for s in schedules]
    assert forks.steps == len({bits[:end] for bits in steps for end in range(2, len(bits) + 1)})


def test_an_answer_that_ends_is_not_gone_on_with(generator: Generator, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPTS[0])
    schedules = [parse_schedule(text, BITS) for text in ("4", "static:2@6", "static:2@1")]
    free = dict(Forks(generator, max_new_tokens=TOKENS, stop_ids=()).answers(ids, schedules))
    stop = free[schedules[0]].ids[4]
    assert stop not in free[schedules[0]].ids[:4]
    forks = Forks(generator, max_new_tokens=TOKENS, stop_ids=(stop,))
    ended = dict(forks.answers(ids, schedules))
    assert ended[schedules[0]].ids == ended[schedules[1]].ids == free[schedules[0]].ids[:4]
    assert ended[schedules[0]].precisions == (4,) * 4
    for schedule in schedules:
        alone = Scheduled(generator, schedule).generate(ids, max_new_tokens=TOKENS, stop_ids=(stop,))
        assert ended[schedule].ids == alone.ids


def test_an_answer_without_a_token(generator: Generator, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPTS[0])
    ((_, answer),) = Forks(generator, max_new_tokens=1, stop_ids=()).answers(ids, [HIGH])
    assert (len(answer.ids), answer.precisions) == (1, (4,))
    ((_, none),) = Forks(generator, max_new_tokens=5, stop_ids=answer.ids).answers(ids, [HIGH])
    assert (none.ids, none.precisions) == ((), ())


Opened = Callable[..., tuple[Samples, list[Generator]]]


@pytest.fixture
def opened(generator: Generator, tokenizer: Tokenizer, tmp_path: Path) -> Opened:
    """Open the same file again; the list has the generator as often as it was asked for."""
    task = Answers(
        tokenizer=tokenizer, stop_ids=(), max_new_tokens=TOKENS, context_length=64, template=Template("{text}")
    )

    def open_samples(
        *, references: tuple[str, ...] = (), prompts: Sequence[str] = PROMPTS
    ) -> tuple[Samples, list[Generator]]:
        made = list[Generator]()

        def load() -> Generator:
            made.append(generator)
            return generator

        items = [
            Item(source=f"x:{i}", prompt=text, ids=tuple(tokenizer.encode(text)), references=references)
            for i, text in enumerate(prompts)
        ]
        path = tmp_path / "kept" / "x.jsonl"
        return Samples(task, BundleExaminer(task, load), items, path=path, reference=HIGH), made

    return open_samples


def test_samples_are_measured_once(opened: Opened) -> None:
    first, _ = opened()
    low = StaticSchedule(((2, 0),))
    measured = first.of(1, [HIGH, low])
    assert first.steps == 2 * (TOKENS - 1)
    assert measured[HIGH].scores["rougeL"] == 100  # without references the reference's own answer is one
    assert measured[HIGH].output_tokens == TOKENS
    assert (measured[HIGH].passes, measured[low].passes) == ((4,) * (TOKENS - 1), (2,) * (TOKENS - 1))
    assert 0 < measured[low].scores["rougeL"] < 100
    assert (measured[low].source, measured[low].prompt) == ("x:1", PROMPTS[1])
    assert [sample.turns for sample in first.known(low)] == [measured[low].turns]
    again, made = opened()
    assert again.of(1, [low, HIGH]) == measured
    assert (made, again.steps) == ([], 0)
    assert again.known(HIGH)[0].turns == measured[HIGH].turns


def test_an_item_that_is_there_twice_is_measured_once(opened: Opened) -> None:
    samples, made = opened(prompts=[PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    by_index = dict(samples.of_each(range(3), [HIGH]))
    assert len(made) == 2
    assert by_index[0][HIGH].turns == by_index[2][HIGH].turns
    assert [by_index[i][HIGH].source for i in range(3)] == ["x:0", "x:1", "x:2"]


def test_what_is_known_comes_first(opened: Opened) -> None:
    opened()[0].of(1, [HIGH])
    assert [index for index, _ in opened()[0].of_each(range(2), [HIGH])] == [1, 0]


@pytest.mark.parametrize("order", [["low"], ["high", "low"], ["low", "high"]], ids=" then ".join)
def test_an_answer_is_compared_with_the_references_own_wherever_it_comes_from(opened: Opened, order: list[str]) -> None:
    schedules = {"high": HIGH, "low": StaticSchedule(((2, 0),))}
    together = opened()[0].of(0, schedules.values())
    opened()[0]._path.unlink()
    for name in order:  # each in a process of its own
        assert opened()[0].of(0, [schedules[name]]) == {schedules[name]: together[schedules[name]]}


def test_adaptive_schedules_have_samples_too(opened: Opened) -> None:
    first, _ = opened()
    adaptive = AdaptiveSchedule(2, 4, 1.0)
    sample = first.of(0, [adaptive, HIGH])[adaptive]
    assert first.steps == 2 * (TOKENS - 1)
    assert len(sample.passes) == TOKENS - 1
    assert set(sample.passes) == {2, 4}
    assert 0 < sample.scores["rougeL"] <= 100
    assert [known.turns for known in opened()[0].known(adaptive)] == [sample.turns]


def test_both_passes_of_a_step_are_kept(opened: Opened) -> None:
    always, never = RepeatSchedule(2, 4, 1e6), RepeatSchedule(2, 4, 1e-6)
    opened()[0].of(0, [always, never, HIGH])
    samples = opened()[0].of(0, [always, never, HIGH])
    assert sorted(samples[always].passes) == [2] * (TOKENS - 1) + [4] * (TOKENS - 1)
    assert samples[never].passes == (2,) * (TOKENS - 1)
    assert (samples[always].output_tokens, samples[always].output) == (TOKENS, samples[HIGH].output)
    assert _spent([samples[always]], {2: 2.0, 4: 4.0}) == 6
    assert _spent([samples[always], samples[never]], {2: 20.0, 4: 41.0}) == (61 + 20) / 2
    assert _spent([], {}) is None


def test_references_of_the_data_come_first(opened: Opened) -> None:
    samples, _ = opened(references=("a b c", "d e f"))
    sample = samples.of(0, [HIGH])[HIGH]
    assert sample.scores["rougeL"] < 100
    assert sample.reference == ("a b c", "d e f")
    # They are no part of what is kept: others are compared with without an answer.
    other, made = opened(references=(sample.output,))
    assert other.of(0, [HIGH])[HIGH].scores["rougeL"] == 100
    assert made == []


@pytest.mark.parametrize("left", [0, 1, 40, -1], ids=str)
def test_a_line_that_a_kill_cut_off_is_measured_again(opened: Opened, left: int) -> None:
    first, _ = opened()
    whole = first.of(0, [HIGH])
    file = first._path
    file.write_bytes(file.read_bytes()[:left])
    second, made = opened()
    assert second.of(0, [HIGH]) == whole
    assert len(made) == (left != -1)  # all but the new line is there
    second.of(1, [HIGH])
    third, made = opened()
    assert (third.of(0, [HIGH]), made) == (whole, [])
    assert len(third.known(HIGH)) == 2


@pytest.mark.parametrize("line", [BAD, "[]", "{}", '{"item": "a", "samples": {"uniform:4": 3}}', "\x00", "null"])
def test_lines_that_are_none_are_passed_over(opened: Opened, line: str) -> None:
    first, _ = opened()
    whole = first.of(0, [HIGH])
    file = first._path
    file.write_text(line + "\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    second, made = opened()
    assert (second.of(0, [HIGH]), made) == (whole, [])


def test_what_is_kept_is_plain(opened: Opened) -> None:
    samples, _ = opened(references=("a b c",))
    samples.of(0, [HIGH])
    (line,) = samples._path.read_text(encoding="utf-8").splitlines()
    document = json.loads(line)
    assert document["samples"].keys() == {"uniform:4"}
    assert document["samples"]["uniform:4"].keys() == {"turns", "scores", "scored_steps"}
    assert document["samples"]["uniform:4"]["scores"] == {}  # those of texts are computed anew
    assert PROMPTS[0] not in line
    assert "a b c" not in line
