"""`pmpd-tune`: find the best choices of the kernels for this machine, on the shapes of a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[tune]'`")

from pmpd.runtime.engine.threads import available_threads
from pmpd.tvm_kernels.bench.shapes import SUPPORTED, model_shapes, parse_shape
from pmpd.tvm_kernels.command import local_target, read_list, user_errors

__all__ = ["main"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-m", "--model", "models", multiple=True, help="Tune on the shapes of this model, a name or a folder.")
@click.option("--shape", "shapes", multiple=True, metavar="N,K", help="Tune on a matrix of N rows and K columns.")
@click.option("--isa", "isas", help="Instruction sets, like avx512vbmi,avx2.  [default: all that this machine has]")
@click.option("--bits", default="1,2,3,4,5,6,7,8", show_default=True, help="Precisions.")
@click.option("--phase", "phases", default="gemv,gemm", show_default=True, help="Kernels of decoding, of prefill.")
@click.option("--accuracy", "accuracies", default="int8,exact", show_default=True, help="How kernels compute.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to tune for.  [default: all processors]")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="records", show_default=True, help="Folder.")
@click.option("--overwrite", is_flag=True, help="Start anew where the folder has records.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing but errors and the result.")
@click.version_option(package_name="pmpd")
def main(output: Path, quiet: bool, **options: Any) -> None:
    """Find the best choices of the kernels for this machine, and keep them as records.

    Exports use the records in `tvm_kernels/ops/matmul/records` of the installed package: give that folder as --output,
    or copy yours into it. `python -m pmpd.tvm_kernels.bench.cli --records` measures those of any folder.

    Without --model and --shape, on the shapes of the models that PMPD supports; both may be given several times. Leave
    the machine alone meanwhile. An interrupted search goes on when the same command is run again.
    """
    with user_errors("interrupted: run the same command again to go on from here"):
        for kernel, figures in _tune(_Status(quiet), output=output, **options):
            result = ", ".join(f"{name} {value}" for name, value in figures.items())
            click.echo(f"{kernel.name}: {result}")
        click.echo(output)


def _tune(
    status: _Status,
    *,
    models: tuple[str, ...],
    shapes: tuple[str, ...],
    isas: str | None,
    bits: str,
    phases: str,
    accuracies: str,
    threads: int | None,
    output: Path,
    overwrite: bool,
) -> Iterator[tuple[Any, dict[str, float]]]:
    """Read the options, tune, and yield what was found for each kernel."""
    # TVM is imported here, where there is someone to say that it is missing.
    from pmpd.tvm_kernels.bench.measure import machine_isas
    from pmpd.tvm_kernels.ops.matmul.kernel import ACCURACIES
    from pmpd.tvm_kernels.tuning.search import GRIDS
    from pmpd.tvm_kernels.tuning.tuner import Arena, Tuner, TuneSettings

    target = local_target()
    chosen = [parse_shape(text) for text in shapes]
    for model in models or (() if shapes else SUPPORTED):
        chosen += model_shapes(model)
    runs = machine_isas(target)
    settings = TuneSettings(
        isas=runs if isas is None else read_list(isas, "instruction set of this machine", runs),
        phases=read_list(phases, "phase", GRIDS),
        accuracies=read_list(accuracies, "accuracy", ACCURACIES),
        precisions=read_list(bits, "precision", range(1, 9)),
        shapes=tuple(dict.fromkeys(chosen)),
        threads=threads or available_threads(),
        output=output,
        overwrite=overwrite,
    )
    arena = Arena(target, settings.shapes, threads=settings.threads, progress=status.compiling)
    yield from status.track(Tuner(settings, arena))


class _Status:
    """What is being done, on stderr: a line that changes on a terminal, a line for every kernel elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._terminal = quiet, sys.stderr.isatty()
        self._text = ""

    def track(self, tuner: Any) -> Iterator[Any]:
        """Yield what the tuner finds, with the count and the time left."""
        begin, total, results = time.monotonic(), len(tuner.todo), tuner.run()
        for done, kernel in enumerate(tuner.todo):
            self._text = f"[{done + 1}/{total}] {kernel.isa.name} {kernel.phase} {kernel.accuracy} {kernel.bits} bits"
            if done:
                left = (time.monotonic() - begin) / done * (total - done)
                self._text += f", {left / 60:.0f} minutes left" if left >= 60 else f", {left:.0f} seconds left"
            self._show(self._text)
            tuned = next(results)
            if self._terminal:
                self._show("")
            yield tuned

    def compiling(self, done: Iterable[str], total: int) -> Iterator[str]:
        """Show how much of the compiling is done."""
        for number, symbol in enumerate(done, 1):
            if self._terminal:
                self._show(f"{self._text}: compiled {number} of {total}")
            yield symbol

    def _show(self, text: str) -> None:
        if not self._quiet:
            sys.stderr.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
            sys.stderr.flush()


if __name__ == "__main__":
    main()
