"""The command `pmpd-schedule`: a schedule for a task, found on examples and written into the bundle."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import click

from pmpd.eval.tasks.options import TASK_OPTIONS
from pmpd.runtime.console.command import (
    FILE,
    Command,
    check_outputs,
    json_option,
    print_result,
    warn_unverified,
)
from pmpd.runtime.errors import PmpdError

__all__ = ["main"]

log = logging.getLogger("pmpd.eval")


@click.command(
    "pmpd-schedule",
    cls=Command,
    extra="cpu,eval",
    interrupted="interrupted: the bundle is as it was; the same command goes on with what is measured",
    examples=(
        "pmpd-schedule smollm2-pmpd --task dialogsum --data dialogsum.dev.jsonl --limit 100",
        "pmpd-schedule chat-pmpd --task jsonl --data questions.jsonl --prompt-template '{question}' --as questions",
        "pmpd-schedule smollm2-pmpd --task dialogsum --data dialogsum.dev.jsonl --target-tps 60 --dry-run",
    ),
)
@click.argument("bundle", type=FILE)
@click.option("--task", required=True, metavar="NAME", help="dialogsum, cnn_dailymail, mt_bench or jsonl (yours).")
@click.option("--data", metavar="FILE", type=FILE, help="Examples: JSON lines (.jsonl, .jsonl.gz).")
@TASK_OPTIONS
@click.option(
    "--tolerance",
    metavar="LOSS",
    default="1%",
    show_default=True,
    help="How much quality may be lost, in units of the metric (0.5) or as a share of it (1%).",
)
@click.option("--metric", metavar="NAME", help="What quality is measured by.  [default: the task's first]")
@click.option(
    "--minimize", metavar="WHAT", default="bits", show_default=True, help="bits, bytes or time of a decode step."
)
@click.option("--target-tps", type=float, metavar="X", help="Look for the best quality at X tokens per second instead.")
@click.option(
    "--switch-points", type=int, default=4, show_default=True, metavar="N", help="Candidate switch points of an answer."
)
@click.option(
    "--adaptive",
    is_flag=True,
    help="Try schedules that go up where the model is unsure, or run such a step again, too.",
)
@click.option("--low-prefill", is_flag=True, help="Try fewer bits for the prompt, too.")
@click.option("--exact", is_flag=True, help="Measure every candidate on every sample.")
@click.option("--threads", type=int, metavar="N", help="Threads of each worker.  [default: all processors]")
@click.option(
    "--workers", type=int, default=1, show_default=True, metavar="N", help="Processes that answer, side by side (Ray)."
)
@click.option("--address", metavar="HOST:PORT", help="Ray cluster for the workers; its nodes have BUNDLE at this path.")
@click.option("--as", "name", metavar="NAME", help="Name of the schedule in the bundle.  [default: the task's]")
@click.option("--default/--no-default", default=True, help="Make it what the bundle decodes with.  [default: yes]")
@click.option("--dry-run", is_flag=True, help="Leave the bundle as it is.")
@json_option("what was found")
def main(
    bundle: Path,
    data: Path | None,
    tolerance: str,
    metric: str | None,
    minimize: str,
    target_tps: float | None,
    switch_points: int,
    adaptive: bool,
    low_prefill: bool,
    exact: bool,
    workers: int,
    address: str | None,
    name: str | None,
    default: bool,
    dry_run: bool,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Find the schedule of fewest bits that keeps the quality of a task.

    Answers under the bundle's highest precision are what others are compared with. The schedule becomes part of the
    bundle: pmpd-run decodes with it from then on, or by name with --schedule.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from pmpd.eval.runner import Settings
    from pmpd.eval.solve.publish import check_name, publish
    from pmpd.eval.solve.race import Tolerance
    from pmpd.eval.solve.search import SearchSettings, solve
    from pmpd.runtime import Bundle

    check_outputs(json_file)
    settings = SearchSettings(
        evaluation=Settings(data=data or Path(), **options),
        tolerance=Tolerance.parse(tolerance),
        minimize=minimize,
        target_tps=target_tps,
        points=switch_points,
        metric=metric,
        adaptive=adaptive,
        low_prefill=low_prefill,
        early=not exact,
        workers=workers,
        address=address,
    )
    opened = Bundle.open(bundle, verify=True)
    warn_unverified(bundle, verified=opened.manifest.verified)
    name = name or settings.evaluation.task
    check_name(opened.manifest, name)
    if not dry_run and not os.access(bundle, os.W_OK):
        raise PmpdError(f"{bundle} cannot be written: give --dry-run, or a bundle of your own")
    solution = solve(opened, settings)
    print_result(solution.to_markdown(), json_file, solution.to_json)
    if not dry_run:
        publish(opened, name, str(solution.best), solution.to_json(), default=default)
        log.info("%s has it as %s%s", bundle, name, ", its default" if default else "")
