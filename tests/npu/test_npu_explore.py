"""Explorations: every point as `generate` has it, the front as brute force finds it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pmpd.exporter import ExportConfig, export_skeleton
from pmpd.npu_backend import Model, generate, read_hardware
from pmpd.npu_backend.hardware.space import LARGEST, Space, parse_axis, read_space
from pmpd.npu_backend.study.explore import Limits, explore, pareto_front
from pmpd.npu_backend.study.generate import read_schedule
from pmpd.runtime.errors import PmpdError

NPU = read_hardware("npu-4k")
METRICS = ("tokens_per_second", "area_mm2", "energy_per_token_j", "average_power_w")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    output = tmp_path_factory.mktemp("npu") / "demo"
    export_skeleton(ExportConfig(model="demo", output=output, precisions=(4, 3), context_length=128))
    return Model.open(output)


def space(*axes: str) -> Space:
    return Space(dict(map(parse_axis, axes)))


@given(arrays(np.int64, st.tuples(st.integers(1, 40), st.integers(1, 3)), elements=st.integers(0, 5)))
def test_front_is_what_brute_force_finds(gains: np.ndarray) -> None:
    def beaten(row: np.ndarray) -> bool:
        return any((other >= row).all() and (other > row).any() for other in gains)

    expected = [place for place, row in enumerate(gains) if not beaten(row)]
    assert pareto_front(gains.astype(float)).tolist() == expected


def test_points_are_what_generate_says(model: Model) -> None:
    points = space(
        "memory.bandwidth_gb_s=0.5,20,400",
        "matrix_unit.mv_outputs=1,64",
        "buffers.stream_kib=8,700",
        "formats.kv_bits=4,16",
        "controller.length_granularity=12,20",
    ).points()
    schedules = ["fp16", "uniform:4", "static:3@20"]
    found = explore(model, NPU, points, prompt=30, tokens=70, schedules=schedules)
    assert len(found.schedules) == 3 * 48
    for place in range(0, len(found.schedules), 5):
        changes = {axis.replace(".", "__"): float(values[place]) for axis, values in found.axes.items()}
        hardware = NPU.varied(**changes)
        one = generate(model, hardware, prompt=30, tokens=70, schedule=read_schedule(found.schedules[place], model))
        seconds = one.prefill_seconds + one.decode_seconds
        expected = {
            "tokens_per_second": one.tokens_per_second,
            "decode_tokens_per_second": one.decode_tokens_per_second,
            "time_to_first_token_s": one.prefill_seconds,
            "area_mm2": hardware.area_mm2,
            "energy_per_token_j": one.joules / 70,
            "average_power_w": one.joules / seconds,
        }
        assert {name: values[place] for name, values in found.metrics.items()} == pytest.approx(expected, rel=1e-9)


def test_designs_that_cannot_be_are_left_out_and_counted(model: Model) -> None:
    axes = ("matrix_unit.rows=1,4", "matrix_unit.mv_outputs=8,32,64", "buffers.activation_kib=1,1.5,4,64")
    found = explore(model, NPU, space(*axes).points(), prompt=8, tokens=4, schedules=["fp16", "uniform:4"])
    expected = 0
    for schedule in ("fp16", "uniform:4"):
        points = space(*axes).points()
        for rows, outputs, kib in zip(*points.values(), strict=True):
            try:
                hardware = NPU.varied(
                    matrix_unit__rows=rows, matrix_unit__mv_outputs=outputs, buffers__activation_kib=kib
                )
                generate(model, hardware, prompt=8, tokens=4, schedule=read_schedule(schedule, model))
            except PmpdError:
                expected += 1
    assert 0 < found.impossible == expected < 48
    assert len(found.schedules) == 48 - expected
    with pytest.raises(PmpdError, match="none of 1 designs is possible"):
        explore(model, NPU, space("matrix_unit.mv_outputs=1024").points(), prompt=8, tokens=4, schedules=["uniform:4"])


def test_limits_and_front(model: Model) -> None:
    points = space("memory.bandwidth_gb_s=1:64:6", "matrix_unit.rows=4:64:5", "buffers.stream_kib=64:2048:4").points()
    limits = Limits(max_area_mm2=2.0, max_power_w=2.4, min_tokens_per_second=500)
    found = explore(model, NPU, points, prompt=60, tokens=60, schedules=["uniform:4", "uniform:3"], limits=limits)
    speed, area, energy, power = (found.metrics[name] for name in METRICS)
    kept = (area <= 2.0) & (power <= 2.4) & (speed >= 500)
    assert 0 < kept.sum() < len(kept)
    assert (found.kept == kept).all()
    gains = np.stack([speed, -area, -energy], axis=1)
    rivals = gains[kept]
    best = [i for i in np.flatnonzero(kept) if not ((rivals >= gains[i]).all(1) & (rivals > gains[i]).any(1)).any()]
    assert sorted(found.front.tolist()) == best
    assert (np.diff(speed[found.front]) <= 0).all()
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["tokens_per_second"] for row in document["front"]] == speed[found.front].tolist()
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(lines) == kept.sum()
    assert sum(line["on_front"] == "1" for line in lines) == len(best)
    assert f"{len(found.schedules):,} designs" in found.to_text()
    with pytest.raises(PmpdError, match=r"none of 240 designs keeps the limits: at best they have .* mm²"):
        explore(
            model,
            NPU,
            points,
            prompt=60,
            tokens=60,
            schedules=["uniform:4", "uniform:3"],
            limits=Limits(max_power_w=0.1),
        )


def test_progress_reaches_the_end(model: Model) -> None:
    done: list[int] = []
    axes = space("matrix_unit.mv_outputs=64,512", "memory.bandwidth_gb_s=8,16")
    schedules = ["uniform:4", "uniform:3"]
    explore(model, NPU, axes.points(), prompt=8, tokens=4, schedules=schedules, progress=done.append)
    assert sum(done) == 8


def test_grid_and_sample() -> None:
    axes = space("memory.bandwidth_gb_s=1:64:7", "buffers.stream_kib=1,2,3", "matrix_unit.rows=2,4")
    grid = axes.points()
    assert axes.size == 42
    assert set(zip(*(values.tolist() for values in grid.values()), strict=True)) == {
        (gb, kib, rows) for gb in (1, 2, 4, 8, 16, 32, 64) for kib in (1, 2, 3) for rows in (2, 4)
    }
    sample = axes.points(20, seed=3)
    drawn = list(zip(*(values.tolist() for values in sample.values()), strict=True))
    assert len(set(drawn)) == len(drawn) == 20
    assert set(drawn) <= set(zip(*(values.tolist() for values in grid.values()), strict=True))
    assert all((values == axes.points(20, seed=3)[axis]).all() for axis, values in sample.items())
    assert any((values != axes.points(20, seed=4)[axis]).any() for axis, values in sample.items())
    assert len(axes.points(1000)["matrix_unit.rows"]) == 42
    many = space(*(f"energy.{name}=1:9:99" for name in ("mac_pj", "static_w", "buffer_pj_per_byte")))
    with pytest.raises(PmpdError, match=f"970,299 points are more than {LARGEST:,}: take a sample"):
        many.points()
    with pytest.raises(PmpdError, match="a sample has 1 or more points, got 0"):
        many.points(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory.bandwidth_gb_s", "is not an axis: write it like"),
        ("memory.bandwidth_gb_s=", "is not an axis: write it like"),
        ("bandwidth_gb_s=3", "unknown number to vary 'bandwidth_gb_s': choose one of memory.bandwidth_gb_s"),
        ("memory.bandwidth_gb_s=three", "memory.bandwidth_gb_s: 'three' is neither a number nor a range"),
        ("memory.bandwidth_gb_s=64:16:3", "'64:16:3' is neither a number nor a range"),
        ("memory.bandwidth_gb_s=1:4", "'1:4' is neither a number nor a range"),
        ("memory.bandwidth_gb_s=1:4:1e9", "'1:4:1e9' is neither"),
        ("memory.bandwidth_gb_s=16,-1", r"memory.bandwidth_gb_s must be a number of GB/s .* got -1"),
        ("memory.bandwidth_gb_s=nan", "must be a number of GB/s .* got nan"),
        ("matrix_unit.rows=2.5", "matrix_unit.rows must be a whole number of rows of activations .* got 2.5"),
    ],
)
def test_axes_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PmpdError, match=message):
        parse_axis(text)


def test_space_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text('[memory]\nbandwidth_gb_s = [16, 32.5]\n[matrix_unit]\nrows = "4:64:3"\n')
    assert read_space(file).axes == {"memory.bandwidth_gb_s": (16, 32.5), "matrix_unit.rows": (4, 16, 64)}
    for text, message in {
        "rows = [1]": "rows must be a table of fields",
        "[memory]\nbandwidth_gb_s = [true]": "True is neither a number nor a range",
        "[memory]\nbandwidth_gb_s = []": "memory.bandwidth_gb_s needs values to vary over",
        "[memory]\nspeed = [1]": "unknown number to vary 'memory.speed'",
        "[memory": "is not valid TOML",
    }.items():
        file.write_text(text)
        with pytest.raises(PmpdError, match=message) as caught:
            read_space(file)
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)
    with pytest.raises(PmpdError, match="cannot read"):
        read_space(tmp_path / "none.toml")


@pytest.mark.slow
def test_ten_thousand_points_of_vicuna() -> None:
    model = Model.shipped("vicuna-7b")
    points = space(
        "memory.bandwidth_gb_s=16:64:10",
        "matrix_unit.rows=8:64:10",
        "buffers.stream_kib=256:4096:10",
        "buffers.activation_kib=256:4096:10",
    ).points()
    found = explore(
        model, read_hardware("npu-16k"), points, prompt=1000, tokens=256, schedules=["static:4@0,3@85,2@170"]
    )
    assert len(found.schedules) == 10_000
    assert len(found.front) > 10
