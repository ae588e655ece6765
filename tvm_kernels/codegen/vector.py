"""Operations on whole vectors that kernels share: fused multiply-add, sums of lanes, reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from pmpd.tvm_kernels.codegen.emit import Emitter, lanes_of, shuffle

__all__ = ["add", "fma", "reduce_lanes", "sum_lanes"]


def fma(a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``, fused."""
    dtype = str(a.ty.dtype)
    return tirx.call_llvm_pure_intrin(dtype, "llvm.fma", a, b, c)


def add(e: Emitter, values: list[Any]) -> Any:
    """Return the sum of vectors."""
    total = values[0]
    for value in values[1:]:
        total = e.bind(total + value)
    return total


def reduce_lanes(e: Emitter, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine all lanes (a power of two of them) into a scalar."""
    value = e.bind(value)
    while (lanes := lanes_of(value)) > 1:
        half = lanes // 2
        value = e.bind(combine(shuffle([value], range(half)), shuffle([value], range(half, lanes))))
    return value


def sum_lanes(e: Emitter, totals: list[Any]) -> Any:
    """Return one vector with the sum of the lanes of each given vector (powers of two of both)."""
    lanes = width = lanes_of(totals[0])
    # Pairs of vectors are folded into one until one is left; the lanes of one total stay side by side.
    while len(totals) > 1 and width > 1:
        low = [group + lane for group in range(0, lanes, width) for lane in range(width // 2)]
        both = [*low, *(lanes + lane for lane in low)]
        totals = [_fold(e, [a, b], both, width // 2) for a, b in zip(totals[::2], totals[1::2], strict=True)]
        width //= 2
    total = e.bind(shuffle(totals, range(lanes * len(totals))))
    count = lanes_of(total) // width
    while width > 1:
        low = [width * group + lane for group in range(count) for lane in range(width // 2)]
        total, width = _fold(e, [total], low, width // 2), width // 2
    return total


def _fold(e: Emitter, values: list[Any], lanes: list[int], distance: int) -> Any:
    return e.bind(shuffle(values, lanes) + shuffle(values, [lane + distance for lane in lanes]))
