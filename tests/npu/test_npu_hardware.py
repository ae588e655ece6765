"""Accelerators as data: those that are shipped read, and a file with a mistake is one line that names its place."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from pmpd.npu_backend import read_hardware, shipped_hardware
from pmpd.npu_backend.hardware.description import number_ranges
from pmpd.runtime.errors import PmpdError

NPU = shipped_hardware()["npu-4k"].read_text()


@pytest.mark.parametrize("name", sorted(shipped_hardware()))
def test_what_is_shipped(name: str) -> None:
    hardware = read_hardware(name)
    assert hardware == read_hardware(shipped_hardware()[name])  # by name and by file
    assert hardware.name == name
    assert hardware.sources.keys() == number_ranges().keys()
    assert 1 <= hardware.area_mm2 <= 1000


def test_the_npus_of_the_paper() -> None:
    """PMPD, A.6: 4K and 16K units at 1 GHz, 32 GB/s."""
    for name, macs in ("npu-4k", 4096), ("npu-16k", 16384):
        hardware = read_hardware(name)
        assert (hardware.matrix_unit.macs, hardware.hertz, hardware.bytes_per_second) == (macs, 1e9, 32e9)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bandwidth_gb_s = 32.0\n", "", "[memory] lacks bandwidth_gb_s, GB/s (10^9 bytes)"),
        (
            "bandwidth_gb_s = 32.0",
            "bandwidth_gbit_s = 256.0",
            "[memory] has an unknown field 'bandwidth_gbit_s': choose one of bandwidth_gb_s, ",
        ),
        (
            "latency_ns = 100",
            "latency_us = 0.1",
            "[memory] has an unknown field 'latency_us': choose one of latency_ns",
        ),
        ("= 32.0\nefficiency", '= "32 GB/s"\nefficiency', "[memory] bandwidth_gb_s must be a number of GB/s (10^9"),
        ("= 32.0\nefficiency", "= [32.0, 64.0]\nefficiency", "[memory] bandwidth_gb_s must be one number of GB/s"),
        ("= 32.0\nefficiency", "= -32.0\nefficiency", "GB/s (10^9 bytes) from 0.01 to 100000, got -32.0"),
        ("= 32.0\nefficiency", "= nan\nefficiency", "[memory] bandwidth_gb_s must be a number of GB/s"),
        ("= 32.0\nefficiency", "= inf\nefficiency", "from 0.01 to 100000, got inf"),
        ("= 32.0\nefficiency", "= 32e9\nefficiency", "from 0.01 to 100000, got 32000000000.0"),
        ("= 32.0\nefficiency", "= true\nefficiency", "[memory] bandwidth_gb_s must be a number of GB/s"),
        ("efficiency = 1.0", "efficiency = 1.01", "[memory] efficiency must be a number of the bandwidth that long"),
        ("utilization = 1.0", "utilization = 0", "[matrix_unit] utilization must be a number"),
        ("rows = 16", "rows = 16.5", "[matrix_unit] rows must be a whole number of rows of activations, got 16.5"),
        ("rows = 16", f"rows = {10**30}", "[matrix_unit] rows must be a number of rows of activations from 1 to 65536"),
        ("mv_outputs = 64", "mv_outputs = 257", "mv_outputs must be at most rows * mm_outputs = 256, the units there"),
        (
            "[decompression]\nweights_per_cycle = 1024",
            "",
            "lacks the table [decompression]: Turns bit-planes into codebook",
        ),
        ("[controller]", "[control]", "lacks the table [controller]"),
        ("[energy]\n", "[memories]\n\n[energy]\n", "unknown table 'memories': choose one of memory, "),
        ("[energy]\n", "[energy.more]\n\n[energy]\n", "[energy] has an unknown field 'more': choose one of "),
        (
            "[sources.memory]\n",
            "[sources.memories]\n",
            "[sources.memory] lacks bandwidth_gb_s: say where 32.0 comes from",
        ),
        (
            "[sources.memory]\n",
            "[sources.ram]\nsize_gb = 'x'\n[sources.memory]\n",
            "[sources] has an unknown table 'ram'",
        ),
        ("[sources.memory]\n", "[sources.memory]\nsize_gb = 'x'\n", "[sources.memory] has an unknown field 'size_gb'"),
        (
            "[sources.area]\n",
            "[sources.area]\nmac_um2 = '  '\n#",
            "[sources.area] lacks mac_um2: say where 670 comes from",
        ),
        (
            "[sources.area]\n",
            "[sources.area]\nmac_um2 = 5\n#",
            "[sources.area] lacks mac_um2: say where 670 comes from",
        ),
        ('title = "', '# "', "needs a title: a line of text"),
        ("[matrix_unit]", "matrix_unit", "is not valid TOML"),
        ("[area]", "[area]\n[area]", "is not valid TOML"),
    ],
)
def test_a_mistake_in_a_file(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in NPU
    with pytest.raises(PmpdError) as caught:
        read_hardware(_file(tmp_path, NPU.replace(old, new, 1)))
    assert str(caught.value).startswith(f"{tmp_path / 'mine.toml'}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", sorted(number_ranges()))
def test_every_number_and_every_source_is_needed(field: str, tmp_path: Path) -> None:
    section, _, name = field.partition(".")
    head, tables = NPU.split(f"[{section}]\n"), NPU.split(f"[sources.{section}]\n")
    for (before, after), mark in ((head, f"[{section}]\n"), (tables, f"[sources.{section}]\n")):
        lines = after.splitlines(keepends=True)
        (at,) = [i for i, line in enumerate(lines[:10]) if line.startswith(f"{name} = ")][:1]
        text = before + mark + "".join(lines[:at] + lines[at + 1 :])
        with pytest.raises(PmpdError, match=rf"^\S+mine.toml: \[(sources\.)?{section}\] lacks {name}\b"):
            read_hardware(_file(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"title = '\xff'")
    with pytest.raises(PmpdError, match=r"bytes\.toml is not valid TOML"):
        read_hardware(tmp_path / "bytes.toml")
    with pytest.raises(PmpdError, match=r"mine\.toml needs a table \[sources\]"):
        read_hardware(_file(tmp_path, NPU[: NPU.index("[sources.")]))
    with pytest.raises(PmpdError, match=r"^unknown hardware 'npu4k': choose one of npu-4k, .*, or give a TOML file$"):
        read_hardware("npu4k")
    with pytest.raises(PmpdError, match="unknown hardware"):
        read_hardware(tmp_path)


def test_numbers_may_be_arrays() -> None:
    base = read_hardware("npu-4k")
    rows, bandwidth = np.array([8, 16, 32]), np.array([10.0, 20.0, 40.0])
    varied = base.varied(matrix_unit__rows=rows, memory__bandwidth_gb_s=bandwidth, memory__efficiency=0.5)
    singles = [
        base.varied(matrix_unit__rows=each, memory__bandwidth_gb_s=speed, memory__efficiency=0.5)
        for each, speed in zip(rows, bandwidth, strict=True)
    ]
    for name in "area_mm2", "bytes_per_second":
        np.testing.assert_array_equal(getattr(varied, name), [getattr(single, name) for single in singles])
    np.testing.assert_array_equal(varied.matrix_unit.macs, [2048, 4096, 8192])
    unchanged = {field.name for field in fields(base)} - {"matrix_unit", "memory"}
    assert all(getattr(varied, name) == getattr(base, name) for name in unchanged)
    for change, message in (
        ({"memory__bandwidth_gb_s": np.array([32.0, np.nan, -1.0])}, "bandwidth_gb_s must be .*, got nan$"),
        ({"matrix_unit__rows": np.array([8, 0] * 1000)}, "rows must be .*, got 0$"),
        ({"matrix_unit__rows": np.array([8, 8.5])}, "rows must be a whole number .*, got 8.5$"),
        ({"matrix_unit__rows": np.array([16, 2])}, "mv_outputs must be at most rows [*] mm_outputs = 32,.* got 64$"),
    ):
        with pytest.raises(PmpdError, match=message):
            base.varied(**change)


def _file(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path
