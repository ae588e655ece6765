"""The command `pmpd-eval recipe`: the paper's tables and figures on any bundle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pmpd.eval.tasks.options import WORKER_OPTIONS
from pmpd.runtime.console.command import (
    FILE,
    Command,
    check_outputs,
    is_quiet,
    json_option,
    print_result,
    warn_unverified,
    write_result,
)
from pmpd.runtime.errors import PmpdError

__all__ = ["recipe"]


@click.command(
    "recipe",
    cls=Command,
    extra="cpu,eval",
    interrupted="interrupted: finished samples are kept, and the same command goes on from there",
    examples=(
        "pmpd-eval recipe table1 smollm2-pmpd --data dialogsum=test.jsonl --dev dialogsum=dev.jsonl --encoder minilm",
        "pmpd-eval recipe figure6 smollm2-pmpd --data dialogsum=test.jsonl --plot figure6.svg",
    ),
)
@click.argument("name", metavar="RECIPE")
@click.argument("bundle", type=FILE)
@click.option("--data", "data", multiple=True, metavar="TASK=FILE", help="Examples of a task. Repeatable.")
@click.option(
    "--dev", multiple=True, metavar="TASK=FILE", help="Other examples, to find the static schedule on. Repeatable."
)
@click.option(
    "--static", multiple=True, metavar="TASK=SPEC", help="The static schedule of a task, instead of a search."
)
@click.option(
    "--learned",
    multiple=True,
    metavar="NAME",
    help="A learned schedule of the bundle. Repeatable.  [default: learned, if it has one]",
)
@click.option("--high", type=float, metavar="BITS", help="The high precision.  [default: the bundle's highest]")
@click.option("--low", type=float, metavar="BITS", help="The low precision.  [default: the bundle's lowest]")
@click.option("--limit", type=int, metavar="N", help="Use the first N records of each task only.")
@click.option("--dev-limit", type=int, metavar="N", help="Use the first N records of --dev only.")
@click.option(
    "--tolerance",
    metavar="LOSS",
    default="1%",
    show_default=True,
    help="How much quality the static schedule may lose on --dev.",
)
@click.option("--dense-sparse/--no-dense-sparse", default=True, help="With the row DNS (slow).  [default: yes]")
@click.option("--max-new-tokens", type=int, metavar="N", help="Tokens per answer.  [default: the tasks']")
@click.option("--encoder", metavar="MODEL", help="Folder or hub id of the encoder of BERTScore, which it adds.")
@click.option(
    "--reference",
    metavar="MODEL",
    help="Folder, GGUF file, name or hub id of the unquantized fp model.  [default: the one the bundle was made from]",
)
@click.option("--threads", type=int, metavar="N", help="Threads to compute with.  [default: all processors]")
@WORKER_OPTIONS
@json_option("scores, settings and answers, without the data's texts,")
@click.option("--csv", "csv_file", type=FILE, metavar="FILE", help="Write a line per task and row.")
@click.option("--plot", "plot_file", type=FILE, metavar="FILE", help="Write a figure as SVG.")
def recipe(
    name: str,
    bundle: Path,
    data: Sequence[str],
    dev: Sequence[str],
    static: Sequence[str],
    learned: Sequence[str],
    high: float | None,
    low: float | None,
    dev_limit: int | None,
    tolerance: str,
    dense_sparse: bool,
    json_file: Path | None,
    csv_file: Path | None,
    plot_file: Path | None,
    **evaluation: Any,
) -> None:
    """Measure a table or figure of the paper: table1, 2, 4, 5, 9, figure3, 6 or 7.

    Rows and columns are the paper's, with intervals, and its own figures beside ours where the model is the same.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from pmpd.eval.recipes.recipe import RecipeSettings, run_recipe
    from pmpd.runtime import Bundle

    check_outputs(json_file, csv_file, plot_file)
    if plot_file is not None:
        from pmpd.eval.recipes.plots import recipe_plot
    settings = RecipeSettings(
        recipe=name,
        data={task: Path(file) for task, file in _by_task("data", data).items()},
        dev={task: Path(file) for task, file in _by_task("dev", dev).items()},
        static=_by_task("static", static),
        learned=tuple(learned),
        high=high,
        low=low,
        dev_limit=dev_limit,
        tolerance=tolerance,
        dense_sparse=dense_sparse,
        evaluation=evaluation,
    )
    opened = Bundle.open(bundle, verify=True)
    warn_unverified(bundle, verified=opened.manifest.verified)
    results = run_recipe(opened, settings, quiet=is_quiet())
    print_result(results.to_markdown(), json_file, results.to_json)
    write_result(csv_file, results.to_csv)
    if plot_file is not None:
        write_result(plot_file, lambda: recipe_plot(results))


def _by_task(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Read ``TASK=VALUE``, each task once.

    Raises:
        PmpdError: one has another form, or comes twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        task, separator, value = text.partition("=")
        if not (separator and task and value):
            raise PmpdError(f"--{option} {text!r:.100}: give TASK=VALUE, such as --{option} dialogsum=test.jsonl")
        if task in values:
            raise PmpdError(f"--{option}: {task} is given twice")
        values[task] = value
    return values
