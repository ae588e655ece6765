"""What an operator with compiled kernels consists of. `ops.OPERATORS` lists those that there are.

The library's C part has a table of the same operators, and of those that it computes by itself
(``ort_ops/registry.c``). An operator's C code and its kernels meet in a header of ``ort_ops``: it declares the kernels'
signatures and the array of structures that lists them, which `Operator.table` defines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pmpd.tvm_kernels.codegen.isa import Isa
from pmpd.tvm_kernels.targets import Target

__all__ = ["Demand", "Function", "Kernel", "Operator"]


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a model asks of a library.

    Attributes:
        precisions: bits of weights, in ascending order.
        head_dims: elements of an attention head, in ascending order.
    """

    precisions: Sequence[int] = ()
    head_dims: Sequence[int] = ()


@dataclass(frozen=True)
class Function:
    """A function of a kernel.

    Attributes:
        signature: the C function type that the operator's header declares.
        build: returns the `tirx.PrimFunc`.
    """

    signature: str
    build: Callable[[], Any]


class Kernel(ABC):
    """A compiled kernel as a value: instruction set, choices, and a name that says all of them."""

    operator: ClassVar[str]  # the name of its operator
    isa: Isa

    @property
    @abstractmethod
    def name(self) -> str:
        """What reports call it: the C symbol of its main function."""

    @property
    @abstractmethod
    def functions(self) -> Mapping[str, Function]:
        """Its functions, by C symbol. Kernels may share some."""

    @abstractmethod
    def fields(self) -> dict[str, object]:
        """Return its row of the operator's table: the structure's members as C expressions."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the kernel as JSON-ready data."""

    @property
    def features(self) -> str:
        """The processor features that it needs, as a C expression of ``cpu.h``."""
        return " | ".join(f"PMPD_{name}" for name in self.isa.needs) or "0"


class Operator(ABC):
    """An operator of the library.

    Attributes:
        name: its name in ONNX graphs.
        header: the header of ``ort_ops`` that declares its kernels.
        struct, array, count: the C names of a kernel's structure, of the array of them, and of the array's length.
    """

    name: ClassVar[str]
    header: ClassVar[str]
    struct: ClassVar[str]
    array: ClassVar[str]
    count: ClassVar[str]

    @abstractmethod
    def kernels(self, target: Target, demand: Demand) -> list[Kernel]:
        """Return the kernels of a target's library, best first."""

    @abstractmethod
    def from_json(self, values: Mapping[str, Any]) -> Kernel:
        """Return the kernel that `Kernel.to_json` describes."""

    def fallback(self) -> Kernel | None:
        """Return the kernel for what those of the table do not cover; None if they cover everything."""
        return None

    def table(self, kernels: Sequence[Kernel]) -> str:
        """Return the C text that defines the array of its kernels."""
        functions = {symbol: function for kernel in kernels for symbol, function in kernel.functions.items()}
        rows = [
            "{" + ", ".join(f".{name} = {value}" for name, value in kernel.fields().items()) + "}" for kernel in kernels
        ]
        return "\n".join(
            [
                *(f"extern {function.signature} {symbol};" for symbol, function in functions.items()),
                f"const struct {self.struct} {self.array}[] = {{",
                *(f"  {row}," for row in rows or ["{0}"]),
                "};",
                f"const size_t {self.count} = {len(kernels)};",
            ]
        )
