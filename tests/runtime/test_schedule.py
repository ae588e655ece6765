"""Static schedules: reading, Eq. 3, and which precision each step gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmpd.runtime import AdaptivePlan, Plan, PmpdError, Prefill, StaticSchedule, parse_schedule
from pmpd.runtime.schedule.static import step_precisions


@st.composite
def schedules(draw: st.DrawFn) -> StaticSchedule:
    bits = sorted(draw(st.sets(st.integers(1, 8), min_size=1)), reverse=True)
    starts = [0, *sorted(draw(st.lists(st.integers(0, 50), min_size=len(bits) - 1, max_size=len(bits) - 1)))]
    prefill = draw(st.none() | st.sampled_from(bits))
    return StaticSchedule(tuple(zip(bits, starts, strict=True)), prefill)


@given(schedules())
def test_text_and_back(schedule: StaticSchedule) -> None:
    assert parse_schedule(str(schedule), range(1, 9)) == schedule


@given(schedules())
def test_precision_never_rises_and_changes_at_the_starts(schedule: StaticSchedule) -> None:
    steps = [schedule.precision(step) for step in range(60)]
    assert steps == sorted(steps, reverse=True)
    assert set(steps) <= set(schedule.precisions)
    assert steps[-1] == schedule.precisions[-1]
    for step, precision in enumerate(steps):
        assert precision == min(p for p, start in schedule.switches if start <= step)


def test_steps_of_an_example() -> None:
    schedule = parse_schedule("static:3@2,2@3", (4, 3, 2))
    assert schedule.switches == ((4, 0), (3, 2), (2, 3))  # the highest precision starts unless told otherwise
    assert [schedule.precision(step) for step in range(5)] == [4, 4, 3, 2, 2]
    assert str(schedule) == "static:4@0,3@2,2@3"


def test_uniform_is_one_precision() -> None:
    schedule = parse_schedule(" uniform:3 ", (4, 3, 2))
    assert schedule.precisions == (3,)
    assert [schedule.precision(step) for step in (0, 1, 1000)] == [3, 3, 3]
    assert str(schedule) == "uniform:3"


def test_a_number_alone_is_uniform() -> None:
    assert parse_schedule(" 3 ", (4, 3, 2)) == parse_schedule("uniform:3", (4, 3, 2))
    assert parse_schedule("static:3@0", (4, 3, 2)) == parse_schedule("3", (4, 3, 2))


def test_a_mix_is_named_by_its_number() -> None:
    schedule = parse_schedule("static:3.25@2,3@4", (4, 3.25, 3))
    assert str(schedule) == "static:4@0,3.25@2,3@4"
    assert step_precisions(schedule, 5) == (4, 4, 3.25, 3.25, 3)
    assert str(parse_schedule("3.50", (4, 3.5))) == "uniform:3.5"
    assert str(parse_schedule("4.0", (4, 3.5))) == "uniform:4"


def test_a_static_schedule_is_its_own_plan() -> None:
    schedule = StaticSchedule(((4, 0), (2, 3)))
    assert schedule.begin(None) is schedule
    assert not isinstance(schedule, AdaptivePlan)
    assert step_precisions(schedule, 5) == (4, 4, 4, 2, 2)


def test_callers_without_a_prompt_take_static_schedules_only() -> None:
    class ByPrompt:
        precisions = (4, 2)
        prefill = None

        def begin(self, prefill: Prefill) -> Plan:
            return StaticSchedule(((4, 0),))

        def __str__(self) -> str:
            return "learned:a"

    with pytest.raises(PmpdError, match="schedule learned:a decides by the prompt, and here is none"):
        step_precisions(ByPrompt(), 5)


def test_the_prompt_may_have_a_precision_of_its_own() -> None:
    schedule = parse_schedule("prefill:2, static:3@5", (4, 3, 2))
    assert schedule == StaticSchedule(((4, 0), (3, 5)), 2)
    assert str(schedule) == "prefill:2,static:4@0,3@5"
    assert parse_schedule("prefill:2,3", (4, 3, 2)) == StaticSchedule(((3, 0),), 2)
    assert parse_schedule("3", (4, 3, 2)).prefill is None


def test_callers_without_a_prompt_take_no_precision_for_it() -> None:
    with pytest.raises(PmpdError, match=r"^schedule prefill:2,uniform:3: prompts run at .*: leave out prefill:2$"):
        step_precisions(StaticSchedule(((3, 0),), 2), 5)


def test_explicit_start_replaces_the_highest_precision() -> None:
    assert parse_schedule("static:3@0,2@5", (4, 3, 2)).switches == ((3, 0), (2, 5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("static:3@5,4@9", "must fall, never rise"),
        ("static:4@5", "never rise or repeat"),
        ("static:3@5,3@9", "never rise or repeat"),
        ("static:3@9,2@5", "cannot start before"),
        ("uniform:5", "unknown precision '5': choose one of 4, 3, 2"),
        ("static:3@2,1@4", "unknown precision '1'"),
        ("uniform", "'' does not fit the form uniform:BITS"),
        ("uniform:", "does not fit the form uniform:BITS"),
        ("uniform:4,3", "'4,3' does not fit"),
        ("uniform:four", "'four' does not fit"),
        ("static:", "'' does not fit the form static:BITS@STEP"),
        ("static:3", "'3' does not fit"),
        ("static:3@-1", "'3@-1' does not fit"),
        ("static:3@2,", "'' does not fit"),
        ("static:3@2;2@4", "does not fit"),
        ("", "unknown schedule ''"),
        ("unifrom:4", "unknown schedule 'unifrom:4': choose one of uniform:4"),
        ("uniform:４", "schedule 'uniform:４': '４' does not fit the form uniform:BITS"),
        ("４", "unknown schedule '４'"),
        ("static:3@２", "'3@２' does not fit the form"),
        ("prefill:3", "does not fit the form prefill:BITS,SCHEDULE, as in prefill:3,uniform:3"),
        ("prefill:,uniform:3", "does not fit the form prefill:BITS,SCHEDULE"),
        ("prefill:5,uniform:3", "unknown precision '5': choose one of 4, 3, 2"),
        ("prefill:3,prefill:3,uniform:3", "unknown schedule"),
        ("prefill:3,static:3@5,4@9", "must fall, never rise"),
        ("4.", "'4.' does not fit the form uniform:BITS"),
        ("uniform:3.125", "does not fit the form"),
        ("3.25", "unknown precision '3.25': choose one of"),
        ("5", "schedule '5': unknown precision '5': choose one of 4, 3, 2"),
        ("static:4@8", "schedule 'static:4@8': precisions must fall"),
        ("static:4@8", "step 0 starts at 4 bits, the highest, as no precision is given for it"),
        ("uniform:" + "9" * 5000, "does not fit the form"),
        ("9" * 5000, "does not fit the form"),
    ],
)
def test_bad_text_gets_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(PmpdError) as caught:
        parse_schedule(text, (4, 3, 2))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("switches", [(), ((4, 1),), ((4, 0), (4, 3)), ((3, 0), (4, 3)), ((4, 0), (3, 5), (2, 4))])
def test_switches_are_checked_at_construction(switches: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(PmpdError, match="schedule"):
        StaticSchedule(switches)


@given(st.text(max_size=30))
def test_any_text_is_a_schedule_or_a_clear_error(text: str) -> None:
    for candidate in (text, f"static:{text}", f"uniform:{text}"):
        try:
            schedule = parse_schedule(candidate, (4, 3, 2))
        except PmpdError:
            continue
        assert set(schedule.precisions) <= {4, 3, 2}
