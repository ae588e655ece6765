"""``python -m pmpd.tvm_kernels.bench.cli``: how fast kernels are, as a table and as JSON."""

from __future__ import annotations

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

from pmpd.runtime.console.output import json_text, write_atomically
from pmpd.runtime.engine.threads import available_threads
from pmpd.tvm_kernels.bench.shapes import SUPPORTED, Shape, model_shapes, parse_shape
from pmpd.tvm_kernels.command import local_target, read_list, user_errors

if TYPE_CHECKING:
    from pmpd.tvm_kernels.bench.compare import Row

__all__ = ["main"]

SHAPE = Shape(8192, 2048)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--shape", "shapes", multiple=True, metavar="N,K", help="Repeatable.  [default: 8192,2048 and those of our models]"
)
@click.option("--bits", default="2,3,4", show_default=True, help="Precisions of our kernels.")
@click.option("--m", "tokens", default="1,128", show_default=True, help="Rows of activations.")
@click.option("--accuracy", default="int8,exact", show_default=True, help="How our kernels compute.")
@click.option("--isa", help="Highest instruction set for our kernels, as in PMPD_MAX_ISA.  [default: the machine's]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads.  [default: all processors]")
@click.option("--records", type=click.Path(path_type=Path), help="Folder of tuning records made by `pmpd-tune`.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to this file.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing but errors and the result.")
@click.version_option(package_name="pmpd")
def main(
    shapes: tuple[str, ...],
    bits: str,
    tokens: str,
    accuracy: str,
    isa: str | None,
    threads: int | None,
    records: Path | None,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Time multiplications with weights that come from memory, beside a plain read of memory."""
    with user_errors():
        if isa is not None:
            os.environ["PMPD_MAX_ISA"] = isa
        chosen = [parse_shape(text) for text in shapes]
        chosen = chosen or [SHAPE, *(shape for model in SUPPORTED for shape in model_shapes(model))]
        rows, reads = [], []
        for some, read_gbs in _measure(
            list(dict.fromkeys(chosen)),
            precisions=read_list(bits, "precision", range(1, 9)),
            tokens=read_list(tokens, "number of rows", range(1, 4097)),
            accuracy=accuracy,
            threads=threads or available_threads(),
            records=records,
            quiet=quiet,
        ):
            click.echo(f"{_table(some)}\nplain read of memory: {read_gbs:.1f} GB/s\n")
            rows += some
            reads.append(read_gbs)
        if json_file is not None:
            document = {"read_gbs": round(median(reads), 2), "rows": [asdict(row) for row in rows]}
            write_atomically(json_file, json_text(document))


def _measure(
    shapes: Sequence[Shape],
    *,
    precisions: Sequence[int],
    tokens: Sequence[int],
    accuracy: str,
    threads: int,
    records: Path | None,
    quiet: bool,
) -> Iterator[tuple[list[Row], float]]:
    """Yield the rows of one shape and number of tokens after another, and the GB/s of plain reads meanwhile."""
    # TVM is imported here, where there is someone to say that it is missing.
    from pmpd.tvm_kernels.bench.compare import measure_shape
    from pmpd.tvm_kernels.bench.measure import Rig, best_kernels
    from pmpd.tvm_kernels.ops.matmul.kernel import ACCURACIES

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    target = local_target()
    kernels = best_kernels(
        target, precisions=precisions, accuracies=read_list(accuracy, "accuracy", ACCURACIES), records=records
    )
    say(f"building {len(kernels)} kernels")
    rig = Rig(target, kernels, threads=threads)
    steps = [(shape, m) for shape in shapes for m in tokens]
    for number, (shape, m) in enumerate(steps, 1):
        say(f"[{number}/{len(steps)}] {shape}, {m} row{'s' * (m > 1)} of activations")
        yield measure_shape(rig, kernels, shape, m=m, threads=threads)


def _table(rows: Sequence[Row]) -> str:
    """Return rows as text."""
    cells = [("kernel", "p", "n", "k", "m", "µs", "GB/s", "of read", "GMAC/s")]
    for row in rows:
        macs = f"{row.n * row.k * row.m / row.microseconds / 1e3:.0f}" if row.m > 1 else ""
        sizes = str(row.p), str(row.n), str(row.k), str(row.m)
        cells.append((row.kernel, *sizes, f"{row.microseconds:.1f}", f"{row.gbs:.1f}", f"{row.of_read:.2f}", macs))
    name, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    return "\n".join(
        " ".join([kernel.ljust(name), *(cell.rjust(width) for cell, width in zip(rest, widths, strict=True))]).rstrip()
        for kernel, *rest in cells
    )


if __name__ == "__main__":
    main()
