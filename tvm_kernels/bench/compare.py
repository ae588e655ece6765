"""Kernels against the machine's memory, and against ONNX Runtime's own: what `bench` shows.

For every precision the kernel alone (``pmpd_…``), the same kernel as ONNX Runtime runs it (``BitplaneMatMul/…``), and
beside them ``MatMulNBits`` with 8-bit activations and float32 ``MatMul``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from pmpd.tvm_kernels.bench.measure import Rig, Sample, random_weights, take_turns
from pmpd.tvm_kernels.bench.onnx_graphs import bitplane_graph, float_graph, nbits_graph
from pmpd.tvm_kernels.bench.shapes import Shape
from pmpd.tvm_kernels.ops.matmul.kernel import MatmulKernel

__all__ = ["Timing", "measure_shape"]

NBITS, BLOCKS = (2, 4, 8), (128, 32)  # of MatMulNBits
ROUNDS_OF_ONE, ROUNDS_OF_MANY = 15, 7  # by rows of activations


@dataclass(frozen=True)
class Timing:
    """What one kernel took for one matrix: p bits a weight, n rows, k columns, times m rows of activations.

    `gbs` counts the bytes of the matrix and its codebook or scales. `of_read` is the median share of what reads of
    memory just before and after reached, not the ratio of two medians.
    """

    kernel: str
    p: int
    n: int
    k: int
    m: int
    threads: int
    microseconds: float
    gbs: float
    of_read: float


@dataclass(frozen=True)
class _Contender:
    kernel: str
    p: int
    sample: Sample
    matrix_bytes: int
    copies: int


def measure_shape(
    rig: Rig, kernels: Sequence[MatmulKernel], shape: Shape, *, m: int, threads: int
) -> tuple[list[Timing], float]:
    """Let kernels of a rig and their peers take turns; return rows, and the GB/s of plain reads in between."""
    contenders = [*_ours(rig, kernels, shape, m=m, threads=threads), *_peers(shape, m=m, threads=threads)]
    rounds = ROUNDS_OF_ONE if m == 1 else ROUNDS_OF_MANY
    taken = take_turns([contender.sample for contender in contenders], rig.read, rounds=rounds)
    rows = []
    for contender, samples in zip(contenders, taken, strict=True):
        size = [contender.matrix_bytes * contender.copies]
        rate = samples.rate(size)
        figures = round(1e6 * contender.matrix_bytes / rate, 1), round(rate / 1e9, 2), round(samples.of_read(size), 3)
        rows.append(Timing(contender.kernel, contender.p, shape.n, shape.k, m, threads, *figures))
    return rows, median(float(gbs) for samples in taken for gbs in samples.read_gbs)


def _ours(rig: Rig, kernels: Sequence[MatmulKernel], shape: Shape, *, m: int, threads: int) -> Iterator[_Contender]:
    for kernel in kernels:
        if kernel.phase == ("gemv" if m == 1 else "gemm"):
            (weights,) = random_weights([shape], kernel.bits, m=m)
            size = weights.matrix_bytes, weights.copies
            yield _Contender(kernel.name, kernel.bits, rig.sweep(kernel, [weights], m=m), *size)
            sample = bitplane_graph(rig.library, [weights], accuracy=kernel.accuracy, m=m, threads=threads)
            yield _Contender(f"BitplaneMatMul/{kernel.name}", kernel.bits, sample, *size)


def _peers(shape: Shape, *, m: int, threads: int) -> Iterator[_Contender]:
    for bits in NBITS:
        for block in BLOCKS:
            run = nbits_graph(shape, bits=bits, block=block, m=m, threads=threads)
            yield _Contender(f"MatMulNBits/block{block}", bits, *run)
    yield _Contender("MatMul/float32", 32, *float_graph(shape, m=m, threads=threads))
