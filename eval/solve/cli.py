"""The command `pmpd-schedule`: a schedule, found on examples or learned from prompts, and written into the bundle."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pmpd.eval.tasks.options import PROMPT_OPTIONS, TASK_OPTIONS, WORKER_OPTIONS
from pmpd.runtime.console.command import (
    FILE,
    Command,
    Group,
    check_outputs,
    json_option,
    list_option,
    print_result,
    warn_unverified,
)
from pmpd.runtime.errors import PmpdError

if TYPE_CHECKING:
    from pmpd.runtime import Bundle

__all__ = ["main"]

log = logging.getLogger("pmpd.eval")


_BUNDLE = click.argument("bundle", type=FILE)
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Leave the bundle as it is.")
_THREADS = click.option("--threads", type=int, metavar="N", help="Threads of each worker.  [default: all processors]")
_POINTS = click.option(
    "--switch-points", type=int, default=4, show_default=True, metavar="N", help="Candidate switch points of an answer."
)


@click.group("pmpd-schedule", cls=Group, extra="cpu,eval", default="find")
@click.version_option(package_name="pmpd")
def main() -> None:
    """Find or learn the schedule that a bundle decodes with.

    `pmpd-schedule BUNDLE --task NAME` is short for `pmpd-schedule find`.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@main.command(
    "find",
    cls=Command,
    extra="cpu,eval",
    interrupted="interrupted: the bundle is as it was; the same command goes on with what is measured",
    examples=(
        "pmpd-schedule smollm2-pmpd --task dialogsum --data dialogsum.dev.jsonl --limit 100",
        "pmpd-schedule chat-pmpd --task jsonl --data questions.jsonl --prompt-template '{question}' --as questions",
        "pmpd-schedule smollm2-pmpd --task dialogsum --data dialogsum.dev.jsonl --target-tps 60 --dry-run",
    ),
)
@_BUNDLE
@click.option(
    "--task", required=True, metavar="NAME", help="dialogsum, cnn_dailymail, iwslt, mt_bench, python or jsonl."
)
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
@_POINTS
@click.option(
    "--adaptive",
    is_flag=True,
    help="Try schedules that go up where the model is unsure, or run such a step again, too.",
)
@click.option("--low-prefill", is_flag=True, help="Try fewer bits for the prompt, too.")
@click.option("--exact", is_flag=True, help="Measure every candidate on every sample.")
@_THREADS
@WORKER_OPTIONS
@click.option("--as", "name", metavar="NAME", help="Name of the schedule in the bundle.  [default: the task's]")
@click.option("--default/--no-default", default=True, help="Make it what the bundle decodes with.  [default: yes]")
@_DRY_RUN
@json_option("what was found")
def _find(
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
    from pmpd.eval.settings import Settings
    from pmpd.eval.solve.race import Tolerance
    from pmpd.eval.solve.search import SearchSettings, solve

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
    name = name or settings.evaluation.task
    opened = _open(bundle, name, dry_run=dry_run)
    solution = solve(opened, settings)
    print_result(solution.to_markdown(), json_file, solution.to_json)
    if not dry_run:
        _publish(opened, name, str(solution.best), solution.to_json(), default=default)


@main.command(
    "learn",
    cls=Command,
    extra="cpu,eval",
    interrupted="interrupted: the bundle is as it was; the same command goes on with the answers that are there",
    examples=(
        "pmpd-schedule learn chat-pmpd",
        "pmpd-schedule learn smollm2-pmpd --data texts.jsonl --samples 512 --reference SmolLM2-135M",
        "pmpd-schedule learn smollm2-pmpd --task dialogsum --data dialogsum.train.jsonl --precisions 4,3",
    ),
)
@_BUNDLE
@click.option("--task", metavar="NAME", help="Learn for one task: dialogsum, cnn_dailymail, iwslt, mt_bench or jsonl.")
@click.option(
    "--data",
    metavar="FILE",
    type=FILE,
    help="Texts to complete (field text), or the task's examples.  [default: what the model writes itself]",
)
@click.option("--samples", type=int, default=256, show_default=True, metavar="N", help="Prompts to learn from.")
@PROMPT_OPTIONS
@list_option(
    "--precisions",
    metavar="LIST",
    help="Precisions to choose from, such as 4,3.  [default: the highest and the lowest]",
)
@_POINTS
@click.option(
    "--reference",
    metavar="MODEL",
    help="The fp model, whose answers are right: a folder, GGUF file, alias or hub id; or highest, for those of the "
    "highest precision.  [default: what the bundle was made from]",
)
@click.option(
    "--tolerance",
    type=float,
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="How much ROUGE-L, of 1, an answer may lose to the high precision's and still count as good.",
)
@click.option(
    "--layer",
    default="last",
    show_default=True,
    metavar="NAME",
    help="first, middle or last: whose keys and values it reads.",
)
@click.option(
    "--confidence",
    type=float,
    default=0.5,
    show_default=True,
    metavar="P",
    help="How likely a schedule must be good enough to be chosen. More is safer, and takes more bits.",
)
@click.option("--hidden", type=int, default=64, show_default=True, metavar="N", help="Width of the hidden layer.")
@click.option("--seeds", type=int, default=5, show_default=True, metavar="N", help="Networks that are trained.")
@_THREADS
@WORKER_OPTIONS
@click.option(
    "--as", "name", default="learned", show_default=True, metavar="NAME", help="Name of the schedule in the bundle."
)
@click.option("--default", is_flag=True, help="Make it what the bundle decodes with.")
@_DRY_RUN
@json_option("what was learned")
def _learn(
    bundle: Path,
    precisions: tuple[str, ...],
    switch_points: int,
    name: str,
    default: bool,
    dry_run: bool,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Train a small network that chooses the switch points for each prompt.

    It needs no examples of a task. Prompts are answered under all schedules that it may choose; it learns to tell from
    a prompt's keys and values which is the lowest that will do, and is tried on prompts that it has not seen.
    """
    from pmpd.eval.solve.learn import LearnSettings, learn
    from pmpd.runtime.format.precision import parse_precision

    check_outputs(json_file)
    settings = LearnSettings(precisions=tuple(map(parse_precision, precisions)), points=switch_points, **options)
    opened = _open(bundle, name, dry_run=dry_run)
    lesson, network = learn(opened, settings)
    print_result(lesson.to_markdown(), json_file, lesson.to_json)
    if not dry_run:
        _publish(opened, name, network, lesson.to_json(), default=default)


def _open(path: Path, name: str, *, dry_run: bool) -> Bundle:
    """Open a bundle that is to get a schedule of some name."""
    from pmpd.eval.solve.publish import check_name
    from pmpd.runtime import Bundle

    bundle = Bundle.open(path, verify=True)
    warn_unverified(path, verified=bundle.manifest.verified)
    check_name(bundle.manifest, name)
    if not dry_run and not os.access(path, os.W_OK):
        raise PmpdError(f"{path} cannot be written: give --dry-run, or a bundle of your own")
    return bundle


def _publish(bundle: Bundle, name: str, schedule: str | bytes, report: str, *, default: bool) -> None:
    from pmpd.eval.solve.publish import publish

    publish(bundle, name, schedule, report, default=default)
    log.info("%s has it as %s%s", bundle.path, name, ", its default" if default else "")
