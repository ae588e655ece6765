"""Every compiled kernel against numpy, in memory that nothing outside of the arguments can be read from or written to.

The default run has every instruction set: two of them at the precisions that bundles use, the others at two precisions.
The rest, and other tunings than those that ship, is slow to compile. aarch64 runs in qemu. AVX-VNNI's kernels are
tested in the encoding of AVX-512, which differs in the one instruction's first bytes alone, because processors that
have it are the rarest; see `EvexVnni`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import check, off_ties
from kernel_programs import Case, Program, build_program, every_half, other_tunings, shipped_kernels, target_of

from pmpd.runtime.format.bitplanes import pack
from pmpd.tvm_kernels.ops.matmul.kernel import MatmulKernel
from pmpd.tvm_kernels.targets import TARGETS

# x86-64-v3 has some of x86-64-v4's kernels.
TESTED = [TARGETS["x86-64-v4"], TARGETS["aarch64-linux"]]
SHIPPED = [kernel for target in TESTED for kernel in shipped_kernels(target)]
NAMES = {kernel.name for kernel in SHIPPED}
OTHERS = [kernel for target in TESTED for kernel in other_tunings(target) if kernel.name not in NAMES]
# Bits of the kernels in the default run, by instruction set. All have 3, where a code's field is wider than the code,
# and 6, where a code is looked up in several tables of 16.
MAIN_BITS = {"avx512vbmi": (1, 2, 3, 4, 6), "avx2": (1, 2, 3, 4, 6)}
OTHER_BITS = (3, 6)
# Kernels by the program that has them: the quick ones of each architecture, and the rest of each instruction set.
PROGRAMS: dict[str, list[MatmulKernel]] = {}
for kernel in SHIPPED:
    quick = kernel.bits in MAIN_BITS.get(kernel.isa.name, OTHER_BITS)
    PROGRAMS.setdefault(f"quick-{kernel.isa.arch}" if quick else kernel.isa.name, []).append(kernel)
for kernel in OTHERS:
    PROGRAMS.setdefault(kernel.isa.name, []).append(kernel)
QUICK = PROGRAMS["quick-x86_64"]

# N, K, M, begin, end: one row and many, one column and many, tiles that end early, lines that are hardly begun.
SHAPES = [
    (1, 1, 1, 0, 1),
    (37, 2048, 1, 0, 37),
    (1, 8, 1, 0, 1),
    (5, 1000, 2, 1, 4),
    (64, 513, 3, 0, 64),
    (3, 5000, 1, 0, 3),
    (37, 2048, 5, 3, 36),
    (19, 1030, 7, 18, 19),
    (2, 40, 2, 0, 1),
    (33, 2560, 17, 31, 33),
    (8, 530, 300, 0, 8),
    (130, 511, 4, 129, 130),
    (9, 512, 6, 0, 9),
    (6, 4097, 13, 5, 6),
    (5, 64, 2, 3, 4),
    (21, 33, 31, 2, 21),
]

Codebook = npt.NDArray[np.float16]


def random_case(
    rng: np.random.Generator,
    bits: int,
    shape: tuple[int, int, int, int, int],
    *,
    codebook: Codebook | None = None,
    x: npt.NDArray[np.float32] | None = None,
    slack: int = 0,
    front: bool = False,
) -> Case:
    """Return a case of shape (N, K, M, begin, end) with random codes, and what else is not given."""
    N, K, M, begin, end = shape
    if codebook is None:
        codebook = rng.standard_normal((N, 1, 2**bits)).astype(np.float16)
    if x is None:
        x = rng.standard_normal((M, K), dtype=np.float32)
    planes = pack(rng.integers(0, 2**bits, (N, K), dtype=np.uint8), bits)
    return off_ties(Case(x=x, planes=planes, codebook=codebook, begin=begin, end=end, slack=slack, front=front))


def shapes(rng: np.random.Generator, bits: int) -> list[Case]:
    """Every shape, its arrays at the beginning, at the end and at an odd place of accessible memory."""
    places = [(0, False), (0, True), (1, False), (3, True), (17, False)]
    return [
        random_case(rng, bits, shape, slack=slack, front=front)
        for number, shape in enumerate(SHAPES)
        for slack, front in (places[0], places[1 + number % 4])
    ]


def columns(rng: np.random.Generator, bits: int) -> list[Case]:
    """One-hot activations: every result is one weight, at every place in a line and with every code."""
    K = 521
    return [random_case(rng, bits, (3, K, K, 0, 3), x=np.eye(K, dtype=np.float32))]


def codebooks(rng: np.random.Generator, bits: int) -> list[Case]:
    """Codebooks without a range, with the least and the greatest one, with entries of no order."""
    N, entries = 7, 2**bits
    tiny = rng.integers(0, 1024, (N, 1, entries), dtype=np.uint16).view(np.float16)
    largest = rng.choice(np.array([-65504, 65504, 1], np.float16), (N, 1, entries))
    wide = (rng.choice([-1, 1], (N, 1, entries)) * 2.0 ** rng.integers(-24, 15, (N, 1, entries))).astype(np.float16)
    alone = np.zeros((N, 1, entries), np.float16)
    alone[np.arange(N), 0, rng.integers(0, entries, N)] = -0.37
    offset = (1000 + rng.random((N, 1, entries))).astype(np.float16)
    constants = [np.full((N, 1, entries), value, np.float16) for value in (0, -0.0, 1.25, -6e-8, 65504)]
    chosen = [tiny, largest, wide, alone, offset, *constants, -np.sort(np.abs(wide), axis=2)]
    return [random_case(rng, bits, (N, 700, 3, 0, N), codebook=codebook) for codebook in chosen]


def activations(rng: np.random.Generator, bits: int) -> list[Case]:
    """Activations that are zero, that differ by many orders of magnitude, that make every sum as large as it can be."""
    N, M, K = 6, 5, 1100
    noise = rng.standard_normal((M, K), dtype=np.float32)
    outlier = noise.copy()
    outlier[:, 611] = 1e30
    zero_row = noise * np.arange(M, dtype=np.float32)[:, None]
    orders = noise * 10.0 ** rng.integers(-36, 30, (M, K)).astype(np.float32)
    signs = np.sign(noise)
    chosen = [np.zeros_like(noise), zero_row, outlier, orders, noise * np.float32(1e-34), signs]
    cases = [random_case(rng, bits, (N, K, M, 0, N), x=x) for x in chosen]
    # The greatest entry times the greatest activation throughout, of both signs: 16-bit sums of products must hold it.
    book = np.zeros((N, 1, 2**bits), np.float16)
    book[:, :, -1] = 1
    full = pack(np.full((N, K), 2**bits - 1, np.uint8), bits)
    greatest = [np.full((M, K), sign, np.float32) for sign in (1, -1)]
    return cases + [Case(x=x, planes=full, codebook=book, begin=0, end=N) for x in greatest]


def not_finite(rng: np.random.Generator, bits: int) -> list[Case]:
    """Activations with NaN or infinity at the first, some and the last column of one of three rows."""
    N, M, K = 6, 3, 600
    cases = []
    for value in (np.nan, np.inf, -np.inf):
        for column in (0, 77, K - 1):
            x = rng.standard_normal((M, K), dtype=np.float32)
            case = random_case(rng, bits, (N, K, M, 0, N), x=x)
            case.x[1, column] = value
            cases.append(case)
    return cases


SCENARIOS: dict[str, Callable[[np.random.Generator, int], list[Case]]] = {
    function.__name__: function for function in (shapes, columns, codebooks, activations)
}


@pytest.fixture(scope="session")
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    kernels = PROGRAMS[request.param]
    return build_program(kernels, target_of(kernels[0]), tmp_path_factory.mktemp(request.param))


def each(kernels: Callable[[str], list[MatmulKernel]]) -> pytest.MarkDecorator:
    """Return what runs a test for each of the kernels of every program."""
    values = [
        pytest.param(name, kernel, id=kernel.name, marks=[] if name.startswith("quick") else pytest.mark.slow)
        for name in PROGRAMS
        for kernel in kernels(name)
    ]
    return pytest.mark.parametrize(("program", "kernel"), values, indirect=["program"], scope="session")


on_quick_program = pytest.mark.parametrize("program", ["quick-x86_64"], indirect=True)


@cache
def cases_of(scenario: str, bits: int) -> list[Case]:
    return SCENARIOS[scenario](np.random.default_rng(bits), bits)


@each(PROGRAMS.__getitem__)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_agrees_with_numpy(program: Program, kernel: MatmulKernel, scenario: str) -> None:
    cases = cases_of(scenario, kernel.bits)
    for case, y in zip(cases, program.run(kernel, cases), strict=True):
        check(kernel, case, y)


@each(lambda name: [kernel for kernel in PROGRAMS[name] if kernel.accuracy == "exact"])
def test_single_weights_are_exact(program: Program, kernel: MatmulKernel) -> None:
    cases = [every_half(kernel.bits), *cases_of("columns", kernel.bits)]
    for case, y in zip(cases, program.run(kernel, cases), strict=True):
        assert np.array_equal(y, case.weight.T)


@each(PROGRAMS.__getitem__)
def test_not_a_finite_activation_gives_not_a_finite_result(program: Program, kernel: MatmulKernel) -> None:
    """In its own row of activations, and in no other."""
    cases = not_finite(np.random.default_rng(kernel.bits), kernel.bits)
    for case, y in zip(cases, program.run(kernel, cases), strict=True):
        assert not np.isfinite(y[1]).any()
        check(kernel, *(_rows(part, [0, 2]) for part in (case, y)))


def _rows(part: Case | npt.NDArray[np.float32], rows: list[int]) -> Any:
    """Return some rows of activations, or of results."""
    return replace(part, x=np.ascontiguousarray(part.x[rows])) if isinstance(part, Case) else part[rows]


@st.composite
def random_cases(draw: st.DrawFn, kernels: list[MatmulKernel]) -> tuple[MatmulKernel, Case]:
    kernel = draw(st.sampled_from(kernels))
    N, K, M = draw(st.integers(1, 70)), draw(st.integers(1, 1600)), draw(st.integers(1, 14))
    begin = draw(st.integers(0, N - 1))
    shape = N, K, M, begin, draw(st.integers(begin + 1, N))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return kernel, random_case(rng, kernel.bits, shape, slack=draw(st.integers(0, 70)), front=draw(st.booleans()))


@pytest.mark.parametrize(
    ("program", "kernels"),
    [
        pytest.param(*item, id=item[0], marks=[] if item[0].startswith("quick") else pytest.mark.slow)
        for item in PROGRAMS.items()
    ],
    indirect=["program"],
    scope="session",
)
@settings(max_examples=150)
@given(st.data())
def test_agrees_on_any_shape(program: Program, kernels: list[MatmulKernel], data: st.DataObject) -> None:
    kernel, case = data.draw(random_cases(kernels))
    check(kernel, case, *program.run(kernel, [case]))


@on_quick_program
@pytest.mark.parametrize("accuracy", ["exact", "int8"])
def test_one_wrong_code_is_found(program: Program, accuracy: str) -> None:
    kernel = next(kernel for kernel in QUICK if (kernel.bits, kernel.accuracy) == (4, accuracy))
    case = random_case(np.random.default_rng(0), 4, (5, 900, 2, 0, 5))
    other = case.planes.copy()
    other[3, 2, 44] ^= 1  # the last bit of one weight
    (y,) = program.run(kernel, [replace(case, planes=other)])
    with pytest.raises(AssertionError, match=r"first at \[0 2\]"):
        check(kernel, case, y)


@on_quick_program
def test_unwritten_and_stray_results_are_found(program: Program) -> None:
    kernel = QUICK[0]
    case = random_case(np.random.default_rng(0), kernel.bits, (9, 40, 3, 2, 7))
    (y,) = program.run(kernel, [case])
    with pytest.raises(AssertionError, match="missing"):
        check(kernel, replace(case, begin=1), y)
    with pytest.raises(AssertionError, match="outside"):
        check(kernel, replace(case, end=6), y)


@on_quick_program
@pytest.mark.parametrize(("begin", "end"), [(8, 10), (-1, 3)])
def test_access_outside_of_arguments_is_found(program: Program, begin: int, end: int) -> None:
    """Of nine rows: the tenth, or one before the first."""
    kernel = QUICK[0]
    case = random_case(np.random.default_rng(0), kernel.bits, (9, 40, 3, begin, end), front=begin < 0)
    with pytest.raises(AssertionError, match="outside of"):
        program.run(kernel, [case])
