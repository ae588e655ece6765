"""How fast kernels run on this machine, beside a plain read of memory by the same threads.

Bandwidth drifts within seconds where a machine is shared. So contenders take turns, one sample of each in a round, and
a sample is compared with the reads of memory just before and after it. A sample of one row of activations walks
through weights that fill more memory than the caches hold; for any m, the reads in between evict them from
the caches: weights come from memory, as they do when a model decodes.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bitplanes import CACHE_LINE, row_stride
from pmpd.tvm_kernels.bench.shapes import Shape
from pmpd.tvm_kernels.codegen.isa import ISAS, Isa, isa_named
from pmpd.tvm_kernels.library.compile import Progress, compile_kernels
from pmpd.tvm_kernels.library.link import link_library
from pmpd.tvm_kernels.ops.matmul.kernel import Accuracy, MatmulKernel
from pmpd.tvm_kernels.ops.matmul.tuned import tuned_kernels
from pmpd.tvm_kernels.targets import Target

__all__ = [
    "Rig",
    "Sample",
    "Samples",
    "Weights",
    "best_kernels",
    "copies_of",
    "machine_isas",
    "random_memory",
    "random_weights",
    "take_turns",
]

WORKING_SET = 256 << 20  # bytes that one sample walks through, eight times the cache that a few cores share
READ_BYTES = 64 << 20
_INSTRUMENTS = Path(__file__).with_name("sweep.c")

# Takes one sample; returns the seconds that each part of it took.
Sample = Callable[[], Sequence[float]]


@dataclass(frozen=True)
class Weights:
    """Matrices of one shape, stored contiguously: planes uint8 ``[copies, p, N, S]``, codebook float16."""

    shape: Shape
    planes: npt.NDArray[np.uint8]
    codebook: npt.NDArray[np.float16]  # [copies, N, 1, 2**p]

    @property
    def copies(self) -> int:
        """How many matrices there are."""
        return len(self.planes)

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one matrix and its codebook."""
        return (self.planes.nbytes + self.codebook.nbytes) // self.copies


def random_weights(shapes: Sequence[Shape], bits: int, *, m: int = 1) -> list[Weights]:
    """Return enough matrices of each shape for a sample with m rows of activations, of `bits` bits, all different."""
    sizes = [bits * shape.n * row_stride(shape.k) for shape in shapes]
    counts = [copies_of(size * len(shapes), m=m) for size in sizes]
    ends = [*accumulate(size * copies for size, copies in zip(sizes, counts, strict=True))]
    memory = np.split(random_memory(ends[-1]), ends[:-1])
    entries = np.random.default_rng(bits).normal(size=4096 << bits).astype(np.float16)
    return [
        Weights(shape, part.reshape(copies, bits, shape.n, -1), np.resize(entries, (copies, shape.n, 1, 1 << bits)))
        for shape, copies, part in zip(shapes, counts, memory, strict=True)
    ]


def copies_of(matrix_bytes: int, *, m: int) -> int:
    """Return how many matrices to walk through, so that a sample of m rows of activations takes a few milliseconds."""
    return max(1, WORKING_SET // m // matrix_bytes)


def random_memory(size: int) -> npt.NDArray[np.uint8]:
    """Return the first bytes of memory that holds random numbers, always the same."""
    return _random_bytes(-(-size // WORKING_SET) * WORKING_SET)[:size]


@cache
def _random_bytes(size: int) -> npt.NDArray[np.uint8]:
    words = np.random.default_rng(0).integers(0, 1 << 64, (size + CACHE_LINE) // 8, np.uint64)
    return _at_line(words.view(np.uint8))[:size]


def _at_line(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return memory from its first whole cache line on."""
    return memory[-memory.ctypes.data % CACHE_LINE :]


@dataclass(frozen=True)
class _Part:
    """A part of a sample: a call multiplies a thread's rows of all matrices of a shape.

    Attributes:
        sweep: the C function.
        arrays: what the pointers among the arguments point to.
        arguments: of the C function, but for the rows.
        bounds: thread t has the rows from the t-th number to the next.
    """

    sweep: Callable[..., None]
    arrays: Sequence[npt.NDArray[Any]]
    arguments: Sequence[Any]
    bounds: Sequence[int]

    def __call__(self, thread: int) -> None:
        self.sweep(*self.arguments, self.bounds[thread], self.bounds[thread + 1])


class Rig:
    """Kernels in an operator library with measuring instruments, and the threads that share out their rows.

    Attributes:
        library: the file, which ONNX Runtime can load too.

    Raises:
        MissingExtraError, PmpdError: as `compile_kernels` and `link_library`.
    """

    def __init__(
        self,
        target: Target,
        kernels: Sequence[MatmulKernel],
        *,
        threads: int,
        progress: Progress = lambda done, _: done,
    ) -> None:
        self._folder = TemporaryDirectory(prefix="pmpd-")
        self.library = Path(self._folder.name) / "libpmpd_ops.so"
        files = compile_kernels(target, kernels, directory=self.library.parent, progress=progress)
        link_library(target, [*files, _INSTRUMENTS], output=self.library)
        self._functions = ctypes.CDLL(str(self.library))
        self._functions.pmpd_ops_kernel.restype = ctypes.c_void_p
        self._functions.pmpd_ops_info.restype = ctypes.c_char_p
        self._threads, self._pool = threads, ThreadPoolExecutor(threads)
        self._read_at = 0

    def runs(self, isa: Isa) -> bool:
        """Return whether this machine has an instruction set, and `PMPD_MAX_ISA` allows it.

        Raises:
            PmpdError: `PMPD_MAX_ISA` names none.
        """
        info = self._functions.pmpd_ops_info()
        if info is None:
            choices = ["portable", *(level.name for level in reversed(ISAS) if level.arch == isa.arch)]
            raise PmpdError(f"PMPD_MAX_ISA is {os.environ.get('PMPD_MAX_ISA')!r}: choose one of {', '.join(choices)}")
        features = json.loads(info)["features"]
        return set(isa.needs) <= set(features)

    def read(self, threads: int | None = None) -> float:
        """Read memory that no cache holds, with all threads or the given number of them; return GB/s."""
        threads = threads or self._threads
        memory = random_memory(WORKING_SET)
        share = READ_BYTES // threads
        self._read_at = (self._read_at + READ_BYTES) % WORKING_SET

        def part(thread: int) -> None:
            self._functions.pmpd_ops_read(_pointer(memory[self._read_at + thread * share :]), ctypes.c_int64(share))

        return READ_BYTES / max(self._together([part], threads)) / 1e9

    def sweep(
        self, kernel: MatmulKernel, weights: Sequence[Weights], *, m: int = 1, threads: int | None = None
    ) -> Sample:
        """Return what multiplies m rows of activations with all matrices, on all threads or the given number of them.

        A sample has the seconds of each shape.
        """
        threads = threads or self._threads
        parts = [self._part(kernel, matrices, m, threads) for matrices in weights]
        return lambda: self._together(parts, threads)

    def _part(self, kernel: MatmulKernel, weights: Weights, m: int, threads: int) -> _Part:
        n, k = weights.shape.n, weights.shape.k
        compiled = ctypes.c_void_p(self._functions.pmpd_ops_kernel(kernel.name.encode()))
        lines = row_stride(k) // CACHE_LINE
        x = np.random.default_rng(m).normal(size=(m, k)).astype(np.float32)
        packed = _at_line(np.zeros(m * lines * 512 * kernel.element_bytes + CACHE_LINE, np.uint8))
        scale, total, y = (np.zeros((m, size), np.float32) for size in (16 * lines, 1, n))
        activations = _pointer(packed), _pointer(scale), _pointer(total)
        self._functions.pmpd_ops_pack(compiled, _pointer(x), *activations, k, lines, m)
        arrays: tuple[npt.NDArray[Any], ...] = weights.planes, weights.codebook, packed, scale, total, y
        rows = kernel.tuning.rows * kernel.tuning.batch
        return _Part(
            sweep=self._functions.pmpd_ops_sweep,
            arrays=arrays,
            arguments=(compiled, *map(_pointer, arrays), n, lines, m, weights.copies),
            bounds=[n * thread // threads // rows * rows for thread in range(threads)] + [n],
        )

    def _together(self, parts: Sequence[Callable[[int], None]], threads: int) -> list[float]:
        """Run all parts on each of `threads` threads; return the seconds of each part on the slowest."""
        barrier = threading.Barrier(threads)

        def run(thread: int) -> list[float]:
            times = []
            barrier.wait()
            for part in parts:
                begin = time.perf_counter()
                part(thread)
                times.append(time.perf_counter() - begin)
            return times

        return [max(times) for times in zip(*self._pool.map(run, range(threads)), strict=True)]


def _pointer(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def machine_isas(target: Target) -> tuple[str, ...]:
    """Return the instruction sets of a target that this machine has and `PMPD_MAX_ISA` allows, best first."""
    rig = Rig(target, (), threads=1)
    return tuple(name for name in target.isa if rig.runs(isa_named(name)))


def best_kernels(
    target: Target, *, precisions: Sequence[int], accuracies: Sequence[Accuracy], records: Path | None = None
) -> list[MatmulKernel]:
    """Return the kernels that this machine runs, tuned as recorded, of both phases.

    Raises:
        PmpdError: it runs none.
    """
    isas = machine_isas(target)
    if not isas:
        raise PmpdError(f"this machine has none of the instruction sets of {target.name}: {', '.join(target.isa)}")
    return tuned_kernels(target, isas[:1], precisions=precisions, accuracies=accuracies, folder=records)


@dataclass(frozen=True)
class Samples:
    """What one contender took: seconds ``[rounds, parts]``, and the GB/s of memory around each sample ``[rounds]``."""

    seconds: npt.NDArray[np.float64]
    read_gbs: npt.NDArray[np.float64]

    @property
    def parts(self) -> int:
        """How many parts a sample has."""
        return int(self.seconds.shape[1])

    def rate(self, amounts: Sequence[int]) -> float:
        """Return amounts a second: the median over rounds, the geometric mean over parts."""
        return _geometric_mean(np.median(np.array(amounts) / self.seconds, axis=0))

    def of_read(self, sizes: Sequence[int]) -> float:
        """Return `rate` for parts that read `sizes` bytes, as a share of the bandwidth of memory around each sample."""
        return _geometric_mean(np.median(np.array(sizes) / self.seconds / self.read_gbs[:, None], axis=0)) / 1e9


def _geometric_mean(values: npt.NDArray[np.float64]) -> float:
    return float(np.exp(np.log(values).mean()))


def take_turns(contenders: Sequence[Sample], read: Callable[[], float], *, rounds: int) -> list[Samples]:
    """Sample each contender once a round, in an order that changes, with a read of memory before and after it."""
    order, shuffled = list(range(len(contenders))), random.Random(0)
    seconds: list[list[Sequence[float]]] = [[] for _ in contenders]
    reads: list[list[float]] = [[] for _ in contenders]
    before = read()
    for _ in range(rounds):
        shuffled.shuffle(order)
        for contender in order:
            seconds[contender].append(contenders[contender]())
            after = read()
            reads[contender].append((before + after) / 2)
            before = after
    return [Samples(np.array(taken), np.array(around)) for taken, around in zip(seconds, reads, strict=True)]
