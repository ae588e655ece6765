"""A library as exports make it, at each level of PMPD_MAX_ISA that this machine has: right numbers, right kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tvm")
pytest.importorskip("ziglang")

import numpy as np
from kernel_oracle import check
from kernel_programs import Case
from test_kernels import random_case
from test_operator_library import Reports, model, open_session

from pmpd.tvm_kernels.codegen.isa import ISAS
from pmpd.tvm_kernels.library.link import build_library
from pmpd.tvm_kernels.ops.matmul.kernel import ACCURACIES
from pmpd.tvm_kernels.ops.matmul.tuned import tuned_kernels
from pmpd.tvm_kernels.targets import find_target, host_target

BITS = 3
HOST = host_target()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if HOST is None:
        pytest.skip("no target is for this machine")
    output = tmp_path_factory.mktemp("library") / "libpmpd_ops.so"
    build_library(HOST, precisions=[BITS], output=output)
    return output


@pytest.mark.parametrize("accuracy", ACCURACIES)
@pytest.mark.parametrize("level", [*(find_target(HOST).isa if HOST else ()), "portable"])
def test_a_level_runs_its_own_kernels(
    library: Path, level: str, accuracy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMPD_MAX_ISA", level)
    reports = Reports(library)
    if level not in ("portable", *reports.info()["features"]):
        pytest.skip(f"this processor lacks {level}")
    target = find_target(str(HOST))
    kernels = {kernel.name: kernel for kernel in tuned_kernels(target, target.isa, precisions=[BITS])}
    K = 1000
    session = open_session(library, model(K), threads=2, accuracy=accuracy, session=level)
    for M in (1, 7):
        case: Case = random_case(np.random.default_rng(M), BITS, (70, K, M, 0, 70))
        (y,) = session.run(None, {"X": case.x, "planes": case.planes, "codebook": case.codebook})
        [node] = reports.nodes(level)
        kernel = kernels.get(node["kernel"])
        check(kernel, case, y)
        if level == "portable":
            assert node["kernel"] == "pmpd_any"
        else:
            assert kernel is not None
            assert (kernel.isa.name, kernel.accuracy, kernel.phase) == (level, accuracy, "gemv" if M == 1 else "gemm")


def test_levels_are_ordered_as_the_kernels_are() -> None:
    """A higher level of PMPD_MAX_ISA never loses features, so best first is highest first."""
    names = [isa.name for isa in ISAS]
    for isa in ISAS:
        assert all(names.index(need) >= names.index(isa.name) for need in isa.needs)
