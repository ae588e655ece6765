"""Reports: every table adds up to what was simulated, whatever it is grouped by; listings say what is counted."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmpd.exporter import ExportConfig, export_skeleton
from pmpd.npu_backend import Generation, Model, generate, lower, read_hardware
from pmpd.npu_backend.program.listing import listing, stream_sizes
from pmpd.npu_backend.study.breakdown import GROUPINGS, phases
from pmpd.npu_backend.study.report import Report, study
from pmpd.runtime.console.output import amount, csv_text, markdown_table
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.schedule.registry import parse_schedule

NPU = read_hardware("npu-4k")
MIXED = "static:3@10,2@25"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    output = tmp_path_factory.mktemp("npu") / "demo"
    export_skeleton(ExportConfig(model="demo", output=output, precisions=(4, 3, 2), context_length=96))
    return Model.open(output)


@pytest.fixture(scope="module")
def generation(model: Model) -> Generation:
    return generate(model, NPU, prompt=40, tokens=50, schedule=parse_schedule(MIXED, (4, 3, 2)))


@pytest.fixture(scope="module")
def report(model: Model) -> Report:
    return study(model, NPU, prompt=40, tokens=50, schedules=["fp16", MIXED, "uniform:2"])


@pytest.mark.parametrize("by", GROUPINGS)
def test_tables_add_up_to_the_generation(model: Model, generation: Generation, by: str) -> None:
    prefill, *decode = phases(generation, model, by=GROUPINGS[by])
    assert [phase.precision for phase in (prefill, *decode)] == [4, 4, 3, 2]
    assert prefill.seconds == pytest.approx(generation.prefill_seconds, rel=1e-12)
    assert [len(phase.steps) for phase in decode] == [10, 15, 24]
    assert sum(phase.seconds * len(phase.steps) for phase in decode) == pytest.approx(generation.decode_seconds)
    joules = prefill.joules + sum(phase.joules * len(phase.steps) for phase in decode)
    assert joules == pytest.approx(generation.joules)
    for phase, run in zip((prefill, *decode), (generation.prefill, *generation.decode.values()), strict=True):
        assert sum(row.seconds for row in phase.rows) == pytest.approx(phase.seconds, rel=1e-9)
        assert sum(row.count for row in phase.rows) == len(run.operators) == phase.total.count
        assert sum(sum(row.nbytes.values()) for row in phase.rows) == pytest.approx(np.mean(run.program.nbytes()))
        macs = np.mean(sum(operator.macs for operator in run.program.operators))
        assert sum(row.macs for row in phase.rows) == pytest.approx(float(macs))
        assert phase.joules - phase.total.joules == pytest.approx(NPU.energy.static_w * phase.seconds)


def test_rows_of_each_grouping(model: Model, generation: Generation) -> None:
    names = {by: [row.name for row in phases(generation, model, by=GROUPINGS[by])[1].rows] for by in GROUPINGS}
    assert {"BitplaneMatMul", "GroupQueryAttention", "RMSNormalization"} < set(names["kind"])
    assert {"self_attn/qkv_proj/BitplaneMatMul", "head_proj/BitplaneMatMul"} < set(names["module"])
    assert len(names["node"]) >= len(generation.prefill.operators)
    assert all(len(set(each)) == len(each) for each in names.values())


def test_one_step_is_that_step(model: Model, generation: Generation) -> None:
    _, first, last = phases(generation, model, steps=[12, 48])
    assert (first.precision, last.precision) == (3, 2)
    assert first.seconds == generation.steps[12]
    assert last.seconds == generation.steps[48]
    assert last.first_past == last.last_past == 88
    assert first.title == "Decode step 12, 3 bits, after 52 tokens"
    with pytest.raises(PmpdError, match="no decode step 49: they are 0 to 48"):
        phases(generation, model, steps=[49])


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"memory__bandwidth_gb_s": 0.05}, "memory"),
        ({"memory__bandwidth_gb_s": 1e5, "matrix_unit__utilization": 0.01}, "matrix"),
        ({"memory__bandwidth_gb_s": 1e5, "special_unit__norm_per_cycle": 0.01}, "special"),
        ({"memory__bandwidth_gb_s": 1e5, "controller__sync_cycles": 1e6}, "overhead"),
    ],
)
def test_what_bounds(model: Model, changes: dict[str, float], bound: str) -> None:
    slow = NPU.varied(**changes)
    result = generate(model, slow, prompt=40, tokens=3, schedule=parse_schedule("uniform:4", (4,)))
    assert phases(result, model)[1].total.bound == bound


def test_what_is_loaded_long_before_bounds_nothing(model: Model) -> None:
    slow = NPU.varied(memory__bandwidth_gb_s=1.0)
    result = generate(model, slow, prompt=40, tokens=3, schedule=parse_schedule("uniform:4", (4,)))
    (norm,) = (row for row in phases(result, model)[1].rows if row.name == "RMSNormalization")
    assert norm.needs["memory"] > norm.seconds
    assert norm.bound != "memory"


def test_schedules_beside_the_float16_model(report: Report) -> None:
    text, document = report.to_text(), report.to_dict()
    base, mixed, low = document["schedules"]
    assert base["decode_speedup_over_fp16"] == 1
    assert base["average_bits"] == 16
    assert mixed["average_bits"] == pytest.approx((10 * 4 + 15 * 3 + 24 * 2) / 49)
    rates = mixed["decode_tokens_per_second_by_bits"]
    assert 49 / mixed["decode_tokens_per_second"] == pytest.approx(10 / rates[4] + 15 / rates[3] + 24 / rates[2])
    assert rates[4] < rates[3] < rates[2] == pytest.approx(low["decode_tokens_per_second"], rel=0.05)
    for row in (base, mixed, low):
        seconds = row["time_to_first_token_s"] + 49 / row["decode_tokens_per_second"]
        assert row["tokens_per_second"] * seconds == pytest.approx(50)
        assert row["average_power_w"] * seconds == pytest.approx(row["energy_per_token_j"] * 50)
        ratio = row["decode_tokens_per_second"] / document["baseline"]["decode_tokens_per_second"]
        assert row["decode_speedup_over_fp16"] == pytest.approx(ratio)
        assert f"{row['decode_tokens_per_second']:,.2f}" in text
    titles = [phase["title"] for phase in document["phases"]]
    assert len(set(titles)) == len(titles) == 7  # the prompt at 4 bits is shared
    assert all(f"{title}: " in text for title in titles)
    assert text.startswith(report.to_text(details=False))


def test_json_and_csv_say_the_same(report: Report) -> None:
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    rows = [(phase, row) for phase in document["phases"] for row in phase["operators"]]
    assert len(lines) == len(rows)
    for line, (phase, row) in zip(lines, rows, strict=True):
        assert (line["phase"], int(line["bits"]), line["name"]) == (phase["phase"], phase["bits"], row["name"])
        assert float(line["seconds"]) == row["seconds"]
        moved = {key: float(value) for key, value in line.items() if key.endswith("_bytes") and value}
        assert moved == {f"{data}_bytes": number for data, number in row["bytes"].items()}
    for phase in document["phases"]:
        assert sum(row["share"] for row in phase["operators"]) == pytest.approx(1)


def test_bars_start_with_the_float16_model(report: Report) -> None:
    bars = report.by_module()
    assert [phase.precision for phase in bars if phase.phase == "prefill"] == [16, 4]
    assert bars[1].phase == "decode"
    assert bars[1].precision == 16


@pytest.mark.parametrize("tokens", [1, 37])
def test_listing_has_as_many_instructions_as_it_says(model: Model, tokens: int) -> None:
    small = NPU.varied(buffers__stream_kib=16.0)  # many tiles
    program = lower(model.prefill, small, tokens=tokens, past=0.0)
    header, *lines = listing(program, small).splitlines()
    instructions = [line for line in lines if line and not line.startswith(";")]
    counts = [int(match[1]) if (match := re.search(r"in (\d+) tiles$", line)) else 1 for line in instructions]
    assert f"{len(program.operators)} operators, {sum(counts):,} instructions, {16 * sum(counts):,} bytes" in header
    assert {line.split()[0] for line in instructions} <= {"LD", "ST", "MM", "MV", "MISC", "SYS"}
    assert max(counts) > 10
    assert not any(re.search(r"\b0 bytes", line) for line in instructions)  # a prompt has no cache to load


def test_streams_of_all_lengths(model: Model) -> None:
    def count(past: float, tokens: float, graph: object) -> int:
        header = listing(lower(graph, NPU, tokens=tokens, past=past), NPU).splitlines()[0]  # type: ignore[arg-type]
        return int(re.search(r"([\d,]+) instructions", header)[1].replace(",", ""))  # type: ignore[index]

    sizes = stream_sizes(model, NPU)
    assert (sizes.context_length, sizes.granularity) == (96, 16)
    for step, expected in (1, sizes.each_bytes), (16, sizes.reused_bytes):
        lengths = range(step, 97, step)
        prompts = sum(count(0, length, model.prefill) for length in lengths)
        steps = sum(count(min(length, 95), 1, graph) for length in lengths for graph in model.decode.values())
        assert 16 * (prompts + steps) == expected
    assert sizes.reused_bytes < sizes.each_bytes / 10


@given(st.floats(1e-2, 1e9))
def test_amounts_keep_three_digits(value: float) -> None:
    assert float(amount(value).replace(",", "")) == pytest.approx(value, rel=0.005, abs=0.0005)


def test_tables() -> None:
    assert markdown_table([["a", "b"], ["long", "1"]]).splitlines()[1:] == ["| :--- | --: |", "| long |   1 |"]
    assert csv_text([{"a": 1}, {"a": 2, "b": "x,y"}]) == 'a,b\n1,\n2,"x,y"\n'
    assert amount(0) == "–"
