"""Kernels of `BitplaneMatMul` as values: what each computes, for which machine, with which choices.

A kernel's name says all of it. ``pmpd_gemv_qs8w4_2x64_b4s2_p2048__avx512vbmi``: one row of activations (`gemv`; `gemm`
for many) of 8-bit steps (`qs8`; `f32` for floats) times 4-bit weights, 2 rows at a time by vectors of 64 bytes, batches
of 4 such tiles, 2 sums a row, prefetching 2048 bytes ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

from pmpd.tvm_kernels.codegen.isa import Isa, Portable, isa_named
from pmpd.tvm_kernels.ops.base import Function, Kernel
from pmpd.tvm_kernels.ops.matmul.activations import pack_float32, pack_int8
from pmpd.tvm_kernels.ops.matmul.gemm import gemm_exact, gemm_int8
from pmpd.tvm_kernels.ops.matmul.gemv import gemv_exact, gemv_int8
from pmpd.tvm_kernels.ops.matmul.portable import PORTABLE_NAME, portable_matmul
from pmpd.tvm_kernels.ops.matmul.tuning import Tuning

__all__ = ["ACCURACIES", "MATMUL", "Accuracy", "AnyKernel", "MatmulKernel", "Phase"]

MATMUL = "BitplaneMatMul"
Accuracy = Literal["int8", "exact"]
Phase = Literal["gemv", "gemm"]
ACCURACIES: tuple[Accuracy, ...] = ("int8", "exact")
_TYPES = {"int8": "qs8", "exact": "f32"}
_PACK = {"int8": pack_int8, "exact": pack_float32}
_BUILD = {
    ("gemv", "int8"): gemv_int8,
    ("gemv", "exact"): gemv_exact,
    ("gemm", "int8"): gemm_int8,
    ("gemm", "exact"): gemm_exact,
}


@dataclass(frozen=True, kw_only=True)
class MatmulKernel(Kernel):
    """A kernel of one instruction set, precision, accuracy, phase and tuning."""

    operator: ClassVar[str] = MATMUL
    isa: Isa
    bits: int
    accuracy: Accuracy
    phase: Phase
    tuning: Tuning

    def to_json(self) -> dict[str, Any]:
        """Return the kernel as JSON-ready data."""
        choice = {"bits": self.bits, "accuracy": self.accuracy, "phase": self.phase, "tuning": asdict(self.tuning)}
        return {"isa": self.isa.name, **choice}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the kernel that `to_json` describes."""
        return cls(**{**values, "isa": isa_named(values["isa"]), "tuning": Tuning(**values["tuning"])})

    @property
    def name(self) -> str:
        """The C symbol of the multiplication."""
        t = self.tuning
        gemv = f"{t.rows}x{self.isa.width}_b{t.batch}s{t.sums}_p{t.prefetch}"
        tile = gemv if self.phase == "gemv" else f"{t.rows}x{t.tokens}x{t.depth}"
        return f"pmpd_{self.phase}_{_TYPES[self.accuracy]}w{self.bits}_{tile}__{self.isa.name}"

    @property
    def pack_name(self) -> str:
        """The C symbol of the function that lays out the activations this kernel reads."""
        return f"pmpd_pack_{_TYPES[self.accuracy]}_{self.isa.width}__{self.isa.name}"

    @property
    def functions(self) -> Mapping[str, Function]:
        """The multiplication, and the layout of activations, which all kernels of an accuracy and width share."""
        build = _BUILD[self.phase, self.accuracy]
        matmul = partial(build, self.isa, self.tuning, name=self.name, bits=self.bits)
        pack = partial(_PACK[self.accuracy], self.isa, name=self.pack_name)
        return {self.name: Function("pmpd_matmul_fn", matmul), self.pack_name: Function("pmpd_pack_fn", pack)}

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory that a call needs."""
        return 0 if self.phase == "gemv" else self.tuning.rows * self.tuning.depth * 512 * self.element_bytes

    @property
    def element_bytes(self) -> int:
        """Bytes of one packed activation."""
        return 1 if self.accuracy == "int8" else 4

    def fields(self) -> dict[str, object]:
        """Return the members of its `struct pmpd_kernel`."""
        return {
            "name": f'"{self.name}"',
            "features": self.features,
            "bits": self.bits,
            "accuracy": f"PMPD_{self.accuracy.upper()}",
            "many": int(self.phase == "gemm"),
            "element_bytes": self.element_bytes,
            "rows": self.tuning.rows * self.tuning.batch,
            "chunk": self.tuning.chunk,
            "scratch_bytes": self.scratch_bytes,
            "pack": self.pack_name,
            "matmul": self.name,
        }


class AnyKernel(Kernel):
    """`pmpd_any`: any precision and any number of groups, on any machine."""

    operator: ClassVar[str] = MATMUL
    isa: Isa = Portable()  # stateless

    def to_json(self) -> dict[str, Any]:
        """Return nothing: there is one such kernel."""
        return {}

    @property
    def name(self) -> str:
        """The C symbol."""
        return PORTABLE_NAME

    @property
    def functions(self) -> Mapping[str, Function]:
        """The only function."""
        return {PORTABLE_NAME: Function("pmpd_any_fn", portable_matmul)}

    def fields(self) -> dict[str, object]:
        """Raise: it is outside of the table."""
        raise NotImplementedError
