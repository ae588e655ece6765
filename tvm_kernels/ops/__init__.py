"""Operators with compiled kernels: a folder each, and their table."""

from pmpd.tvm_kernels.ops.attention.operator import GroupQueryAttention
from pmpd.tvm_kernels.ops.base import Demand, Kernel, Operator
from pmpd.tvm_kernels.ops.matmul.operator import BitplaneMatMul
from pmpd.tvm_kernels.targets import Target

__all__ = ["OPERATORS", "kernels_of"]

# The same as in ort_ops/registry.c, but for BitplaneGather, which is C alone. To add an operator, name it in both.
OPERATORS: dict[str, Operator] = {operator.name: operator for operator in (BitplaneMatMul(), GroupQueryAttention())}


def kernels_of(target: Target, demand: Demand) -> list[Kernel]:
    """Return the kernels of a target's library, of all operators, those of each best first."""
    return [kernel for operator in OPERATORS.values() for kernel in operator.kernels(target, demand)]
