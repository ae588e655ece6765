"""How the operator library is linked, what it shows and needs, and that it finds out what a processor can do."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scalar_library import KERNELS, link

from pmpd.runtime.errors import MissingExtraError, PmpdError
from pmpd.tvm_kernels.library import link as library_module
from pmpd.tvm_kernels.library.compile import Progress
from pmpd.tvm_kernels.library.link import build_library, link_library
from pmpd.tvm_kernels.targets import TARGETS, Target, host_target

pytestmark = pytest.mark.full

DRIVER = Path(__file__).with_name("scalar_driver.c")
MACHINES = {"x86_64": "X86-64", "aarch64": "AArch64"}  # as readelf calls them


@pytest.fixture
def host() -> Target:
    target = host_target()
    if target is None:
        pytest.skip("no target is for this machine")
    return TARGETS[target]


@pytest.fixture
def no_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module.importlib.util, "find_spec", lambda _name: None)


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def target_of(library: Path) -> str:
    """Load a library and return the target that it says it is for."""
    info = ctypes.CDLL(str(library)).pmpd_ops_info
    info.restype = ctypes.c_char_p
    return str(json.loads(info())["target"])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_library_shows_and_needs_little(tmp_path: Path, target: Target) -> None:
    library = link(tmp_path / "libpmpd_ops.so", target)
    if not shutil.which("nm") or not shutil.which("readelf"):
        pytest.skip("needs nm and readelf, of binutils")
    symbols = run("nm", "-D", "--defined-only", library).split()[2::3]
    assert set(symbols) == {"RegisterCustomOps", "pmpd_ops_info", "pmpd_ops_report", "pmpd_ops_reset"}
    needed = {line.split("[")[1].rstrip("]") for line in run("readelf", "-d", library).splitlines() if "NEEDED" in line}
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert MACHINES[target.arch] in run("readelf", "-h", library)


def test_library_runs_on_old_systems(tmp_path: Path, host: Target) -> None:
    pytest.importorskip("ziglang", reason="only zig links against an old glibc")
    if not shutil.which("readelf"):
        pytest.skip("needs readelf, of binutils")
    words = run("readelf", "--version-info", "--wide", link(tmp_path / "libpmpd_ops.so", host)).split()
    versions = {tuple(map(int, word.split("_")[1].split("."))) for word in words if word.startswith("GLIBC_")}
    assert versions
    assert max(versions) <= (2, 17)


def test_library_is_compiled_for_the_least_processor(tmp_path: Path) -> None:
    if not shutil.which("objdump"):
        pytest.skip("needs objdump, of binutils")
    code = run("objdump", "-d", "--no-show-raw-insn", link(tmp_path / "libpmpd_ops.so", TARGETS["x86-64-v4"]))
    assert "%xmm0" in code
    # Neither wide registers nor AVX, all of whose instructions begin with a v.
    assert not [line for line in code.splitlines() if "%ymm" in line or "%zmm" in line or "\tv" in line]


@pytest.mark.parametrize(
    ("arch", "processor", "said"),
    [
        ("aarch64", "cortex-a53", "neon int8_4_one agrees"),
        ("aarch64", "neoverse-n1", "neon dotprod int8_4_one agrees"),
        ("x86_64", "Nehalem", "exact_4_one agrees"),
        ("x86_64", "Haswell", "avx2 int8_4_one agrees"),
    ],
)
def test_other_processors(tmp_path: Path, arch: str, processor: str, said: str) -> None:
    emulator = shutil.which(f"qemu-{arch}")
    if not emulator:
        pytest.skip(f"needs qemu-{arch}, of Debian's qemu-user")
    pytest.importorskip("ziglang", reason="needs a cross compiler: the package ziglang")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-gnu.2.17", "-mcpu=baseline"]
    options = [
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fno-builtin",
        "-ffunction-sections",
        "-fdata-sections",
        *library_module.INCLUDE,
    ]
    for source in (DRIVER, KERNELS, library_module.SOURCES / "cpu.c", library_module.SOURCES / "matmul.c"):
        run(*zig, *options, "-c", source, "-o", tmp_path / f"{source.stem}.o")
    run(*zig, "-nostdlib", "-static", "-Wl,--gc-sections", *tmp_path.glob("*.o"), "-o", tmp_path / "driver")
    assert run(emulator, "-cpu", processor, tmp_path / "driver") == said


def test_build_compiles_and_links(tmp_path: Path, host: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    asked: list[tuple[Target, set[int | None], set[int | None]]] = []

    def compile_kernels(target: Target, kernels: Sequence[Any], *, directory: Path, progress: Progress) -> list[Path]:
        bits, dims = ({getattr(kernel, name, None) for kernel in kernels} for name in ("bits", "dim"))
        asked.append((target, bits, dims))
        return [Path(shutil.copy(KERNELS, directory))]

    link(tmp_path / "libpmpd_ops.so", host)  # skips if there is no compiler
    monkeypatch.setattr(library_module, "compile_kernels", compile_kernels)
    output = tmp_path / "new" / "folder" / "libpmpd_ops.so"
    build_library(host.name, precisions=(4, 2), head_dims=(64,), output=output)
    assert asked == [(host, {2, 4, None}, {64, None})]
    assert target_of(output) == host.name
    assert list(output.parent.iterdir()) == [output]


def test_unknown_target() -> None:
    with pytest.raises(PmpdError, match="unknown target 'x86-64-v5': choose one of x86-64-v4, x86-64-v3, aarch64"):
        build_library("x86-64-v5", precisions=[4], output=Path("libpmpd_ops.so"))


@pytest.mark.usefixtures("no_zig")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library_module.shutil, "which", lambda _name: None)
    for target in TARGETS:
        with pytest.raises(MissingExtraError, match="ziglang is not installed"):
            build_library(target, precisions=[4], output=tmp_path / "libpmpd_ops.so")


@pytest.mark.usefixtures("no_zig")
def test_compiler_of_the_system(tmp_path: Path, host: Target) -> None:
    """Without zig the host's own compiler links for the host, and only for it."""
    assert target_of(link(tmp_path / "libpmpd_ops.so", host)) == host.name
    other = next(target for target in TARGETS.values() if target.arch != host.arch)
    with pytest.raises(MissingExtraError, match="ziglang is not installed"):
        link_library(other, [KERNELS], output=tmp_path / "other.so")


@pytest.mark.parametrize(
    ("source", "reason"), [("int pmpd_any(;", "error: "), ("int unfinished;", "undefined (symbol|reference)")]
)
def test_failed_link_says_why_and_leaves_the_old_file(tmp_path: Path, host: Target, source: str, reason: str) -> None:
    broken, output = tmp_path / "kernels.c", link(tmp_path / "libpmpd_ops.so", host)
    broken.write_text(source, encoding="utf-8")
    before = output.read_bytes()
    with pytest.raises(PmpdError, match=rf"^\w+ cannot link {output}: .*{reason}") as caught:
        link_library(host, [broken], output=output)
    assert "\n" not in str(caught.value)
    assert output.read_bytes() == before
    assert set(tmp_path.iterdir()) == {broken, output}


def test_unwritable_output(tmp_path: Path, host: Target) -> None:
    link(tmp_path / "file", host)
    with pytest.raises(PmpdError, match=r"cannot write .* choose another place"):
        link_library(host, [KERNELS], output=tmp_path / "file" / "libpmpd_ops.so")
