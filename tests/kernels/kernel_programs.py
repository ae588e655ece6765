"""Compiled kernels as programs: what the kernel tests run, on this machine or in qemu's emulation of another."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pmpd.runtime.format.bitplanes import dequantize, pack
from pmpd.tvm_kernels.codegen.isa import AvxVnni
from pmpd.tvm_kernels.library.compile import compile_kernels
from pmpd.tvm_kernels.library.link import INCLUDE, SOURCES
from pmpd.tvm_kernels.ops.matmul.kernel import MatmulKernel
from pmpd.tvm_kernels.ops.matmul.tuned import tuned_kernels
from pmpd.tvm_kernels.ops.matmul.tuning import Tuning
from pmpd.tvm_kernels.targets import TARGETS, Target

Floats = npt.NDArray[np.float32]

UNTOUCHED = np.uint32(0xFFFFFFFF)  # what an output holds before a kernel writes it
DRIVER = Path(__file__).with_name("kernel_driver.c")
LACKS_FEATURES = 77  # the driver's exit code
# The least processors that qemu knows with and without dot products: an instruction of a later one ends the program.
PROCESSORS = {"neon": "cortex-a53", "dotprod": "neoverse-n1", "any": "cortex-a53"}


class EvexVnni(AvxVnni):
    """AVX-VNNI's kernels with its one instruction in the encoding of AVX-512, which more processors have."""

    needs = ("avx512", "avx512vnni")
    attributes = ("+avx512vl", "+avx512vnni")


EVEX_VNNI = EvexVnni()


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One call: x float32 [M, K] times planes uint8 [p, N, S] under codebook float16 [N, G, 2^p], rows [begin, end).

    Begin is below end. Arrays lie `slack` elements before a page without access, or behind one if `front`.
    """

    x: Floats
    planes: npt.NDArray[np.uint8]
    codebook: npt.NDArray[np.float16]
    begin: int
    end: int
    slack: int = 0
    front: bool = False

    @property
    def weight(self) -> Floats:
        """The float32 weights [N, K]."""
        return dequantize(self.planes, self.codebook, self.x.shape[1])

    def to_bytes(self, kernel: str) -> bytes:
        """Return the case as `kernel_driver.c` reads it."""
        bits, N, _ = self.planes.shape
        M, K = self.x.shape
        numbers = bits, self.codebook.shape[1], N, K, M, self.begin, self.end, self.slack, self.front
        header = struct.pack("96s9i", kernel.encode(), *numbers)
        return b"".join([header, self.x.tobytes(), self.planes.tobytes(), self.codebook.tobytes()])


def every_half(bits: int) -> Case:
    """Return the case whose results are all finite float16 numbers, from one-hot activations."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    codebook = np.where(np.isfinite(halves), halves, np.float16(0)).reshape(-1, 1, 2**bits)
    codes = np.tile(np.arange(2**bits, dtype=np.uint8), (len(codebook), 1))
    x = np.eye(2**bits, dtype=np.float32)
    return Case(x=x, planes=pack(codes, bits), codebook=codebook, begin=0, end=len(codebook))


@dataclass(frozen=True)
class Program:
    """An executable file with kernels of one architecture in it."""

    target: Target
    path: Path

    def run(self, kernel: MatmulKernel | None, cases: Sequence[Case]) -> list[Floats]:
        """Return y [M, N] of every case; without a kernel those of `pmpd_any`. What was not written is `UNTOUCHED`."""
        name, isa = (kernel.name, kernel.isa.name) if kernel else ("pmpd_any", "any")
        done = subprocess.run(
            [*emulator(self.target, isa), str(self.path)],
            input=b"".join(case.to_bytes(name) for case in cases),
            capture_output=True,
            check=False,
        )
        if done.returncode == LACKS_FEATURES:
            pytest.skip(f"this processor lacks {isa}")
        assert done.returncode == 0, done.stderr.decode() or f"exit code {done.returncode}"
        shapes = [(case.x.shape[0], case.planes.shape[1]) for case in cases]
        ends = np.cumsum([M * N for M, N in shapes])
        values = np.frombuffer(done.stdout, np.float32)
        assert len(values) == ends[-1]
        return [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes, strict=True)]


def emulator(target: Target, isa: str) -> list[str]:
    """Return what to put before a program of a target to run it here."""
    if platform.machine() == target.arch:
        return []
    found = shutil.which(f"qemu-{target.arch}")
    if found is None or isa not in PROCESSORS:
        pytest.skip(f"needs a {target.arch} machine" + (f" or qemu-{target.arch}" if isa in PROCESSORS else ""))
    return [found, "-cpu", PROCESSORS[isa]]


def target_of(kernel: MatmulKernel) -> Target:
    """Return the first target whose library has a kernel's instruction set."""
    return next(target for target in TARGETS.values() if kernel.isa.name in target.isa)


def shipped_kernels(target: Target) -> list[MatmulKernel]:
    """Return the kernels of a target's library that can be tested: AVX-VNNI's in the other encoding."""
    kernels = tuned_kernels(target, target.isa, precisions=range(1, 9))
    return [replace(kernel, isa=EVEX_VNNI) if kernel.isa.name == "avxvnni" else kernel for kernel in kernels]


def other_tunings(target: Target) -> list[MatmulKernel]:
    """Return kernels as a search may try them, for one instruction set of each vector width.

    Their tiles range from the smallest to one that does not fit the registers.
    """
    tunings = [
        Tuning(rows=1, prefetch=0, tokens=1, depth=1),
        Tuning(rows=1, batch=8, sums=2, prefetch=4096, tokens=5, depth=3),
        Tuning(rows=4, batch=4, sums=3, prefetch=512, tokens=1, depth=16),
        Tuning(rows=8, sums=8, prefetch=64, tokens=7, depth=2),
    ]
    isas = ("avx512vbmi", "avx2", "neon")
    kernels = [kernel for kernel in shipped_kernels(target) if kernel.bits in (2, 3) and kernel.isa.name in isas]
    return [replace(kernel, tuning=tuning) for kernel in kernels for tuning in tunings]


def build_program(kernels: Sequence[MatmulKernel], target: Target, directory: Path) -> Program:
    """Compile kernels and link them, for the least processor of the architecture, with the driver."""
    for kernel in kernels:
        emulator(target, kernel.isa.name)  # skips before the work is done
    path = directory / "driver"
    # A program for another architecture brings its C library along, so that qemu needs none.
    platform_ = [target.zig] if platform.machine() == target.arch else [f"{target.arch}-linux-musl", "-static"]
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", *platform_, "-mcpu=baseline"]
    options = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", *INCLUDE, "-o", str(path)]
    objects = compile_kernels(target, kernels, directory=directory)
    sources = [DRIVER, SOURCES / "cpu.c", *objects]
    subprocess.run([*compiler, *options, *map(str, sources)], check=True)
    return Program(target, path)
