"""`pmpd_any`: any precision and number of groups on the least processor of each architecture, against numpy."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import check
from kernel_programs import Case, Program, build_program, every_half

from pmpd.runtime.format.bitplanes import pack
from pmpd.tvm_kernels.library.compile import compile_kernels
from pmpd.tvm_kernels.targets import TARGETS, host_target


@pytest.fixture(
    scope="module",
    params=["x86-64-v3", pytest.param("aarch64-linux", marks=pytest.mark.slow)],
    ids=["x86_64", "aarch64"],
)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return build_program([], TARGETS[request.param], tmp_path_factory.mktemp("any"))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    bits, G, M = draw(st.integers(1, 8)), draw(st.integers(1, 5)), draw(st.integers(1, 17))
    N, K = draw(st.integers(1, 9)), draw(st.one_of(st.integers(1, 100), st.integers(400, 1700)))
    begin = draw(st.integers(0, N - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Case(
        x=rng.standard_normal((M, K), dtype=np.float32),
        planes=pack(rng.integers(0, 2**bits, (N, K), dtype=np.uint8), bits),
        codebook=rng.standard_normal((N, G, 2**bits)).astype(np.float16),
        begin=begin,
        end=draw(st.integers(begin + 1, N)),
        slack=draw(st.integers(0, 70)),
        front=draw(st.booleans()),
    )


@settings(max_examples=200)
@given(cases())
def test_agrees_with_numpy(program: Program, case: Case) -> None:
    check(None, case, *program.run(None, [case]))


@pytest.mark.parametrize("bits", range(1, 9))
def test_float16_is_read_exactly(program: Program, bits: int) -> None:
    case = every_half(bits)
    (y,) = program.run(None, [case])
    assert np.array_equal(y, case.weight.T)


@pytest.mark.parametrize("G", range(1, 8))
def test_every_column_has_its_group(program: Program, G: int) -> None:
    """One-hot activations; 43 bytes of a row are 43, 22, 15, 11, 9, 8 or 7 a group."""
    K = 337
    rng = np.random.default_rng(G)
    codebook = rng.standard_normal((3, G, 32)).astype(np.float16)
    planes = pack(rng.integers(0, 32, (3, K), dtype=np.uint8), 5)
    case = Case(x=np.eye(K, dtype=np.float32), planes=planes, codebook=codebook, begin=0, end=3)
    (y,) = program.run(None, [case])
    assert np.array_equal(y, case.weight.T)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_a_finite_activation_gives_not_a_finite_result(program: Program, value: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 600), dtype=np.float32)
    x[1, 77] = value
    planes = pack(rng.integers(0, 16, (5, 600), dtype=np.uint8), 4)
    case = Case(x=x, planes=planes, codebook=rng.standard_normal((5, 2, 16)).astype(np.float16), begin=0, end=5)
    (y,) = program.run(None, [case])
    assert np.isfinite(y).tolist() == [[True] * 5, [False] * 5]


def test_codebooks_beyond_int32(tmp_path: Path) -> None:
    """Row 70,000 of 40,000 groups: their product does not fit 32 bits. Only what that row reads is in memory."""
    target = TARGETS[host_target() or "x86-64-v4"]
    if platform.machine() != target.arch:
        pytest.skip("no target is for this machine")
    row, groups, bits = 70_000, 40_000, 1
    _, portable = compile_kernels(target, [], directory=tmp_path)
    library = tmp_path / "portable.so"
    # As `build_library` does: for other options zig would build its own runtime once more.
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", target.zig, "-mcpu=baseline", "-O2", "-fPIC"]
    zig += ["-shared", "-s", "-o", str(library)]
    subprocess.run([*zig, str(portable)], check=True)
    codebook = np.array([2.0, 3.0], np.float16)
    planes = np.full(64, 0b10, np.uint8)
    x, y = np.ones(8, np.float32), np.zeros(row + 1, np.float32)

    def pointer(array: np.ndarray, *, before: int = 0) -> ctypes.c_void_p:
        """Return where an array would begin of which this is what follows `before` bytes."""
        return ctypes.c_void_p((array.ctypes.data - before) % 2**64)

    arrays = pointer(planes, before=row * 64), ctypes.c_int64(0), pointer(codebook, before=row * groups * 2**bits * 2)
    sizes = map(ctypes.c_int32, (bits, groups, 1, 8, 1, 1, row, row + 1))
    ctypes.CDLL(str(library)).pmpd_any(*arrays, pointer(x), pointer(y), ctypes.c_int64(0), *sizes)
    assert y[row] == 7 * 2 + 3
