"""`pmpd-tune`: find the fastest variant of each kernel on this machine, for the shapes of a model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[tune]'`")

from pmpd.runtime.console.command import Command, choose, json_option, list_option, print_result
from pmpd.runtime.console.output import json_text
from pmpd.runtime.console.progress import Progress, progress, track
from pmpd.runtime.engine.threads import available_threads
from pmpd.tvm_kernels.bench.shapes import SUPPORTED, model_shapes, parse_shape
from pmpd.tvm_kernels.targets import local_target

if TYPE_CHECKING:
    from pmpd.tvm_kernels.tuning.tuner import Tuner

__all__ = ["main"]


@click.command(
    "pmpd-tune",
    cls=Command,
    extra="tune",
    interrupted="interrupted: run the same command again to resume",
    examples=(
        "pmpd-tune --model phi-1.5 --bits 2,3,4 --output records",
        "pmpd-tune --shape 8192,2048 --isa avx2 --phase gemv",
    ),
)
@click.option("-m", "--model", "models", multiple=True, help="Tune for the shapes of this model: a name or a folder.")
@click.option("--shape", "shapes", multiple=True, metavar="N,K", help="Tune for matrices of N rows and K columns.")
@list_option(
    "--isa",
    "isas",
    metavar="NAME",
    help="Instruction sets, such as avx512vbmi,avx2.  [default: all that this machine has]",
)
@list_option("--bits", metavar="LIST", default=["1,2,3,4,5,6,7,8"], show_default=True, help="Precisions.")
@list_option(
    "--phase",
    "phases",
    metavar="LIST",
    default=["gemv,gemm"],
    show_default=True,
    help="gemv: kernels of decoding; gemm: kernels of prefill.",
)
@list_option(
    "--accuracy",
    "accuracies",
    metavar="LIST",
    default=["int8,exact"],
    show_default=True,
    help="Arithmetic of the kernels.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads to tune for.  [default: all processors]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="records",
    show_default=True,
    help="Folder of the records.",
)
@click.option("--overwrite", is_flag=True, help="Replace the records in the folder.")
@json_option("the figures of each kernel")
@click.version_option(package_name="pmpd")
def main(
    models: tuple[str, ...],
    shapes: tuple[str, ...],
    isas: tuple[str, ...],
    bits: tuple[str, ...],
    phases: tuple[str, ...],
    accuracies: tuple[str, ...],
    threads: int | None,
    output: Path,
    overwrite: bool,
    json_file: Path | None,
) -> None:
    """Find the fastest variant of each kernel on this machine, and save the choices as records.

    Exports use the records in `tvm_kernels/ops/matmul/records` of the installed package: give that folder as --output,
    or copy your records into it. `python -m pmpd.tvm_kernels.bench.cli --records DIR` measures the kernels that the
    records of a folder choose.

    Without --model and --shape, the shapes are those of the models that PMPD supports; both may be repeated. Leave the
    machine idle meanwhile. An interrupted search resumes when the same command is run again.
    """
    # Imported here, so that --help answers at once and a missing TVM is one line.
    from pmpd.tvm_kernels.bench.measure import machine_isas
    from pmpd.tvm_kernels.ops.matmul.kernel import ACCURACIES
    from pmpd.tvm_kernels.tuning.search import GRIDS
    from pmpd.tvm_kernels.tuning.tuner import Arena, Tuner, TuneSettings

    target = local_target()
    chosen = [parse_shape(text) for text in shapes]
    for model in models or (() if shapes else SUPPORTED):
        chosen += model_shapes(model)
    available = machine_isas(target)
    settings = TuneSettings(
        isas=choose(isas, "instruction set of this machine", available) or available,
        phases=choose(phases, "phase", GRIDS),
        accuracies=choose(accuracies, "accuracy", ACCURACIES),
        precisions=choose(bits, "precision", range(1, 9)),
        shapes=tuple(dict.fromkeys(chosen)),
        threads=threads or available_threads(),
        output=output,
        overwrite=overwrite,
    )
    tuner = Tuner(settings, Arena(target, settings.shapes, threads=settings.threads, progress=_compiling))
    rows = []
    with progress("kernels", total=len(tuner.todo), unit="kernel") as shown:
        for kernel, figures in _tune(tuner, shown):
            rows.append({"kernel": kernel, **figures})
            if str(json_file) != "-":
                click.echo(f"{kernel}: {', '.join(f'{name} {value}' for name, value in figures.items())}")
    print_result(str(output), json_file, lambda: json_text({"records": str(output), "kernels": rows}))


def _tune(tuner: Tuner, shown: Progress) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name and the figures of each kernel, showing which one is at work."""
    results = tuner.run()
    for kernel in tuner.todo:
        shown.describe(f"{kernel.isa.name} {kernel.phase} {kernel.accuracy} {kernel.bits} bits")
        best, figures = next(results)
        shown.advance()
        yield best.name, figures


def _compiling(done: Iterable[str], total: int) -> Iterator[str]:
    return track(done, step="compile", total=total, unit="kernel", transient=True)


if __name__ == "__main__":
    main()
