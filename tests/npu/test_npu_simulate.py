"""Time and energy: closed forms against tiles one by one, bounds that no hardware beats, whole generations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TinyModel

from pmpd.exporter import ExportConfig, export_skeleton
from pmpd.npu_backend import Hardware, Model, generate, lower, read_hardware, simulate
from pmpd.npu_backend.machine.cost import Piece, energy, matrix_cycles, operator_cost
from pmpd.npu_backend.machine.instructions import (
    Instruction,
    Load,
    Matrix,
    Operator,
    Program,
    Special,
    Store,
    Sync,
)
from pmpd.npu_backend.machine.simulate import Pipeline
from pmpd.runtime import PmpdError
from pmpd.runtime.schedule.registry import parse_schedule

NPU = read_hardware("npu-4k")
# Large enough for tiles, small enough for thousands of runs; grouped heads, and rows that fill no unit.
SMALL = TinyModel(
    "llama",
    {
        "hidden_size": 256,
        "intermediate_size": 700,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
    },
)
ENERGIES = (
    "memory_pj_per_byte",
    "buffer_pj_per_byte",
    "mac_pj",
    "fp16_mac_pj",
    "special_pj_per_element",
    "static_w",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(SMALL.config()))
    export_skeleton(ExportConfig(model=str(folder), output=folder / "skeleton", precisions=(4, 3, 2)))
    return Model.open(folder / "skeleton")


def possible(numbers: dict[str, Any]) -> dict[str, Any]:
    """Take matrix-vector products no more units than there are."""
    units = numbers["matrix_unit__rows"] * numbers["matrix_unit__mm_outputs"]
    return numbers | {"matrix_unit__mv_outputs": min(numbers["matrix_unit__mv_outputs"], units)}


# For `Hardware.varied`: far from any real accelerator.
NUMBERS = st.fixed_dictionaries(
    {
        "matrix_unit__rows": st.sampled_from([1, 4, 16, 30]),
        "matrix_unit__mm_outputs": st.sampled_from([8, 16, 33]),
        "matrix_unit__mv_outputs": st.sampled_from([1, 8, 60, 500]),
        "matrix_unit__inputs": st.sampled_from([1, 16, 100]),
        "matrix_unit__utilization": st.floats(0.3, 1),
        "matrix_unit__fp16_cycles": st.sampled_from([1, 2, 4]),
        "matrix_unit__frequency_ghz": st.floats(0.1, 2),
        "memory__bandwidth_gb_s": st.floats(0.3, 300),
        "memory__efficiency": st.floats(0.3, 1),
        "memory__burst_bytes": st.sampled_from([1, 64, 256]),
        "memory__latency_ns": st.sampled_from([0, 100, 1000]),
        "buffers__stream_kib": st.sampled_from([2, 16, 64, 1024]),
        "buffers__activation_kib": st.sampled_from([8, 64, 1024]),
        "decompression__weights_per_cycle": st.floats(1, 5000),
        "controller__sync_cycles": st.sampled_from([0, 32, 1000]),
        "special_unit__softmax_per_cycle": st.floats(0.5, 100),
    }
).map(possible)


# Phase, tokens, tokens before, float16.
RUNS = st.one_of(
    st.tuples(st.sampled_from([4, 3, 2]), st.just(1), st.sampled_from([0, 1, 100, 1000]), st.booleans()),
    st.tuples(st.just(0), st.sampled_from([1, 2, 15, 47, 300]), st.sampled_from([0, 20]), st.booleans()),
)


def seconds(model: Model, hardware: Hardware, run: tuple[int, int, int, bool]) -> Any:
    return simulate(lowered(model, hardware, run), hardware).seconds


def lowered(model: Model, hardware: Hardware, run: tuple[int, int, Any, bool]) -> Program:
    precision, tokens, past, fp16 = run
    graph = model.decode[precision] if precision else model.prefill
    return lower(graph, hardware, tokens=tokens, past=past, fp16=fp16)


# The recurrence, tile by tile


def one_by_one(pieces: Sequence[Piece]) -> tuple[float, float, float, float]:
    """Load i waits for load i - 1 and for the product that frees its half; product i for load i and product i - 1."""
    memory = unit = 0.0
    halves = (0.0, 0.0)
    for piece in pieces:
        tiles = int(piece.tiles)
        if not tiles:
            memory, unit = memory + float(piece.memory), unit + float(piece.compute)
        for _ in range(tiles):
            memory = max(memory, halves[0]) + float(piece.memory) / tiles
            unit = max(unit, memory) + float(piece.compute) / tiles
            halves = (halves[1], unit)
    return memory, *halves, unit


PIECE = ("memory", "compute", "tiles")
durations = st.one_of(st.sampled_from([0.0, 1.0, 7.0, 1000.0]), st.floats(0, 10))
pieces_of = st.lists(st.builds(Piece, memory=durations, compute=durations, tiles=st.integers(0, 8)), min_size=1)


@given(pieces_of)
@settings(max_examples=500)
def test_the_closed_form_is_the_recurrence(pieces: list[Piece]) -> None:
    state = Pipeline()
    for i, piece in enumerate(pieces):
        state = state.after(piece)
        assert astuple(state) == pytest.approx(one_by_one(pieces[: i + 1]), rel=1e-9)


@given(
    st.integers(1, 6).flatmap(
        lambda count: st.lists(
            st.lists(pieces_of.map(lambda p: p[0]), min_size=count, max_size=count), min_size=3, max_size=3
        )
    )
)
def test_the_closed_form_takes_arrays(columns: list[list[Piece]]) -> None:
    state = Pipeline()
    for row in zip(*columns, strict=True):
        memory, compute, tiles = (np.array([getattr(each, name) for each in row]) for name in PIECE)
        state = state.after(Piece(memory, compute, tiles))
    for i, column in enumerate(columns):
        ours = [np.broadcast_to(each, 3)[i] for each in vars(state).values()]
        assert ours == pytest.approx(one_by_one(column), rel=1e-9)


# Whole programs, worked out by hand: a byte or a cycle is a nanosecond, a tile of the stream is 512 bytes.

SIMPLE = NPU.varied(
    matrix_unit__rows=4,
    matrix_unit__mm_outputs=4,
    matrix_unit__mv_outputs=4,
    matrix_unit__inputs=16,
    matrix_unit__frequency_ghz=1,
    matrix_unit__utilization=1,
    memory__bandwidth_gb_s=1,
    memory__efficiency=1,
    memory__burst_bytes=1,
    memory__latency_ns=0,
    buffers__stream_kib=1,
    decompression__weights_per_cycle=1 << 20,
    controller__sync_cycles=10,
    special_unit__softmax_per_cycle=1,
)


def product(cycles: int) -> Matrix:
    """A matrix-vector product: four outputs a cycle, of 16 inputs."""
    return Matrix("MV", 1, 4 * cycles, 16, 1, 4, True)


def nanoseconds(*operators: tuple[Instruction, ...]) -> float:
    program = Program("by hand", 1, 0, tuple(Operator(f"{i}", "x", steps) for i, steps in enumerate(operators)))
    return float(simulate(program, SIMPLE).seconds) * 1e9


def test_a_program_that_waits_for_memory() -> None:
    # Tiles arrive at 512 and 1024, their products end at 712 and 1224; the synchronisation at 1234.
    first = (Load("planes", 1024), product(400), Sync())
    assert nanoseconds(first) == pytest.approx(1234)
    # A vector is fetched until 1124, tiles arrive at 1636, 2148 and 2660; the last one's softmax ends at 2760.
    second = (Load("vectors", 100), Load("kv_cache", 1536), Special("softmax", 300))
    assert nanoseconds(first, second) == pytest.approx(2760)
    # The store begins when memory is free, at 2660.
    assert nanoseconds(first, (*second, Store("activations", 200))) == pytest.approx(2860)


def test_a_program_that_waits_for_products() -> None:
    # Tiles arrive at 512, 1024 and, once the first half is free at 1512, at 2024. Products end at 1512, 2512, 3512.
    first = (Load("planes", 1536), product(3000), Sync())
    assert nanoseconds(first) == pytest.approx(3522)
    # The next tile can only come once the second half is free, at 2512; its product waits for the synchronisation.
    assert nanoseconds(first, (Load("planes", 512), product(50))) == pytest.approx(3572)
    # Rows left over take each tile while it is there: 1000 + 100 cycles a tile.
    assert nanoseconds((Load("planes", 1536), product(3000), product(300))) == pytest.approx(512 + 3 * 1100)


@given(NUMBERS, NUMBERS, st.sampled_from([4, 2, 0]), st.booleans())
@settings(max_examples=40)
def test_arrays_are_their_entries(
    model: Model, first: dict[str, Any], second: dict[str, Any], precision: int, fp16: bool
) -> None:
    """Of hardware, of lengths: a design space and a generation are one call."""
    tokens = 1 if precision else 47
    numbers = {name: np.array([first[name], second[name]]) for name in first}
    past = np.array([0, 100])
    together = simulate(lowered(model, NPU.varied(**numbers), (precision, tokens, past, fp16)), NPU.varied(**numbers))
    for i, single in enumerate((first, second)):
        hardware = NPU.varied(**single)
        alone = simulate(lowered(model, hardware, (precision, tokens, int(past[i]), fp16)), hardware)
        assert np.broadcast_to(together.seconds, 2)[i] == pytest.approx(alone.seconds, rel=1e-12)
        assert np.broadcast_to(together.joules, 2)[i] == pytest.approx(alone.joules, rel=1e-12)


# Rooflines


@given(NUMBERS, RUNS)
@settings(max_examples=60)
def test_nothing_is_faster_than_the_roofline_or_slower_than_one_thing_at_a_time(
    model: Model, numbers: dict[str, Any], run: tuple[int, int, int, bool]
) -> None:
    hardware = NPU.varied(**numbers)
    program = lowered(model, hardware, run)
    result = simulate(program, hardware)
    rounding = 1 - 1e-12
    assert result.seconds >= program.nbytes() / (hardware.memory.bandwidth_gb_s * 1e9) * rounding
    macs = sum(each.macs for each in program.operators)
    assert result.seconds >= macs / (hardware.matrix_unit.macs * hardware.hertz) * rounding
    units = ("memory", "matrix", "special", "overhead")
    serial = sum(getattr(each.cost, unit) for each in result.operators for unit in units)
    assert result.seconds <= (serial + hardware.memory.latency_ns * 1e-9) / rounding
    ends = [float(each.end) for each in result.operators]
    assert ends == sorted(ends)
    assert sum(float(each.added) for each in result.operators) == pytest.approx(ends[-1])


FASTER = (
    "matrix_unit__rows",
    "matrix_unit__mm_outputs",
    "matrix_unit__mv_outputs",
    "matrix_unit__inputs",
    "matrix_unit__frequency_ghz",
    "memory__bandwidth_gb_s",
    "decompression__weights_per_cycle",
    "special_unit__softmax_per_cycle",
)


@given(NUMBERS, RUNS, st.integers(2, 5))
@settings(max_examples=40)
def test_more_of_anything_is_no_slower(
    model: Model, numbers: dict[str, Any], run: tuple[int, int, int, bool], factor: int
) -> None:
    before = seconds(model, NPU.varied(**numbers), run) * (1 + 1e-12)
    for name in FASTER:
        larger = possible(numbers | {name: numbers[name] * factor})
        assert seconds(model, NPU.varied(**larger), run) <= before, name
    precision, tokens, past, fp16 = run
    hardware = NPU.varied(**numbers)
    assert seconds(model, hardware, (precision, tokens, past + 16 * factor, fp16)) >= before * (1 - 1e-11)
    if not precision:
        assert seconds(model, hardware, (precision, tokens + factor, past, fp16)) >= before * (1 - 1e-11)


@given(NUMBERS, RUNS, st.sampled_from([2, 3, 8]))
@settings(max_examples=40)
def test_larger_buffers_and_fewer_bits_cost_a_tile_at_most(
    model: Model, numbers: dict[str, Any], run: tuple[int, int, int, bool], factor: int
) -> None:
    """Tiles are half of the stream buffer: where products bound, the first one of a stream is waited for.

    So a larger buffer, or fewer bytes in fewer and larger tiles, may cost that time and no more.
    """
    hardware = NPU.varied(**numbers)
    _, tokens, past, fp16 = run
    names = "buffers__stream_kib", "buffers__activation_kib"
    changes = [(hardware, run, NPU.varied(**numbers | {name: numbers[name] * factor}), run) for name in names]
    if run[0] in (4, 3):
        changes.append((hardware, run, hardware, (run[0] - 1, tokens, past, fp16)))
    for before, run_before, after, run_after in changes:
        program = lowered(model, after, run_after)
        pieces = [piece for each in program.operators for piece in operator_cost(each, after).pieces]
        first_tiles = sum(float(piece.memory / piece.tiles) for piece in pieces if piece.tiles)
        limit = (seconds(model, before, run_before) + first_tiles) * (1 + 1e-12)
        assert simulate(program, after).seconds <= limit


def test_where_memory_bounds_it_is_linear(model: Model) -> None:
    """In bytes, bandwidth, bits, context: units a thousand times too large, no latency, bursts of a byte."""
    numbers = {f"special_unit__{name}_per_cycle": 1e6 for name in ("softmax", "norm", "activation", "rotary")}
    numbers |= {"special_unit__elementwise_per_cycle": 1e6, "decompression__weights_per_cycle": 1 << 24}
    numbers |= {"matrix_unit__rows": 1 << 13, "matrix_unit__mm_outputs": 1 << 13, "matrix_unit__mv_outputs": 1 << 13}
    numbers |= {"matrix_unit__inputs": 1 << 13, "matrix_unit__frequency_ghz": 10, "controller__sync_cycles": 0}
    numbers |= {"memory__latency_ns": 0, "memory__burst_bytes": 1}
    bandwidth = np.array([0.1, 0.2, 0.4])
    hardware = NPU.varied(**numbers, memory__bandwidth_gb_s=bandwidth)
    for run in (2, 1, 160, False), (4, 1, 160, False), (4, 1, 160, True), (0, 300, 0, False):
        program = lowered(model, hardware, run)
        moved = np.broadcast_to(simulate(program, hardware).seconds * bandwidth * 1e9, 3)
        np.testing.assert_allclose(moved, np.broadcast_to(program.nbytes(), 3), rtol=1e-4)
    slow = NPU.varied(**numbers, memory__bandwidth_gb_s=0.01)
    past = simulate(lowered(model, slow, (2, 1, 16.0 * np.arange(8), False)), slow).seconds
    np.testing.assert_allclose(np.diff(past), np.diff(past)[0], rtol=1e-6)
    codebooks = [lowered(model, slow, (bits, 1, 0, False)).nbytes("codebooks") / 1e7 for bits in (2, 3, 4)]
    by_bits = [float(seconds(model, slow, (bits, 1, 0, False))) for bits in (2, 3, 4)]
    np.testing.assert_allclose(*np.diff(np.array(by_bits) - codebooks), rtol=1e-6)


# Single products, by hand


def test_cycles_of_a_product() -> None:
    hardware = NPU.varied(matrix_unit__utilization=0.5, matrix_unit__fp16_cycles=3)
    cases = [
        (("MV", 1, 65, 33, 1, 4, True), 2 * 3 / 0.5),  # 64 outputs, 16 inputs at a time
        (("MV", 3, 64, 16, 2, 4, True), 2 * 3 * 1 / 0.5),
        (("MM", 17, 17, 17, 1, 4, True), 2 * 2 * 2 / 0.5),
        (("MM", 17, 17, 17, 5, 16, False), 5 * 2 * 2 * 2 * 3 / 0.5),
        (("MM", 0, 17, 17, 1, 4, True), 0),
    ]
    for step, cycles in cases:
        assert matrix_cycles(Matrix(*step), hardware) == cycles  # type: ignore[arg-type]
    slow = hardware.varied(decompression__weights_per_cycle=2)
    assert matrix_cycles(Matrix("MV", 1, 65, 33, 1, 4, True), slow) == 65 * 33 / 2
    assert matrix_cycles(Matrix("MM", 40, 65, 33, 1, 4, True), slow) == 3 * 65 * 33 / 2  # anew for every 16 rows
    assert matrix_cycles(Matrix("MM", 40, 65, 33, 1, 8, False), slow) == 3 * 5 * 3 / 0.5  # keys and values have none


def test_joules_of_a_product() -> None:
    """40 rows, 32 outputs, 10 inputs at 4 bits: three passes of 16 rows, activations once for each 16 outputs."""
    hardware = NPU.varied(energy__memory_pj_per_byte=1000, energy__buffer_pj_per_byte=10, energy__mac_pj=0.5)
    operator = Operator("product", "BitplaneMatMul", (Load("planes", 160), Matrix("MM", 40, 32, 10, 1, 4, True)))
    weights = 160 * (1000 + 2 * 10) + 2 * 160 * 10
    activations = (40 * 10 * 2 + 40 * 32) * 10
    assert energy(operator, hardware) * 1e12 == pytest.approx(weights + activations + 40 * 32 * 10 * 0.5)
    wide = Operator("product", "BitplaneMatMul", (Matrix("MV", 1, 32, 10, 1, 16, False),))
    assert energy(wide, hardware) * 1e12 == pytest.approx((10 + 32) * 2 * 10 + 320 * 0.5)


def test_energy_adds_up(model: Model) -> None:
    for run in (3, 1, 100, False), (0, 47, 0, False), (4, 1, 100, True):
        result = simulate(lowered(model, NPU, run), NPU)
        parts = [float(each.joules) for each in result.operators]
        assert min(parts) >= 0
        assert result.joules == pytest.approx(sum(parts) + NPU.energy.static_w * result.seconds)
        # Each figure has a share, and they are all of it.
        none = {f"energy__{name}": 0 for name in ENERGIES}
        shares = []
        for name in ENERGIES:
            alone = NPU.varied(**none | {f"energy__{name}": getattr(NPU.energy, name)})
            shares.append(float(simulate(lowered(model, alone, run), alone).joules))
        idle = ENERGIES.index("mac_pj" if run[3] else "fp16_mac_pj")
        assert shares[idle] == 0 < min(shares[:idle] + shares[idle + 1 :])
        assert sum(shares) == pytest.approx(float(result.joules))
        moved = lowered(model, NPU, run).nbytes()
        assert shares[0] == pytest.approx(moved * NPU.energy.memory_pj_per_byte * 1e-12)


# Generations


@pytest.mark.parametrize("text", ["uniform:3", "static:4@0,3@2,2@5", None])
def test_a_generation_is_its_steps(text: str | None, model: Model) -> None:
    schedule = None if text is None else parse_schedule(text, (4, 3, 2))
    prompt, tokens = 14, 9
    whole = generate(model, NPU, prompt=prompt, tokens=tokens, schedule=schedule)
    bits = [16 if schedule is None else schedule.precision(step) for step in range(tokens - 1)]
    singles = [
        simulate(lowered(model, NPU, (min(each, 4), 1, prompt + step, schedule is None)), NPU)
        for step, each in enumerate(bits)
    ]
    first = simulate(lowered(model, NPU, (0, prompt, 0, schedule is None)), NPU)
    assert whole.precisions.tolist() == bits
    assert whole.average_bits == sum(bits) / len(bits)
    assert whole.steps == pytest.approx([float(each.seconds) for each in singles], rel=1e-12)
    assert whole.prefill_seconds == pytest.approx(float(first.seconds), rel=1e-12)
    assert whole.decode_seconds == pytest.approx(whole.steps.sum())
    assert whole.joules == pytest.approx(float(first.joules) + sum(float(each.joules) for each in singles))
    assert whole.decode_tokens_per_second == pytest.approx(8 / whole.decode_seconds)
    assert whole.tokens_per_second == pytest.approx(9 / (whole.prefill_seconds + whole.decode_seconds))


def test_lower_precisions_are_faster_and_cost_less(model: Model) -> None:
    schedules = [
        None,
        *(parse_schedule(text, (4, 3, 2)) for text in ("uniform:4", "static:3@3", "uniform:3", "uniform:2")),
    ]
    runs = [generate(model, NPU, prompt=100, tokens=9, schedule=schedule) for schedule in schedules]
    for name in "decode_seconds", "joules", "average_bits":
        values = [getattr(run, name) for run in runs]
        assert values == sorted(values, reverse=True)
        assert len(set(values)) == len(values)


def test_mistakes_are_one_line(model: Model) -> None:
    schedule = parse_schedule("uniform:4", (4,))
    for prompt, tokens, message in (
        (0, 2, "1 or more tokens of prompt and 2 or more new ones, got 0 and 2"),
        (5, 1, "1 or more tokens of prompt and 2 or more new ones, got 5 and 1"),
        (2000, 50, "2000 tokens of prompt and 50 new ones are more than the context of skeleton, 2048: give fewer"),
    ):
        with pytest.raises(PmpdError, match=message):
            generate(model, NPU, prompt=prompt, tokens=tokens, schedule=schedule)
    assert len(generate(model, NPU, prompt=2000, tokens=49, schedule=schedule).steps) == 48
    with pytest.raises(PmpdError, match=r"skeleton has no graph at 5 bits: it has \[2, 3, 4\]"):
        generate(model, NPU, prompt=5, tokens=5, schedule=parse_schedule("uniform:5", (5,)))


def test_a_generation_of_a_large_model(tmp_path: Path) -> None:
    export_skeleton(ExportConfig(model="vicuna-7b", output=tmp_path / "vicuna", precisions=(3, 2)))
    vicuna, npu = Model.open(tmp_path / "vicuna"), read_hardware("npu-16k")
    mixed = generate(vicuna, npu, prompt=1000, tokens=256, schedule=parse_schedule("static:2@100", (3, 2)))
    # Weights bound it: 6.6 G of them at about 2.4 bits, and 262 kB of cache a token, at 32 GB/s.
    assert 11 < mixed.decode_tokens_per_second < 14
    fp16 = generate(vicuna, npu, prompt=1000, tokens=256, schedule=None)
    assert fp16.decode_tokens_per_second == pytest.approx(2.4, rel=0.05)  # Figure 5's axis
