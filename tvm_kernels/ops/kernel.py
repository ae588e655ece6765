"""A kernel as a value: what it computes, for which machine, with which choices; its name says all of it.

``pmpd_gemv_qs8w4_2x64_b4s2_p2048__avx512vbmi``: one row of activations (`gemv`; `gemm` for many) of 8-bit steps (`qs8`;
`f32` for floats) times 4-bit weights, 2 rows at a time by vectors of 64 bytes, batches of 4 such tiles, 2 sums a row,
asking for memory 2048 bytes ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from pmpd.tvm_kernels.codegen.isa import ISAS, Isa, Portable

__all__ = ["ACCURACIES", "Accuracy", "AttentionKernel", "Kernel", "Phase", "Tuning", "isa_named"]

Accuracy = Literal["int8", "exact"]
Phase = Literal["gemv", "gemm"]
ACCURACIES: tuple[Accuracy, ...] = ("int8", "exact")
_TYPES = {"int8": "qs8", "exact": "f32"}


def isa_named(name: str) -> Isa:
    """Return the instruction set of a name (KeyError if there is none)."""
    return {isa.name: isa for isa in (*ISAS, Portable())}[name]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a search may choose for a kernel.

    Attributes:
        rows: weight rows computed together, a power of two.
        batch: gemv: tiles of so many rows that have their tables made and their sums folded together, a power of two.
        sums: gemv: independent sums of the products of a vector of plane bytes.
        prefetch: gemv: bytes ahead that are asked for in every plane; 0 leaves it to the processor.
        tokens: gemm: rows of activations multiplied together.
        depth: gemm: cache lines (512 columns) of a weight row decoded at a time.
        chunk: rows handed to a thread at a time.
    """

    rows: int = 2
    batch: int = 1
    sums: int = 1
    prefetch: int = 0
    tokens: int = 1
    depth: int = 1
    chunk: int = 64


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One compiled function: instruction set, precision, accuracy, phase and tuning."""

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
        """The C symbol, which is also what reports show."""
        t = self.tuning
        gemv = f"{t.rows}x{self.isa.width}_b{t.batch}s{t.sums}_p{t.prefetch}"
        tile = gemv if self.phase == "gemv" else f"{t.rows}x{t.tokens}x{t.depth}"
        return f"pmpd_{self.phase}_{_TYPES[self.accuracy]}w{self.bits}_{tile}__{self.isa.name}"

    @property
    def pack_name(self) -> str:
        """The C symbol of the function that lays out the activations this kernel reads."""
        return f"pmpd_pack_{_TYPES[self.accuracy]}_{self.isa.width}__{self.isa.name}"

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory that a call needs."""
        return 0 if self.phase == "gemv" else self.tuning.rows * self.tuning.depth * 512 * self.element_bytes

    @property
    def element_bytes(self) -> int:
        """Bytes of one packed activation."""
        return 1 if self.accuracy == "int8" else 4

    def function(self) -> Any:
        """Return the TIR function."""
        from pmpd.tvm_kernels.ops.matmul.gemm import gemm_exact, gemm_int8
        from pmpd.tvm_kernels.ops.matmul.gemv import gemv_exact, gemv_int8

        t = self.tuning
        if self.phase == "gemv":
            gemv = gemv_int8 if self.accuracy == "int8" else gemv_exact
            choices = {"rows": t.rows, "batch": t.batch, "sums": t.sums, "prefetch": t.prefetch}
            return gemv(self.isa, name=self.name, bits=self.bits, **choices)
        gemm = gemm_int8 if self.accuracy == "int8" else gemm_exact
        return gemm(self.isa, name=self.name, bits=self.bits, rows=t.rows, tokens=t.tokens, depth=t.depth)

    def pack_function(self) -> Any:
        """Return the TIR function that lays out activations."""
        from pmpd.tvm_kernels.ops.matmul.activations import pack_float32, pack_int8

        return (pack_int8 if self.accuracy == "int8" else pack_float32)(self.isa, name=self.pack_name)

    def table_entry(self) -> str:
        """Return the initializer of its `struct pmpd_kernel`."""
        fields = {
            "name": f'"{self.name}"',
            "features": " | ".join(self.isa.feature),
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
        return "{" + ", ".join(f".{field} = {value}" for field, value in fields.items()) + "}"


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """Attention over a float16 cache: instruction set, size of a head, queries taken together."""

    isa: Isa
    dim: int
    queries: int

    def to_json(self) -> dict[str, Any]:
        """Return the kernel as JSON-ready data."""
        return {"isa": self.isa.name, "dim": self.dim, "queries": self.queries}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the kernel that `to_json` describes."""
        return cls(**{**values, "isa": isa_named(values["isa"])})

    @property
    def name(self) -> str:
        """The C symbol, which is also what reports show."""
        return f"pmpd_attention_f16d{self.dim}_q{self.queries}__{self.isa.name}"

    def function(self) -> Any:
        """Return the TIR function."""
        from pmpd.tvm_kernels.ops.attention.attention import attention

        return attention(self.isa, name=self.name, dim=self.dim, queries=self.queries)

    def table_entry(self) -> str:
        """Return the initializer of its `struct pmpd_attention`."""
        features = " | ".join(self.isa.feature) or "0"
        return f'{{"{self.name}", {features}, {self.dim}, {self.queries}, {self.name}}}'
