"""The command `pmpd-npu`: reads the options, and leaves the rest to `report`, `explore` and the recipes."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[npu]'`")

from pmpd.runtime.console.output import json_text, markdown_table, write_atomically
from pmpd.runtime.errors import BundleError, MissingExtraError, PmpdError, unknown_choice

if TYPE_CHECKING:
    from pmpd.npu_backend.program.model import Model

__all__ = ["main"]

log = logging.getLogger("pmpd.npu_backend")

FAILED, USAGE = 1, 2
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
_FILE = click.Path(path_type=Path)


class _Main(click.Command):
    """A command with subcommands: a first argument that names one of those goes there."""

    commands: dict[str, click.Command]

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in self.commands:
            return self.commands[args[0]].make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(80)) for name, command in self.commands.items()])


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that applies options in the order in which they are given."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _list_hardware(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from pmpd.npu_backend.hardware.description import read_hardware, shipped_hardware

    table = [["name", "what", "MACs", "GHz", "GB/s", "buffers KiB", "mm²"]]
    for name in shipped_hardware():
        it = read_hardware(name)
        sizes = (it.matrix_unit.macs, it.matrix_unit.frequency_ghz, it.memory.bandwidth_gb_s)
        buffers = it.buffers.stream_kib + it.buffers.activation_kib
        table.append([name, it.title, *(f"{size:,g}" for size in (*sizes, buffers)), f"{it.area_mm2:.1f}"])
    click.echo(markdown_table(table, left=2))
    context.exit()


_WORK = _options(
    click.option(
        "--hardware",
        default="npu-4k",
        show_default=True,
        metavar="NAME",
        help="An accelerator that is shipped (see --list-hardware), or a TOML file.",
    ),
    click.option("--prompt", type=int, default=512, show_default=True, metavar="N", help="Tokens of the prompt."),
    click.option("--tokens", type=int, default=256, show_default=True, metavar="N", help="New tokens."),
)
_LOUDNESS = _options(
    click.option("-q", "--quiet", is_flag=True, help="Only the table of results: no details, no progress."),
    click.option("-v", "--verbose", is_flag=True, help="Say more of what is done."),
)
_LAYERS_ONLY = click.option("--layers-only", is_flag=True, help="Leave the output layer to the host.")
_JSON = click.option("--json", "json_file", type=_FILE, metavar="FILE", help="Write all results as JSON.")
_PLOT = click.option("--plot", "plot_file", type=_FILE, metavar="FILE", help="Draw a picture of them (.svg, .png).")


@click.command(cls=_Main, context_settings=_SETTINGS)
@click.argument("bundle", type=_FILE)
@_WORK
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    metavar="SPEC",
    help="A row of the table: fp16, uniform:4, static:3@85,2@170, … Repeatable. [default: fp16 and every precision]",
)
@_LAYERS_ONLY
@click.option(
    "--by",
    default="kind",
    show_default=True,
    type=click.Choice(["kind", "module", "node"]),
    help="What a line of the tables is: a kind of operator, the same node of all layers, or a node.",
)
@click.option(
    "--step",
    "steps",
    type=int,
    multiple=True,
    metavar="N",
    help="Look into this decode step, from 0. Repeatable. [default: tables: means; else the first at each precision]",
)
@_JSON
@click.option("--csv", "csv_file", type=_FILE, metavar="FILE", help="Write the tables of operators as CSV.")
@_PLOT
@click.option("--trace", "trace_file", type=_FILE, metavar="FILE", help="Write a trace for ui.perfetto.dev (JSON).")
@click.option("--instructions", "listing_file", type=_FILE, metavar="FILE", help="Write decode steps' instructions.")
@click.option(
    "--list-hardware",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_hardware,
    help="Print the accelerators that are shipped, and stop.",
)
@_LOUDNESS
@click.version_option(package_name="pmpd")
def main(
    bundle: Path,
    hardware: str,
    json_file: Path | None,
    csv_file: Path | None,
    plot_file: Path | None,
    trace_file: Path | None,
    listing_file: Path | None,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Simulate BUNDLE on an accelerator like FlightLLM: speed, energy, and where the time goes.

    BUNDLE is a bundle, a skeleton (pmpd-export --skeleton), or the name of a model whose configuration is shipped. The
    trace and the instructions are those of the last schedule.
    """
    _log(quiet=quiet, verbose=verbose)
    with _errors(code=USAGE):
        # Imported here, so that --help answers at once and a missing package is one line.
        from pmpd.npu_backend.hardware.description import read_hardware
        from pmpd.npu_backend.study.report import study

        _check_outputs(json_file, csv_file, trace_file, listing_file, picture=plot_file)
        accelerator = read_hardware(hardware)
        report = study(_open(bundle), accelerator, **options)
    with _errors(code=FAILED):
        click.echo(report.to_text(details=not quiet))
        _write(json_file, lambda: json_text(report.to_dict()))
        _write(csv_file, report.to_csv)
        _write(listing_file, report.to_listing)
        if trace_file is not None:
            from pmpd.npu_backend.study.trace import trace

            events = trace(report.last, report.model, accelerator, steps=report.steps)
            _write(trace_file, lambda: json.dumps(events, separators=(",", ":")))
        if plot_file is not None:
            from pmpd.npu_backend.study.plots import render, time_bars

            bars = time_bars(report.by_module(), report.title)
            _write(plot_file, lambda: render(bars, plot_file))


@click.command("explore", context_settings=_SETTINGS)
@click.argument("bundle", type=_FILE)
@_WORK
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    metavar="SPEC",
    help="Simulate every design under fp16, uniform:4, … Repeatable. [default: uniform at the highest precision]",
)
@_LAYERS_ONLY
@click.option(
    "--vary",
    multiple=True,
    metavar="FIELD=VALUES",
    help="Numbers of the hardware description: memory.bandwidth_gb_s=16,32,64, or =16:64:5 for 5 values. Repeatable.",
)
@click.option("--space", "space_file", type=_FILE, metavar="FILE", help="The same as a TOML file: tables and fields.")
@click.option("--sample", type=int, metavar="N", help="N random designs. [default: all combinations]")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the random designs.")
@click.option("--max-area-mm2", type=float, metavar="X", help="Leave out designs with a larger area (a proxy).")
@click.option("--max-power-w", type=float, metavar="X", help="Leave out designs that draw more on average.")
@click.option("--min-tokens-per-second", type=float, metavar="X", help="Leave out slower designs, prompt included.")
@_JSON
@click.option("--csv", "csv_file", type=_FILE, metavar="FILE", help="Write all designs within the limits as CSV.")
@_PLOT
@_LOUDNESS
def explore_space(
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
    quiet: bool,
    verbose: bool,
    **limits: float | None,
) -> None:
    """Find the accelerators that nothing beats on BUNDLE.

    Designs are compared by tokens/s (prompt included), a proxy for their area, and energy per token: the best are the
    Pareto front. What --vary and --space do not name is as in --hardware.
    """
    _log(quiet=quiet, verbose=verbose)
    with _errors(code=USAGE):
        from pmpd.npu_backend.hardware.description import read_hardware
        from pmpd.npu_backend.hardware.space import Space, parse_axis, read_space
        from pmpd.npu_backend.study.explore import Limits, explore
        from pmpd.npu_backend.study.generate import plan, read_schedule

        _check_outputs(json_file, csv_file, picture=plot_file)
        accelerator = read_hardware(hardware)
        axes = dict(read_space(space_file).axes) if space_file is not None else {}
        axes |= map(parse_axis, vary)
        if not axes:
            raise PmpdError("nothing varies: give --vary FIELD=VALUES or --space FILE")
        space = Space(axes)
        points = space.points(sample, seed=seed)
        model = _open(bundle)
        names = schedules or (f"uniform:{max(model.decode)}",)
        for name in names:
            plan(model, prompt=prompt, tokens=tokens, schedule=read_schedule(name, model))
    with _errors(code=FAILED):
        designs = len(names) * len(next(iter(points.values())))
        label = f"{designs:,} designs"
        with click.progressbar(length=designs, label=label, file=sys.stderr, hidden=quiet, show_pos=True) as bar:
            found = explore(
                model,
                accelerator,
                points,
                prompt=prompt,
                tokens=tokens,
                schedules=names,
                limits=Limits(**limits),
                layers_only=layers_only,
                progress=bar.update,
            )
        click.echo(found.to_text())
        _write(json_file, lambda: json_text(found.to_dict()))
        _write(csv_file, found.to_csv)
        if plot_file is not None:
            from pmpd.npu_backend.study.plots import pareto, render

            picture = pareto(found)
            _write(plot_file, lambda: render(picture, plot_file))


@click.group(context_settings=_SETTINGS)
def recipe() -> None:
    """Regenerate a figure of a paper."""


@recipe.command(context_settings=_SETTINGS)
@_JSON
@_PLOT
@_LOUDNESS
def figure5(json_file: Path | None, plot_file: Path | None, quiet: bool, verbose: bool) -> None:
    """Figure 5 of the PMPD paper: speed-ups on two NPUs."""
    _log(quiet=quiet, verbose=verbose)
    with _errors(code=USAGE):
        _check_outputs(json_file, picture=plot_file)
    with _errors(code=FAILED):
        from pmpd.npu_backend.recipes.figure5 import run

        click.echo(run(json=json_file, plot=plot_file, quiet=quiet))


main.commands = {"explore": explore_space, "recipe": recipe}


def _open(bundle: Path) -> Model:
    """Read a bundle or a skeleton, or make the graphs of a model whose configuration is shipped."""
    from pmpd.npu_backend.program.model import Model

    if bundle.exists():
        return Model.open(bundle)
    try:
        from pmpd.exporter.skeleton import shipped_models
    except ImportError:
        raise PmpdError(
            f"there is no bundle {bundle}: give a folder; a model's name needs `pip install 'pmpd[export]'`"
        ) from None
    if str(bundle) not in shipped_models():
        choices = unknown_choice("bundle", bundle, shipped_models())
        raise PmpdError(f"{choices}, or give the folder of a bundle or a skeleton")
    log.info("making the graphs of %s from its configuration", bundle)
    return Model.shipped(str(bundle))


def _log(*, quiet: bool, verbose: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pmpd").setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)


def _check_outputs(*files: Path | None, picture: Path | None = None) -> None:
    """Find out now whether results can be written, not after the work."""
    if picture is not None:
        from pmpd.npu_backend.study.plots import check_format

        check_format(picture)
    for path in filter(None, (*files, picture)):
        if path.exists() and not path.is_file():
            raise PmpdError(f"{path} is no file: choose another name for the result")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise PmpdError(f"cannot write {path}: the folder {path.parent} does not exist or is not writable")


def _write(path: Path | None, content: Callable[[], str | bytes]) -> None:
    if path is not None:
        write_atomically(path, content())
        log.info("wrote %s", path)


@contextmanager
def _errors(*, code: int) -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and an exit code."""
    try:
        yield
    except (BundleError, MissingExtraError) as error:
        _fail(str(error))
    except ImportError as error:
        _fail(f"{error.name} is not installed: run `pip install 'pmpd[npu]'`")
    except PmpdError as error:
        _fail(str(error), code=code)
    except KeyboardInterrupt:
        _fail("interrupted", code=130)


def _fail(message: str, *, code: int = FAILED) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
