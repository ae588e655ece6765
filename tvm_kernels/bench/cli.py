"""``python -m pmpd.tvm_kernels.bench.cli``: how fast kernels are, as a table and as JSON."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[tune]'`")

from pmpd.runtime.console.command import Command, check_outputs, choose, json_option, list_option, write_result
from pmpd.runtime.console.output import json_text
from pmpd.runtime.engine.threads import available_threads
from pmpd.tvm_kernels.bench.shapes import SUPPORTED, Shape, model_shapes, parse_shape
from pmpd.tvm_kernels.targets import local_target

if TYPE_CHECKING:
    from pmpd.tvm_kernels.bench.compare import Timing

__all__ = ["main"]

log = logging.getLogger("pmpd.tvm_kernels")

SHAPE = Shape(8192, 2048)


@click.command(
    "pmpd-bench",
    cls=Command,
    extra="tune",
    examples=("python -m pmpd.tvm_kernels.bench.cli --shape 8192,2048 --bits 2,3,4 --m 1,128 --json bench.json",),
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="N,K",
    help="Matrices of N rows and K columns. Repeatable.  [default: 8192,2048 and the shapes of the supported models]",
)
@list_option("--bits", metavar="LIST", default=["2,3,4"], show_default=True, help="Precisions of our kernels.")
@list_option("--m", "tokens", metavar="LIST", default=["1,128"], show_default=True, help="Rows of activations.")
@list_option(
    "--accuracy",
    "accuracies",
    metavar="LIST",
    default=["int8,exact"],
    show_default=True,
    help="Arithmetic of our kernels.",
)
@click.option(
    "--isa", help="Highest instruction set for our kernels, as in PMPD_MAX_ISA.  [default: the machine's highest]"
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads to compute with.  [default: all processors]")
@click.option("--records", type=click.Path(path_type=Path), help="Folder of tuning records made by `pmpd-tune`.")
@json_option()
@click.version_option(package_name="pmpd")
def main(
    shapes: tuple[str, ...],
    bits: tuple[str, ...],
    tokens: tuple[str, ...],
    accuracies: tuple[str, ...],
    isa: str | None,
    threads: int | None,
    records: Path | None,
    json_file: Path | None,
) -> None:
    """Time matrix products whose weights come from memory, beside a plain read of memory and ONNX Runtime's kernels."""
    check_outputs(json_file)
    if isa is not None:
        os.environ["PMPD_MAX_ISA"] = isa
    chosen = [parse_shape(text) for text in shapes]
    chosen = chosen or [SHAPE, *(shape for model in SUPPORTED for shape in model_shapes(model))]
    rows: list[Timing] = []
    reads = []
    for measured, read_gbs in _measure(
        list(dict.fromkeys(chosen)),
        precisions=choose(bits, "precision", range(1, 9)),
        tokens=choose(tokens, "number of rows", range(1, 4097)),
        accuracies=accuracies,
        threads=threads or available_threads(),
        records=records,
    ):
        if str(json_file) != "-":
            click.echo(f"{_table(measured)}\nplain read of memory: {read_gbs:.1f} GB/s\n")
        rows += measured
        reads.append(read_gbs)
    document = json_text({"read_gbs": round(median(reads), 2), "rows": [asdict(row) for row in rows]})
    if str(json_file) == "-":
        click.echo(document, nl=False)
    else:
        write_result(json_file, lambda: document)


def _measure(
    shapes: Sequence[Shape],
    *,
    precisions: Sequence[int],
    tokens: Sequence[int],
    accuracies: Sequence[str],
    threads: int,
    records: Path | None,
) -> Iterator[tuple[list[Timing], float]]:
    """Yield the rows of one shape and number of tokens after another, and the GB/s of plain reads meanwhile."""
    # Imported here, so that --help answers at once and a missing TVM is one line.
    from pmpd.tvm_kernels.bench.compare import measure_shape
    from pmpd.tvm_kernels.bench.measure import Rig, best_kernels
    from pmpd.tvm_kernels.ops.matmul.kernel import ACCURACIES

    target = local_target()
    kernels = best_kernels(
        target, precisions=precisions, accuracies=choose(accuracies, "accuracy", ACCURACIES), records=records
    )
    log.info("building %d kernels", len(kernels))
    rig = Rig(target, kernels, threads=threads)
    steps = [(shape, m) for shape in shapes for m in tokens]
    for number, (shape, m) in enumerate(steps, 1):
        log.info("[%d/%d] %s, %d row%s of activations", number, len(steps), shape, m, "s" * (m > 1))
        yield measure_shape(rig, kernels, shape, m=m, threads=threads)


def _table(rows: Sequence[Timing]) -> str:
    """Return rows as text."""
    cells = [("kernel", "p", "n", "k", "m", "µs", "GB/s", "of read", "GMAC/s")]
    for row in rows:
        macs = f"{row.n * row.k * row.m / row.microseconds / 1e3:.0f}" if row.m > 1 else ""
        sizes = str(row.p), str(row.n), str(row.k), str(row.m)
        cells.append((row.kernel, *sizes, f"{row.microseconds:.1f}", f"{row.gbs:.1f}", f"{row.of_read:.2f}", macs))
    name, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    return "\n".join(
        " ".join([kernel.ljust(name), *(text.rjust(width) for text, width in zip(row, widths, strict=True))]).rstrip()
        for kernel, *row in cells
    )


if __name__ == "__main__":
    main()
