"""The benchmark of kernels: its JSON, its table, and that samples are compared with the reads around them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

from click.testing import CliRunner

from pmpd.runtime.format.bitplanes import row_stride
from pmpd.tvm_kernels.bench import measure
from pmpd.tvm_kernels.bench.cli import main
from pmpd.tvm_kernels.bench.measure import machine_isas, random_weights, take_turns
from pmpd.tvm_kernels.bench.shapes import Shape
from pmpd.tvm_kernels.targets import find_target, host_target

COLUMNS = {"kernel", "p", "n", "k", "m", "threads", "microseconds", "gbs", "of_read"}


@pytest.mark.full
def test_a_run_writes_what_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isas = machine_isas(find_target(host_target() or "x86-64-v3"))
    if not isas:
        pytest.skip("no kernels are made for this machine")
    monkeypatch.setattr(measure, "WORKING_SET", 1 << 18)
    monkeypatch.setattr(measure, "READ_BYTES", 1 << 16)
    path = tmp_path / "bench.json"
    wanted = ["--shape", "50,512", "--bits", "2", "--m", "1,3", "--accuracy", "int8", "--isa", isas[-1]]
    with monkeypatch.context() as environment:
        environment.setenv("PMPD_MAX_ISA", "")  # restored afterwards: the command sets it
        result = CliRunner().invoke(main, [*wanted, "--threads", "2", "--json", str(path)])
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    assert set(document) == {"read_gbs", "rows"}
    assert document["read_gbs"] > 0
    rows = document["rows"]
    assert all(set(row) == COLUMNS for row in rows)
    assert all(min(row["microseconds"], row["gbs"], row["of_read"]) > 0 for row in rows)
    assert {(row["n"], row["k"], row["threads"]) for row in rows} == {(50, 512, 2)}
    for m, phase in ((1, "gemv"), (3, "gemm")):
        alone, operator, *peers = [row for row in rows if row["m"] == m]
        assert alone["kernel"].startswith(f"pmpd_{phase}_qs8w2_")
        assert alone["kernel"].endswith(f"__{isas[-1]}")
        assert operator["kernel"] == f"BitplaneMatMul/{alone['kernel']}"
        assert [(peer["kernel"], peer["p"]) for peer in peers] == [
            *((f"MatMulNBits/block{block}", bits) for bits in (2, 4, 8) for block in (128, 32)),
            ("MatMul/float32", 32),
        ]
        assert all(row["kernel"] in result.stdout for row in (alone, operator, *peers))
    assert result.stdout.count("plain read of memory: ") == 2
    assert "[2/2] 50x512, 3 rows of activations" in result.stderr


def test_samples_are_compared_with_the_reads_around_them() -> None:
    speeds = iter([10.0, 20.0, 40.0, 80.0, 10.0])
    taken = take_turns([lambda: [1.0, 2.0], lambda: [4.0, 8.0]], lambda: next(speeds), rounds=2)
    around = np.sort(np.concatenate([samples.read_gbs for samples in taken]))
    assert around.tolist() == [15.0, 30.0, 45.0, 60.0]
    first, second = taken
    assert first.parts == 2
    # Parts of one and of eight units in 1 s and 2 s: 1 and 4 a second.
    assert first.rate([1, 8]) == pytest.approx(2.0)
    assert second.rate([1, 8]) == pytest.approx(0.5)
    expected = np.median(4e9 / 1.0 / first.read_gbs) / 1e9
    assert first.of_read([4_000_000_000, 8_000_000_000]) == pytest.approx(expected)


@pytest.mark.parametrize("shapes", [[Shape(64, 512)], [Shape(64, 512), Shape(30, 1000), Shape(5000, 4096)]])
def test_weights_fill_the_working_set_and_share_nothing(
    shapes: Sequence[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "WORKING_SET", 1 << 20)
    made = random_weights(shapes, 3)
    for weights, shape in zip(made, shapes, strict=True):
        matrix = 3 * shape.n * row_stride(shape.k)
        assert weights.planes.shape[1:] == (3, shape.n, row_stride(shape.k))
        assert weights.copies == max(1, (1 << 20) // (matrix * len(shapes)))
        assert weights.codebook.shape == (weights.copies, shape.n, 1, 8)
        assert weights.matrix_bytes == matrix + shape.n * 16
        assert weights.planes.ctypes.data % 64 == 0
    for one, other in pairwise(made):
        assert one.planes.ctypes.data + one.planes.nbytes == other.planes.ctypes.data
    assert len({bytes(planes) for planes in made[0].planes}) == made[0].copies


def test_an_unknown_highest_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMPD_MAX_ISA", "")
    result = CliRunner().invoke(main, ["--isa", "sse2"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: PMPD_MAX_ISA is 'sse2': choose one of portable, ")
