"""Traces: what Perfetto's reader of Chrome's format needs, tracks without overlap, and the simulation's own times."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpd.exporter import ExportConfig, export_skeleton
from pmpd.npu_backend import Generation, Hardware, Model, generate, read_hardware
from pmpd.npu_backend.study.trace import TRACKS, trace
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.schedule.registry import parse_schedule

NPU = read_hardware("npu-4k")
PROMPT, TOKENS = 40, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    output = tmp_path_factory.mktemp("npu") / "demo"
    export_skeleton(ExportConfig(model="demo", output=output, precisions=(4, 2), context_length=96))
    return Model.open(output)


def generation_of(model: Model, hardware: Hardware) -> Generation:
    return generate(model, hardware, prompt=PROMPT, tokens=TOKENS, schedule=parse_schedule("static:2@6", (4, 2)))


def by_track(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    tracks = defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] == "X":
            tracks[TRACKS[event["tid"]]].append(event)
    return {track: sorted(events, key=lambda event: (event["ts"], event["dur"])) for track, events in tracks.items()}


def nanoseconds(event: dict[str, Any]) -> tuple[int, int]:
    """Begin and end. Times are microseconds in the file; a reader counts in whole nanoseconds."""
    return round(event["ts"] * 1000), round(event["ts"] * 1000) + round(event["dur"] * 1000)


def test_format(model: Model) -> None:
    document = json.loads(json.dumps(trace(generation_of(model, NPU), model, NPU), allow_nan=False))
    about = [event for event in document["traceEvents"] if event["ph"] == "M"]
    names = {event["tid"]: event["args"]["name"] for event in about if event["name"] == "thread_name"}
    assert names == dict(enumerate(TRACKS))
    (process,) = (event for event in about if event["name"] == "process_name")
    assert process["args"]["name"] == f"{model.name} on npu-4k"
    for event in document["traceEvents"]:
        assert event["ph"] in "MX"
        assert event["pid"] == process["pid"]
        assert isinstance(event["args"], dict)
        if event["ph"] == "X":
            assert event["name"]
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            assert event["tid"] in names
            assert {"precision_bits", "tokens", "past_tokens"} <= event["args"].keys()


@given(
    bandwidth=st.floats(0.1, 1000), stream_kib=st.integers(4, 512), units=st.integers(1, 64), sync=st.integers(0, 1000)
)
@settings(max_examples=15)
def test_units_do_one_thing_at_a_time_until_the_end(
    model: Model, bandwidth: float, stream_kib: int, units: int, sync: int
) -> None:
    hardware = NPU.varied(
        memory__bandwidth_gb_s=bandwidth,
        buffers__stream_kib=float(stream_kib),
        matrix_unit__mv_outputs=float(units),
        controller__sync_cycles=float(sync),
    )
    generation = generation_of(model, hardware)
    tracks = by_track(trace(generation, model, hardware, steps=range(TOKENS - 1)))
    for track in TRACKS if sync else TRACKS[:-1]:
        spans = [nanoseconds(event) for event in tracks[track]]
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), track
    # Nor do the units that compute, all of which wait for each other.
    computing = sorted(nanoseconds(event) for track in TRACKS[2:] for event in tracks.get(track, []))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(computing))
    phases = [nanoseconds(event) for event in tracks["phases"]]
    assert len(phases) == TOKENS
    seconds = [generation.prefill_seconds, *generation.steps]
    for (begin, end), expected in zip(phases, seconds, strict=True):
        assert end - begin == pytest.approx(expected * 1e9, abs=1.1)
        # Each phase is looked into, and something ends with it.
        inside = [nanoseconds(event) for track in TRACKS[1:] for event in tracks.get(track, [])]
        ends = [last for first, last in inside if begin <= first < end]
        assert abs(max(ends) - end) <= 1
    assert phases[-1][1] == pytest.approx((generation.prefill_seconds + generation.decode_seconds) * 1e9, abs=1.1)


def test_units_are_busy_for_as_long_as_they_need(model: Model) -> None:
    generation = generation_of(model, NPU)
    events = by_track(trace(generation, model, NPU, steps=[0]))
    costs = [time.cost for time in generation.decode[4].operators]
    for track, unit in ("memory", "memory"), ("matrix unit", "matrix"), ("special function unit", "special"):
        busy = sum(event["args"]["busy_us"] for event in events[track] if event["args"].get("step") == 0)
        assert busy == pytest.approx(1e6 * float(sum(getattr(cost, unit) for cost in costs).max()))
        assert all(event["dur"] >= event["args"]["busy_us"] - 0.002 for event in events[track])
    loaded = sum(event["args"]["bytes"] for event in events["memory"] if event["args"].get("step") == 0)
    program = generation.decode[4].program
    assert loaded == program.nbytes().ravel()[0]  # type: ignore[union-attr]


def test_a_product_waits_for_its_first_tile_and_ends_after_its_last(model: Model) -> None:
    hardware = NPU.varied(buffers__stream_kib=16.0, memory__bandwidth_gb_s=4.0)
    tracks = by_track(trace(generation_of(model, hardware), model, hardware, steps=[0]))

    def products(track: str) -> dict[str, dict[str, Any]]:
        events = [event for event in tracks[track] if event["args"].get("step") == 0 and "store" not in event["name"]]
        return {event["args"]["operator"]: event for event in events if "BitplaneMatMul" in event["args"]["operator"]}

    loads, computations = products("memory"), products("matrix unit")
    assert loads.keys() == computations.keys()
    for operator, load in loads.items():
        computation = computations[operator]
        tiles = load["args"]["tiles"]
        assert tiles > 1
        assert computation["ts"] >= load["ts"] + load["args"]["busy_us"] / tiles - 0.002
        assert computation["ts"] + computation["dur"] > load["ts"] + load["dur"]


def test_chosen_steps(model: Model) -> None:
    generation = generation_of(model, NPU)
    shown = by_track(trace(generation, model, NPU))["matrix unit"]
    assert {event["args"].get("step") for event in shown} == {None, 0, 6}  # the prompt, and where precisions begin
    assert {event["args"]["precision_bits"] for event in shown if event["args"].get("step") == 6} == {2}
    shown = by_track(trace(generation, model, NPU, steps=[10, 3, 3]))["matrix unit"]
    assert {event["args"].get("step") for event in shown} == {None, 3, 10}
    assert {event["args"]["past_tokens"] for event in shown} == {0, PROMPT + 3, PROMPT + 10}
    with pytest.raises(PmpdError, match="no decode step 11"):
        trace(generation, model, NPU, steps=[11])
