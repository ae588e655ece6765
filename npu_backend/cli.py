"""The command `pmpd-npu`: parses the options and calls `report`, `explore` and the recipes."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[npu]'`")

from pmpd.runtime.console.command import (
    FILE,
    Command,
    Group,
    check_outputs,
    combine,
    is_quiet,
    json_option,
    print_result,
    warn_unverified,
    write_result,
)
from pmpd.runtime.console.output import json_text, markdown_table
from pmpd.runtime.console.progress import progress
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.bundle import Bundle

if TYPE_CHECKING:
    from pmpd.npu_backend.program.model import Model

__all__ = ["main"]

log = logging.getLogger("pmpd.npu_backend")


def _list_hardware(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from pmpd.npu_backend.hardware.description import read_hardware, shipped_hardware

    table = [["name", "what", "MACs", "GHz", "GB/s", "buffers KiB", "mm²"]]
    for name in shipped_hardware():
        hardware = read_hardware(name)
        sizes = (hardware.matrix_unit.macs, hardware.matrix_unit.frequency_ghz, hardware.memory.bandwidth_gb_s)
        buffers = hardware.buffers.stream_kib + hardware.buffers.activation_kib
        table.append([name, hardware.title, *(f"{size:,g}" for size in (*sizes, buffers)), f"{hardware.area_mm2:.1f}"])
    click.echo(markdown_table(table, left=2))
    context.exit()


_WORK = combine(
    click.option(
        "--hardware",
        default="npu-4k",
        show_default=True,
        metavar="NAME",
        help="The accelerator: a name from --list-hardware, or a TOML file.",
    ),
    click.option("--prompt", type=int, default=512, show_default=True, metavar="N", help="Tokens of the prompt."),
    click.option("--tokens", type=int, default=256, show_default=True, metavar="N", help="New tokens."),
)
_LAYERS_ONLY = click.option("--layers-only", is_flag=True, help="Leave out the output layer: the host computes it.")
_PLOT = click.option("--plot", "plot_file", type=FILE, metavar="FILE", help="Draw the results (.svg or .png).")


@click.group("pmpd-npu", cls=Group, extra="npu", default="simulate")
@click.version_option(package_name="pmpd")
def main() -> None:
    """Simulate a bundle on an accelerator like FlightLLM: speed, energy, and where the time goes.

    `pmpd-npu BUNDLE` is short for `pmpd-npu simulate BUNDLE`.
    """


@main.command(
    cls=Command,
    extra="npu",
    examples=(
        "pmpd-npu vicuna-7b --hardware u280 --schedule fp16 --schedule static:3@85,2@170",
        "pmpd-npu demo-pmpd --plot time.svg --trace trace.json",
    ),
)
@click.argument("bundle", type=FILE)
@_WORK
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    metavar="SPEC",
    help="A row of the table, such as fp16, uniform:4 or static:3@85,2@170. Repeatable.  [default: fp16 and every "
    "precision]",
)
@_LAYERS_ONLY
@click.option(
    "--by",
    default="kind",
    show_default=True,
    type=click.Choice(["kind", "module", "node"]),
    help="What a row of the detailed tables sums: a kind of operator, a module over all layers, or a single node.",
)
@click.option(
    "--step",
    "steps",
    type=int,
    multiple=True,
    metavar="N",
    help="Show decode step N, counted from 0. Repeatable.  [default: means over all steps in tables, the first step at "
    "each precision in --trace and --instructions]",
)
@click.option("--details", is_flag=True, help="Also print a table of operators for each phase.")
@json_option()
@click.option("--csv", "csv_file", type=FILE, metavar="FILE", help="Write the tables of operators as CSV.")
@_PLOT
@click.option("--trace", "trace_file", type=FILE, metavar="FILE", help="Write a trace for ui.perfetto.dev (JSON).")
@click.option(
    "--instructions", "listing_file", type=FILE, metavar="FILE", help="Write the instructions of decode steps."
)
@click.option(
    "--list-hardware",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_hardware,
    help="Print the accelerators that PMPD knows, and stop.",
)
def simulate(
    bundle: Path,
    hardware: str,
    json_file: Path | None,
    csv_file: Path | None,
    plot_file: Path | None,
    trace_file: Path | None,
    listing_file: Path | None,
    details: bool,
    **options: Any,
) -> None:
    """Simulate the generation of a text (the default).

    BUNDLE is a bundle, a skeleton (pmpd-export --skeleton), or the name of a model whose configuration PMPD ships. The
    trace and the instructions show the last schedule.
    """
    # Imported here, so that --help answers at once and a missing package is one line.
    from pmpd.npu_backend.hardware.description import read_hardware
    from pmpd.npu_backend.study.report import study

    _check_outputs(json_file, csv_file, trace_file, listing_file, picture=plot_file)
    accelerator = read_hardware(hardware)
    report = study(_open(bundle), accelerator, **options)
    print_result(report.to_text(details=details), json_file, lambda: json_text(report.to_dict()))
    write_result(csv_file, report.to_csv)
    write_result(listing_file, report.to_listing)
    if trace_file is not None:
        from pmpd.npu_backend.study.trace import trace

        events = trace(report.last, report.model, accelerator, steps=report.steps)
        write_result(trace_file, lambda: json.dumps(events, separators=(",", ":")))
    if plot_file is not None:
        from pmpd.npu_backend.study.plots import render, time_bars

        bars = time_bars(report.by_module(), report.title)
        write_result(plot_file, lambda: render(bars, plot_file))


@main.command(
    cls=Command,
    extra="npu",
    examples=("pmpd-npu explore vicuna-7b --vary memory.bandwidth_gb_s=16:128:8 --vary matrix_unit.rows=8,16,32",),
)
@click.argument("bundle", type=FILE)
@_WORK
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    metavar="SPEC",
    help="Simulate every design under fp16, uniform:4, … Repeatable.  [default: uniform at the highest precision]",
)
@_LAYERS_ONLY
@click.option(
    "--vary",
    multiple=True,
    metavar="FIELD=VALUES",
    help="Values for a number of the hardware description: memory.bandwidth_gb_s=16,32,64, or =16:64:5 for 5 values "
    "from 16 to 64. Repeatable.",
)
@click.option("--space", "space_file", type=FILE, metavar="FILE", help="The same as --vary, in a TOML file.")
@click.option("--sample", type=int, metavar="N", help="Try N random designs.  [default: all combinations]")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the random designs.")
@click.option("--max-area-mm2", type=float, metavar="X", help="Leave out designs with a larger area (a proxy).")
@click.option("--max-power-w", type=float, metavar="X", help="Leave out designs that draw more on average.")
@click.option("--min-tokens-per-second", type=float, metavar="X", help="Leave out slower designs, prompt included.")
@json_option()
@click.option("--csv", "csv_file", type=FILE, metavar="FILE", help="Write all designs within the limits as CSV.")
@_PLOT
def explore(
    bundle: Path,
    hardware: str,
    schedules: tuple[str, ...],
    prompt: int,
    tokens: int,
    layers_only: bool,
    vary: tuple[str, ...],
    space_file: Path | None,
    sample: int | None,
    seed: int,
    json_file: Path | None,
    csv_file: Path | None,
    plot_file: Path | None,
    **limits: float | None,
) -> None:
    """Search for the best accelerators for BUNDLE.

    Designs are compared by tokens/s (prompt included), a proxy of their area, and energy per token; the result is the
    Pareto front. Numbers that neither --vary nor --space gives are those of --hardware.
    """
    from pmpd.npu_backend.hardware.description import read_hardware
    from pmpd.npu_backend.hardware.space import Space, parse_axis, read_space
    from pmpd.npu_backend.study import explore as exploration
    from pmpd.npu_backend.study.generate import plan, read_schedule

    _check_outputs(json_file, csv_file, picture=plot_file)
    accelerator = read_hardware(hardware)
    axes = dict(read_space(space_file).axes) if space_file is not None else {}
    axes |= map(parse_axis, vary)
    if not axes:
        raise PmpdError("nothing varies: give --vary FIELD=VALUES or --space FILE")
    points = Space(axes).points(sample, seed=seed)
    model = _open(bundle)
    names = schedules or (f"uniform:{max(model.decode)}",)
    for name in names:
        plan(model, prompt=prompt, tokens=tokens, schedule=read_schedule(name, model))
    designs = len(names) * len(next(iter(points.values())))
    with progress("designs", total=designs, unit="design") as shown:
        results = exploration.explore(
            model,
            accelerator,
            points,
            prompt=prompt,
            tokens=tokens,
            schedules=names,
            limits=exploration.Limits(**limits),
            layers_only=layers_only,
            progress=shown.advance,
        )
    print_result(results.to_text(), json_file, lambda: json_text(results.to_dict()))
    write_result(csv_file, results.to_csv)
    if plot_file is not None:
        from pmpd.npu_backend.study.plots import pareto, render

        picture = pareto(results)
        write_result(plot_file, lambda: render(picture, plot_file))


@main.group(cls=Group)
def recipe() -> None:
    """Regenerate a figure of a paper."""


@recipe.command(cls=Command, extra="npu", examples=("pmpd-npu recipe figure5 --plot figure5.svg",))
@json_option()
@_PLOT
def figure5(json_file: Path | None, plot_file: Path | None) -> None:
    """Regenerate Figure 5 of the PMPD paper: speed-ups on two NPUs."""
    _check_outputs(json_file, picture=plot_file)
    from pmpd.npu_backend.recipes.figure5 import reproduce

    figure = reproduce()
    print_result(figure.to_text(details=not is_quiet()), json_file, lambda: json_text(figure.to_dict()))
    if plot_file is not None:
        from pmpd.npu_backend.study.plots import render

        picture = figure.plot()
        write_result(plot_file, lambda: render(picture, plot_file))


def _open(bundle: Path) -> Model:
    """Read a bundle or a skeleton, or make the graphs of a model whose configuration is shipped."""
    from pmpd.npu_backend.program.model import Model

    if bundle.exists():
        manifest = Bundle.open(bundle, skeleton=True).manifest
        warn_unverified(bundle, verified=manifest.verified or manifest.skeleton)  # a skeleton has nothing to verify
        return Model.open(bundle)
    from pmpd.exporter.source.models import shipped_models

    if str(bundle) not in shipped_models():
        choices = unknown_choice("bundle", bundle, shipped_models())
        raise PmpdError(f"{choices}, or give the folder of a bundle or a skeleton")
    log.info("making the graphs of %s from its configuration", bundle)
    return Model.shipped(str(bundle))


def _check_outputs(*files: Path | None, picture: Path | None = None) -> None:
    """Check before the work that results can be written."""
    if picture is not None:
        from pmpd.npu_backend.study.plots import check_format

        check_format(picture)
    check_outputs(*files, picture)


if __name__ == "__main__":
    main()
