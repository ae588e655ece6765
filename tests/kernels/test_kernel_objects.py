"""What compiled kernels are made of: only instructions that their processors have; and how compiling them fails."""

from __future__ import annotations

import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pmpd.runtime.errors import PmpdError
from pmpd.tvm_kernels.codegen.isa import ISAS, Isa
from pmpd.tvm_kernels.library import compile as compile_module
from pmpd.tvm_kernels.library.compile import _compile_all, _Unit, compile_kernels
from pmpd.tvm_kernels.library.link import SOURCES, build_library
from pmpd.tvm_kernels.ops import OPERATORS, kernels_of
from pmpd.tvm_kernels.ops.base import Demand
from pmpd.tvm_kernels.targets import TARGETS

# What `pmpd_cpu_features` in ort_ops/cpu.c asks for, in the assembler's words, as far as it adds instructions.
V3 = "generic64+avx2+fma+f16c+bmi+bmi2+lzcnt+movbe+popcnt+cx16"
V4 = f"{V3}+avx512f+avx512bw+avx512cd+avx512dq+avx512vl"
PROCESSORS = {
    "any": "generic64",
    "avx2": V3,
    "avxvnni": f"{V3}+avx_vnni",
    "avx512": V4,
    "avx512vnni": f"{V4}+avx512_vnni",
    "avx512vbmi": f"{V4}+avx512_vnni+avx512_vbmi",
}
WITHOUT_EVEX = ("any", "avx2", "avxvnni")  # an instruction that begins with 0x62 needs AVX-512

needs_binutils = pytest.mark.skipif(
    platform.machine() != "x86_64" or None in (shutil.which("objdump"), shutil.which("as")),
    reason="needs objdump and as for x86-64, of GNU binutils",
)

# As test_kernels.py has them in its default run, so that they are compiled once.
BITS = {"any": (), "avx2": (1, 2, 3, 4, 6), "avx512vbmi": (1, 2, 3, 4, 6)}
OTHER_BITS = (3, 6)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return the bytes, in hexadecimal, and the text of all instructions of an object file."""
    listing = subprocess.run(["objdump", "-dw", str(path)], capture_output=True, text=True, check=True).stdout
    lines = [line.split("\t") for line in listing.splitlines() if line.startswith(" ")]
    return [(code.strip(), text.partition("#")[0].strip()) for _, code, text in lines]


def refusals(texts: list[str], processor: str) -> list[str]:
    """Return what the assembler, which knows who has which, says against instructions. Jumps and padding anyone has."""
    source = "".join(f"{text}\n" for text in texts if "<" not in text and "nop" not in text)
    command = ["as", "--64", f"-march={processor}", "-o", "/dev/null", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    return [line for line in done.stderr.splitlines() if "Error" in line]


@needs_binutils
@pytest.mark.full
@pytest.mark.parametrize("isa", ["any", *TARGETS["x86-64-v4"].isa])
def test_objects_keep_to_their_instruction_set(isa: str, tmp_path: Path) -> None:
    target = TARGETS["x86-64-v4"]
    names = (isa, "portable") if isa == "any" else (isa,)
    demand = Demand(precisions=BITS.get(isa, OTHER_BITS), head_dims=[64])
    kernels = [kernel for kernel in kernels_of(target, demand) if kernel.isa.name in names]
    paths = compile_kernels(target, kernels, directory=tmp_path)[1:]
    endings = ("pmpd_any", "__portable") if isa == "any" else (f"__{isa}",)
    found = [path for path in paths if path.name.partition("-")[0].endswith(endings)]
    assert len(found) > len(kernels)  # and those that lay out activations, and attention
    for path in found:
        code = instructions(path)
        assert len(code) > 50
        assert refusals([text for _, text in code], PROCESSORS[isa]) == [], path.name
        if isa in WITHOUT_EVEX:
            assert not [text for hexadecimal, text in code if hexadecimal.startswith("62 ")], path.name


@needs_binutils
def test_the_check_finds_what_a_processor_lacks() -> None:
    wanted = {
        "pshufb %xmm0,%xmm1": V3,
        "vpshufb %ymm0,%ymm1,%ymm2": V3,
        "shlx %rax,%rbx,%rcx": V3,
        "{vex} vpdpbusd %ymm0,%ymm1,%ymm2": PROCESSORS["avxvnni"],
        "vpternlogd $202,%zmm0,%zmm1,%zmm2": V4,
        "vpdpbusd %zmm0,%zmm1,%zmm2": PROCESSORS["avx512vnni"],
        "vpermb %zmm0,%zmm1,%zmm2": PROCESSORS["avx512vbmi"],
    }
    ladder = ["generic64", V3, PROCESSORS["avxvnni"], V4, PROCESSORS["avx512vnni"], PROCESSORS["avx512vbmi"]]
    for text, processor in wanted.items():
        assert refusals([text], processor) == []
        assert len(refusals([text], ladder[ladder.index(processor) - 1])) == 1


@pytest.mark.full
def test_the_first_failure_ends_all_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    script = "import sys, time; 'pmpd_broken' in sys.stdin.readline() or time.sleep(600)"

    class Worker(subprocess.Popen[bytes]):
        def __init__(self, _: list[str], **options: Any) -> None:
            super().__init__([sys.executable, "-c", script], **options)
            started.append(self)

    monkeypatch.setattr(compile_module.subprocess, "Popen", Worker)
    monkeypatch.setattr(compile_module, "available_threads", lambda: 3)
    units = {tmp_path / name: _Unit(name, "", None, "", "", ()) for name in ("pmpd_slow", "pmpd_broken", "pmpd_other")}
    with pytest.raises(PmpdError, match="TVM fails to compile the kernel pmpd_broken"):
        list(_compile_all(units))
    assert len(started) == 3
    assert None not in [worker.returncode for worker in started]


@pytest.mark.parametrize("file", ["library/worker.py", "codegen/emit.py", "ops/matmul/gemv.py"])
def test_objects_are_cached_by_the_code_that_makes_them(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = _Unit("pmpd_any", "BitplaneMatMul", None, "x86_64-linux-gnu", "generic", ())
    before = compile_module._cached(unit)
    assert compile_module._cached(unit) == before
    compile_module._code_digest.cache_clear()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: read_bytes(self) + b"\nchanged = 1\n" * str(self).endswith(file)
    )
    changed = compile_module._cached(unit)
    compile_module._code_digest.cache_clear()
    assert changed != before


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_operator_library_links(name: str, tmp_path: Path) -> None:
    """Of every target: zig refuses names that nothing defines."""
    path = tmp_path / "libpmpd_ops.so"
    build_library(name, precisions=(3,), output=path)
    (machine,) = struct.unpack_from("<H", path.read_bytes(), 18)  # e_machine of the ELF header
    assert machine == {"x86_64": 62, "aarch64": 183}[TARGETS[name].arch]


def test_instruction_sets_are_those_of_the_c_part() -> None:
    """The names in isa.def, in the same order, least first."""
    text = (SOURCES / "isa.def").read_text(encoding="utf-8")
    names = re.findall(r"^ISA\((\w+), (\d+)\)", text, re.MULTILINE)
    assert [name for name, _ in names] == [isa.name for arch in ("x86_64", "aarch64") for isa in _least_first(arch)]
    assert len({bit for _, bit in names}) == len(names)
    assert {need for isa in ISAS for need in isa.needs} == {name for name, _ in names}
    assert all(isa.name in isa.needs for isa in ISAS)


def _least_first(arch: str) -> list[Isa]:
    return [isa for isa in reversed(ISAS) if isa.arch == arch]


def test_operators_are_those_of_the_c_part() -> None:
    """Each is registered in C under its name, with the header that declares its kernels."""
    rows = "".join(path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.c")))
    c_alone = {"BitplaneGather", "BitplaneLogits"}  # they have no kernels of their own
    assert sorted(re.findall(r'\.name = "(\w+)"', rows)) == sorted({*OPERATORS, *c_alone})
    for operator in OPERATORS.values():
        assert f"extern const struct {operator.struct} {operator.array}[];" in (SOURCES / operator.header).read_text()
