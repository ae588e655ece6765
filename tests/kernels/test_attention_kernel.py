"""Attention over the float16 cache: every compiled kernel against numpy. aarch64 runs in qemu."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_cases import NAN, Case, Floats, Result, check, random_case
from kernel_programs import LACKS_FEATURES, UNTOUCHED, emulator

from pmpd.tvm_kernels.library.compile import compile_kernels
from pmpd.tvm_kernels.library.link import INCLUDE, SOURCES
from pmpd.tvm_kernels.ops.attention.attention import TANH_END, TANH_P, TANH_Q
from pmpd.tvm_kernels.ops.attention.operator import GroupQueryAttention
from pmpd.tvm_kernels.ops.base import Demand
from pmpd.tvm_kernels.targets import TARGETS, Target

pytest.importorskip("tvm")
pytest.importorskip("ziglang")

LARGEST = np.float32(65504)  # of float16
SUBNORMAL = 2.0**-24  # a unit of its subnormal numbers
DIMS = (16, 64, 80)
LARGE = (128,)  # as long to compile as two others: slow, and a program of its own
# x86-64-v3 has some of x86-64-v4's kernels.
PROGRAMS = {"x86-64-v4": (*DIMS, *LARGE), "aarch64-linux": (80,)}
KERNELS: list[tuple[str, Any]] = [
    (name, kernel)
    for name, dims in PROGRAMS.items()
    for kernel in GroupQueryAttention().kernels(TARGETS[name], Demand(head_dims=dims))
]


def kernels(dims: Sequence[int] = (*DIMS, *LARGE)) -> pytest.MarkDecorator:
    """Parametrize a test with the kernels for heads of some sizes, and where they run."""
    chosen = [
        pytest.param(target, kernel, id=kernel.name, marks=[pytest.mark.slow] if kernel.dim in LARGE else [])
        for target, kernel in KERNELS
        if kernel.dim in dims
    ]
    return pytest.mark.parametrize(("target", "kernel"), chosen)


class Programs:
    """A program for each target that holds its kernels, for the least processor of the architecture, and the driver."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def build(self, target: Target, dims: Sequence[int]) -> Path:
        """Compile and link the program of a target and some sizes of heads, once."""
        path = self.directory / f"{target.name}-{dims[-1]}" / "driver"
        if path.exists():
            return path
        path.parent.mkdir()
        kernels = [kernel for name, kernel in KERNELS if name == target.name and kernel.dim in dims]
        files = compile_kernels(target, kernels, directory=path.parent)
        platform_ = [target.zig] if platform.machine() == target.arch else [f"{target.arch}-linux-musl", "-static"]
        compiler = [sys.executable, "-m", "ziglang", "cc", "-target", *platform_, "-mcpu=baseline", "-std=c11", "-O2"]
        sources = [Path(__file__).with_name("attention_driver.c"), SOURCES / "cpu.c", *files]
        subprocess.run([*compiler, "-Wall", "-Wextra", "-Werror", *INCLUDE, "-o", path, *sources], check=True)
        return path

    def run(self, name: str, kernel: Any, cases: Sequence[Case]) -> list[Result]:
        """Run a kernel on cases; what it did not write of y is `UNTOUCHED`."""
        target, isa = TARGETS[name], "any" if kernel.isa.name == "portable" else kernel.isa.name
        done = subprocess.run(
            [*emulator(target, isa), self.build(target, LARGE if kernel.dim in LARGE else DIMS)],
            input=b"".join(case.to_bytes(kernel.name) for case in cases),
            capture_output=True,
            check=False,
        )
        if done.returncode == LACKS_FEATURES:
            pytest.skip(f"this processor lacks {isa}")
        assert done.returncode == 0, done.stderr.decode() or f"exit code {done.returncode}"
        results, data = [], memoryview(done.stdout)
        for case in cases:
            sizes = len(case.qkv) * case.heads * case.dim * 4, case.keys.nbytes, case.values.nbytes
            y, keys, values = (data[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(3))
            data = data[sum(sizes) :]
            caches = (np.frombuffer(part, np.float16).reshape(case.keys.shape) for part in (keys, values))
            results.append(Result(np.frombuffer(y, np.float32).reshape(len(case.qkv), case.heads, case.dim), *caches))
        assert not data
        return results


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("attention"))


def grid(dim: int) -> list[Case]:
    """Return cases of every ratio of heads, few and many tokens, short and long pasts, partial rotation and none."""
    full, half = dim // 2 // 8 * 8, dim // 4 // 8 * 8
    shapes = [
        (1, 1, 1, 0, full),
        (4, 4, 1, 1, half),
        (3, 3, 2, 0, 8),
        (4, 2, 1, 14, full),
        (4, 1, 1, 15, half),
        (8, 2, 1, 16, 8),
        (2, 2, 3, 29, 0),
        (4, 2, 5, 11, half),
        (4, 1, 7, 200, full),
        (2, 1, 16, 0, full),
        (3, 3, 33, 0, half),
        (2, 2, 33, 100, 8),
        (8, 2, 17, 63, full),
        (6, 3, 1, 199, half),
    ]
    return [random_case(dim, *shape, seed=seed) for seed, shape in enumerate(shapes)]


@kernels()
def test_kernels_agree_with_numpy(programs: Programs, target: str, kernel: Any) -> None:
    cases = grid(kernel.dim)
    large = [random_case(kernel.dim, 4, 2, 5, 60, 8, size=size) for size in (1e3, 1e6)]
    low = replace(large[0], keys=np.abs(large[0].keys), qkv=-np.abs(large[0].qkv))  # all scores far below zero
    one_head = replace(random_case(kernel.dim, 6, 3, 3, 20, 8), begin=1, end=2)
    *results, alone = programs.run(target, kernel, [*cases, *large, low, one_head])
    for case, result in zip([*cases, *large, low], results, strict=True):
        check(case, result)
    check(one_head, alone, heads=slice(1, 2))
    for head in (0, 1, 4, 5):
        assert (alone.y[:, head].copy().view(np.uint32) == UNTOUCHED).all()
    for made, before in ((alone.keys, one_head.keys), (alone.values, one_head.values)):
        np.testing.assert_array_equal(made[[0, 2]], before[[0, 2]])


@kernels((64, 80))
def test_a_long_context(programs: Programs, target: str, kernel: Any) -> None:
    case = random_case(kernel.dim, 2, 1, 2, 4094, 8)
    check(case, programs.run(target, kernel, [case])[0])


@kernels()
def test_windows(programs: Programs, target: str, kernel: Any) -> None:
    """Windows of one position, less than a line of scores, more, as many as there are and more than that."""
    cases = [
        replace(case, window=window, softcap=softcap)
        for seed, case in enumerate(grid(kernel.dim))
        for window, softcap in ((1, 0.0), (3, 2.0), (16, 0.0), (case.past + len(case.qkv) - seed % 2, 0.0), (500, 0.0))
        if window
    ]
    for case, result in zip(cases, programs.run(target, kernel, cases), strict=True):
        check(case, result)


@kernels((64, 80))
def test_what_lies_outside_of_a_window_is_not_read(programs: Programs, target: str, kernel: Any) -> None:
    """NaN reaches no result, although queries of two tokens and more are computed together."""
    case = replace(random_case(kernel.dim, 4, 1, 2, 200, 8), window=33)
    before = case.past + 1 - case.window  # what the first token sees begins here
    keys, values = case.keys.copy(), case.values.copy()
    keys[:, :before], values[:, :before] = NAN, NAN
    want, got = programs.run(target, kernel, [case, replace(case, keys=keys, values=values)])
    np.testing.assert_array_equal(got.y, want.y)


@kernels()
def test_softcaps(programs: Programs, target: str, kernel: Any) -> None:
    """Scores far below the cap, about it and far above it; and a cap so high that it changes nothing."""
    shapes = [(4, 2, 1, 14, 8), (3, 3, 33, 0, 8), (2, 1, 5, 60, 0)]
    cases = [
        replace(random_case(kernel.dim, *shape, size=size, seed=seed), softcap=softcap)
        for seed, shape in enumerate(shapes)
        for size, softcap in ((0.01, 50.0), (1.0, 50.0), (30.0, 50.0), (1e4, 50.0), (3.0, 1.0), (1.0, 1e6))
    ]
    for case, result in zip(cases, programs.run(target, kernel, cases), strict=True):
        check(case, result)
    high = [replace(case, softcap=softcap) for case in cases[1::6] for softcap in (0.0, 1e7)]
    results = programs.run(target, kernel, high)
    for without, capped in zip(results[::2], results[1::2], strict=True):
        np.testing.assert_allclose(capped.y, without.y, atol=2e-5)


def test_tanh_is_within_four_in_ten_million_of_itself() -> None:
    """The kernels' formula in float32 without fused operations; with them it is no worse."""
    x = np.concatenate([np.linspace(0, TANH_END, 500_001), np.logspace(-8, 0, 50_001)]).astype(np.float32)
    p, q = (np.polynomial.polynomial.polyval(x * x, np.array(c, np.float32)) for c in (TANH_P, TANH_Q))
    y, want = (x * p / q).astype(np.float64), np.tanh(x.astype(np.float64))
    assert p.dtype == np.float32
    assert (np.abs(y - want) <= 4e-7 * want).all()
    assert 1 - np.tanh(TANH_END) < 2**-24


@kernels((64,))
def test_nan_is_not_capped(programs: Programs, target: str, kernel: Any) -> None:
    case = replace(random_case(kernel.dim, 4, 2, 6, 20, 0), softcap=50.0)
    case.qkv[3, 5] = np.nan
    [result] = programs.run(target, kernel, [case])
    assert np.argwhere(~np.isfinite(result.y).all(axis=2)).tolist() == [[3, 0]]


def half_edges() -> Floats:
    """Return every finite float16, the midpoints between them, and what lies next to those, in float32."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[1:] + halves[:-1]) / 2
    positive = np.concatenate([halves, middles, np.nextafter(middles, 0), np.nextafter(middles, LARGEST)])
    return np.concatenate([positive, -positive])


@kernels((64, 80))
def test_cache_rounds_as_numpy_does(programs: Programs, target: str, kernel: Any) -> None:
    """Of one position y is the value, so this reads every float16 too.

    The portable kernel rounds subnormal numbers twice, and may so take one next to a midpoint for the midpoint.
    """
    numbers, dim = half_edges(), kernel.dim
    G = -(-len(numbers) // dim)
    kv = np.resize(numbers, (G, dim))
    empty = np.full((G, 1, dim), NAN)
    none = np.zeros((1, 0), np.float32)
    qkv = np.concatenate([np.zeros_like(kv), kv, kv]).reshape(1, -1)
    case = Case(qkv=qkv, keys=empty, values=empty, cos=none, sin=none, past=0, heads=G, scale=1.0, end=G)
    [result] = programs.run(target, kernel, [case])
    want = kv.astype(np.float16)
    for made in (result.keys, result.values):
        exact = made[:, 0].view(np.uint16) == want.view(np.uint16)
        if kernel.isa.name == "portable":
            exact |= np.abs(made[:, 0].astype(np.float64) - kv) <= (0.5 + 2**-13) * SUBNORMAL
        assert exact.all()
    np.testing.assert_array_equal(result.y[0], result.values[:, 0].astype(np.float32))


@kernels((64, 80))
def test_what_float16_cannot_hold(programs: Programs, target: str, kernel: Any) -> None:
    qkv = np.zeros((1, 3 * kernel.dim), np.float32)
    qkv[0, -5:] = 65519, 65520, -65520, 1e30, np.nan
    empty = np.zeros((1, 1, kernel.dim), np.float16)
    none = np.zeros((1, 0), np.float32)
    case = Case(qkv=qkv, keys=empty, values=empty, cos=none, sin=none, past=0, heads=1, scale=1.0, end=1)
    [result] = programs.run(target, kernel, [case])
    for made in (result.values[0, 0], result.y[0, 0]):
        np.testing.assert_array_equal(made[-5:], np.array([65504, np.inf, -np.inf, np.inf, np.nan], np.float32))


@kernels()
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_is_not_finite_stays_so(programs: Programs, target: str, kernel: Any, part: str, value: float) -> None:
    """A query reaches its own result, a key or value those of its token and all later ones; no other head's."""
    M, heads, kv_heads, dim = 6, 4, 2, kernel.dim
    case = random_case(dim, heads, kv_heads, M, 20, 0)
    column = {"query": 0, "key": heads * dim, "value": (heads + kv_heads) * dim}[part] + 5
    case.qkv[3, column] = value
    [result] = programs.run(target, kernel, [case])
    finite = np.isfinite(result.y).all(axis=2)  # (M, heads)
    if part == "query":
        assert np.argwhere(~finite).tolist() == [[3, 0]]
        return
    assert finite[:, heads // kv_heads :].all()
    later = finite[3:, : heads // kv_heads]
    if part == "key" and not np.isnan(value):  # a score of minus infinity is a weight of 0, which loses nothing
        later = later[case.qkv[3:].reshape(3, -1, dim)[:, : heads // kv_heads, 5] * value > 0]
    assert not later.any()
