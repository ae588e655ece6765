"""`BitplaneMatMul`: its kernels for a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pmpd.tvm_kernels.ops.base import Demand, Kernel, Operator
from pmpd.tvm_kernels.ops.matmul.kernel import MATMUL, AnyKernel, MatmulKernel
from pmpd.tvm_kernels.ops.matmul.portable import PORTABLE_NAME
from pmpd.tvm_kernels.ops.matmul.tuned import tuned_kernels
from pmpd.tvm_kernels.targets import Target

__all__ = ["BitplaneMatMul"]


class BitplaneMatMul(Operator):
    """Products with nested bit-plane weights."""

    name: ClassVar[str] = MATMUL
    header: ClassVar[str] = "matmul.h"
    struct: ClassVar[str] = "pmpd_kernel"
    array: ClassVar[str] = "pmpd_kernels"
    count: ClassVar[str] = "pmpd_kernel_count"

    def kernels(self, target: Target, demand: Demand) -> list[Kernel]:
        """Return kernels of every instruction set, precision, accuracy and phase, each with its tuning record."""
        return [*tuned_kernels(target, target.isa, precisions=demand.precisions)]

    def from_json(self, values: Mapping[str, Any]) -> Kernel:
        """Return the kernel that `MatmulKernel.to_json` describes."""
        return MatmulKernel.from_json(values)

    def fallback(self) -> Kernel:
        """Return `pmpd_any`."""
        return AnyKernel()

    def table(self, kernels: Sequence[Kernel]) -> str:
        """Return the C text of the array of kernels, and of the name of `pmpd_any`."""
        return f'const char pmpd_any_name[] = "{PORTABLE_NAME}";\n{super().table(kernels)}'
