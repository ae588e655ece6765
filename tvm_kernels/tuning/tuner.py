"""Tuning on this machine: what kernels are sampled on, and records of what was found."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from pmpd.runtime.errors import PmpdError
from pmpd.tvm_kernels.bench.measure import Rig, Sample, Samples, Weights, random_weights, take_turns
from pmpd.tvm_kernels.bench.onnx_graphs import bitplane_graph
from pmpd.tvm_kernels.bench.shapes import Shape
from pmpd.tvm_kernels.codegen.isa import isa_named
from pmpd.tvm_kernels.library.compile import Progress
from pmpd.tvm_kernels.ops.matmul.kernel import Accuracy, MatmulKernel, Phase
from pmpd.tvm_kernels.ops.matmul.tuned import default_tuning, key_of, load_records, save_records
from pmpd.tvm_kernels.targets import Target
from pmpd.tvm_kernels.tuning.search import GRIDS, Scores, search

__all__ = ["Arena", "TuneSettings", "Tuner"]

TOKENS = 128  # rows of activations that GEMMs are tuned with
GEMM_ROWS = 512  # rows of a matrix that are enough where arithmetic is the work
FINAL_SAMPLES = 25


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What to tune and on what.

    Attributes:
        isas: instruction sets, best first.
        phases, accuracies, precisions: of the kernels.
        shapes: of the matrices.
        threads: that share out the rows.
        output: the folder of records.
        overwrite: start over where there are records.
    """

    isas: tuple[str, ...]
    phases: tuple[Phase, ...]
    accuracies: tuple[Accuracy, ...]
    precisions: tuple[int, ...]
    shapes: tuple[Shape, ...]
    threads: int
    output: Path
    overwrite: bool = False


class Arena:
    """Scores kernels on this machine: a GEMV by its share of memory's bandwidth, a GEMM by products a second.

    Both are medians over samples and geometric means over shapes. For a GEMV also over all threads, where memory is
    the limit, and a single one, where the processor is: a moment in which others slow memory down, or a machine with
    more bandwidth, must not decide.
    """

    def __init__(
        self, target: Target, shapes: Sequence[Shape], *, threads: int, progress: Progress = lambda done, _: done
    ) -> None:
        self._target, self._threads, self._progress = target, threads, progress
        slices = {Shape(min(shape.n, GEMM_ROWS), shape.k) for shape in shapes}
        self._shapes: dict[Phase, list[Shape]] = {"gemv": list(dict.fromkeys(shapes)), "gemm": sorted(slices)}

    def enter(self, entrants: Sequence[MatmulKernel]) -> Scores:
        """Prepare kernels of one phase and precision; return what scores any of them."""
        weights, m = self._work(entrants[0])
        if len({kernel.name for kernel in entrants}) == 1:  # they differ in how ONNX Runtime shares them out
            return self._enter_graphs(entrants, weights, m)
        rig = self._rig(entrants)

        def scores(kernels: Sequence[MatmulKernel], rounds: int) -> list[float]:
            scored = []
            for threads in {self._threads, 1} if m == 1 else {self._threads}:
                sweeps = [rig.sweep(kernel, weights, m=m, threads=threads) for kernel in kernels]
                taken = take_turns(sweeps, partial(rig.read, threads), rounds=rounds)
                scored.append([_score(samples, weights, m) for samples in taken])
            return [geometric_mean(of_kernel) for of_kernel in zip(*scored, strict=True)]

        return scores

    def _enter_graphs(self, entrants: Sequence[MatmulKernel], weights: Sequence[Weights], m: int) -> Scores:
        """Prepare kernels as operators in ONNX Runtime."""
        samples: dict[MatmulKernel, Sample] = {}
        for kernel in entrants:
            rig = self._rig([kernel])
            samples[kernel] = bitplane_graph(rig.library, weights, accuracy=kernel.accuracy, m=m, threads=self._threads)

        def scores(kernels: Sequence[MatmulKernel], rounds: int) -> list[float]:
            taken = take_turns([samples[kernel] for kernel in kernels], rig.read, rounds=rounds)
            return [_score(run, weights, m) for run in taken]

        return scores

    def figures(self, kernel: MatmulKernel) -> dict[str, float]:
        """Return what a kernel reaches: `gbs` and `of_read` of a GEMV, `gmacs` of a GEMM."""
        weights, m = self._work(kernel)
        rig = self._rig([kernel])
        (samples,) = take_turns([rig.sweep(kernel, weights, m=m)], rig.read, rounds=FINAL_SAMPLES)
        if m > 1:
            return {"gmacs": round(_score(samples, weights, m) / 1e9, 1)}
        gbs = samples.rate([matrices.planes.nbytes + matrices.codebook.nbytes for matrices in weights]) / 1e9
        return {"gbs": round(gbs, 1), "of_read": round(_score(samples, weights, m), 3)}

    def _rig(self, kernels: Sequence[MatmulKernel]) -> Rig:
        return Rig(self._target, kernels, threads=self._threads, progress=self._progress)

    def _work(self, kernel: MatmulKernel) -> tuple[list[Weights], int]:
        m = 1 if kernel.phase == "gemv" else TOKENS
        return random_weights(self._shapes[kernel.phase], kernel.bits, m=m), m


def _score(samples: Samples, weights: Sequence[Weights], m: int) -> float:
    """Score samples of a sweep over shapes, or of a graph of all of them."""

    def parts(amounts: Sequence[int]) -> Sequence[int]:
        return amounts if samples.parts == len(amounts) else [sum(amounts)]

    if m > 1:
        return samples.rate(parts([part.copies * part.shape.n * part.shape.k * m for part in weights]))
    return samples.of_read(parts([part.planes.nbytes + part.codebook.nbytes for part in weights]))


class Tuner:
    """A tuning run, and where an earlier one of the same settings stopped.

    Attributes:
        todo: kernels without a record.

    Raises:
        PmpdError: the folder has records of another machine, number of threads, or shapes.
    """

    def __init__(self, settings: TuneSettings, arena: Arena) -> None:
        self._settings, self._arena = settings, arena
        self._records = {isa: self._open(isa) for isa in settings.isas}
        kernels = (
            MatmulKernel(
                isa=isa, bits=bits, accuracy=accuracy, phase=phase, tuning=default_tuning(isa, bits, accuracy, phase)
            )
            for phase in settings.phases
            for accuracy in settings.accuracies
            for isa in map(isa_named, settings.isas)
            for bits in settings.precisions
        )
        self.todo = [kernel for kernel in kernels if key_of(kernel) not in self._records[kernel.isa.name]["kernels"]]

    def run(self) -> Iterator[tuple[MatmulKernel, dict[str, float]]]:
        """Tune the remaining kernels; yield each one with its choices and timings once they are saved."""
        for kernel in self.todo:
            best = search(kernel, self._arena.enter)
            figures = self._arena.figures(best)
            searched = {name for grid in GRIDS[best.phase] for name in grid}
            choices = {name: value for name, value in asdict(best.tuning).items() if name in searched}
            records = self._records[best.isa.name]
            records["kernels"][key_of(best)] = {"tuning": choices, **figures}
            save_records(records, self._settings.output)
            yield best, figures

    def _open(self, isa: str) -> dict[str, Any]:
        """Return the records of an instruction set to go on with, or empty ones."""
        settings = self._settings
        conditions = {
            "isa": isa,
            "cpu": _cpu(),
            "threads": settings.threads,
            "shapes": [str(shape) for shape in settings.shapes],
        }
        records = {} if settings.overwrite else load_records(isa, settings.output)
        for name, value in conditions.items():
            if records and records.get(name) != value:
                raise PmpdError(
                    f"{settings.output / f'{isa}.json'} has {name} {records.get(name)}, not {value}: "
                    "choose another --output, or start over with --overwrite"
                )
        return records or {**conditions, "date": date.today().isoformat(), "kernels": {}}


def _cpu() -> str:
    """Return the processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()
