"""The command `pmpd-eval`: reads the options, and leaves the rest to `runner`, `speed` and `report`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[eval]'`")

from pmpd.eval.recipes.cli import recipe
from pmpd.eval.tasks.options import TASK_OPTIONS, WORKER_OPTIONS
from pmpd.runtime.console.command import (
    FAILED,
    FILE,
    INTERRUPTED,
    Command,
    Failure,
    Group,
    Terminated,
    check_outputs,
    combine,
    is_quiet,
    json_option,
    list_option,
    print_result,
    warn_unverified,
    write_result,
)
from pmpd.runtime.errors import PmpdError

if TYPE_CHECKING:
    from pmpd.eval.peers.results import PeerResults
    from pmpd.eval.speed.results import SpeedResults

__all__ = ["main"]

log = logging.getLogger("pmpd.eval")

_INTERRUPTED = "interrupted: nothing was written"
_KEPT = "interrupted: finished samples are kept, and the same command goes on from there"
_BUNDLE = click.argument("bundle", type=FILE)
_SCHEDULES = click.option(
    "--schedule",
    "schedules",
    multiple=True,
    metavar="SPEC",
    help="A row of the table, such as uniform:4, static:3@16,2@32, or prefill:3,uniform:3 with the prompt at 3 bits. "
    "Repeatable.  [default: uniform at every precision]",
)
_RESOURCES = combine(
    click.option("--kernels", type=FILE, metavar="FILE", help="Use this kernel library instead of the bundle's."),
    click.option("--require-fast-kernels", is_flag=True, help="Fail if any product would run without a fast kernel."),
    click.option("--threads", type=int, metavar="N", help="Threads to compute with.  [default: all processors]"),
)
_ROWS = combine(
    _SCHEDULES,
    list_option(
        "--accuracy",
        "accuracies",
        metavar="NAME",
        help="Arithmetic of the kernels: int8 or exact; with both, every row is measured twice. Repeatable."
        "  [default: the bundle's]",
    ),
    _RESOURCES,
)
_TURNS = combine(
    click.option(
        "--prompt-tokens", type=int, default=128, show_default=True, metavar="N", help="Tokens of the prompt."
    ),
    click.option(
        "--max-new-tokens", type=int, default=128, show_default=True, metavar="N", help="Decode steps after the prompt."
    ),
    click.option(
        "--repetitions", type=int, default=5, show_default=True, metavar="N", help="How often each row is measured."
    ),
    click.option(
        "--max-others",
        type=float,
        metavar="PERCENT",
        help="Measure again, up to 5 times, if other processes used more than this share of all processors."
        "  [default: never]",
    ),
)
_PEERS = combine(
    click.option(
        "--peer",
        "peers",
        multiple=True,
        metavar="SPEC",
        help="Measure other programs in the same run, such as llama.cpp:Q4_0,Q4_K_M_imatrix (quantized with an "
        "importance matrix) or onnxruntime-genai:int4g32. Repeatable.",
    ),
    click.option(
        "--peer-python",
        metavar="FILE",
        default=sys.executable,
        help="The Python in which the peers' packages are installed.  [default: this one]",
    ),
    click.option(
        "--peer-models",
        type=FILE,
        metavar="DIR",
        help="Folder where the peers' models are made on first use, and kept.",
    ),
)
_FILES = combine(
    json_option("all results, with each sample,"),
    click.option("--csv", "csv_file", type=FILE, metavar="FILE", help="Write the table as CSV."),
)


def _route(arguments: list[str]) -> list[str]:
    """Return the arguments behind the name of their command; ``--task speed`` is another way to write `speed`."""
    for i, argument in enumerate(arguments):
        if argument == "--task=speed":
            return ["speed", *arguments[:i], *arguments[i + 1 :]]
        if arguments[i : i + 2] == ["--task", "speed"]:
            return ["speed", *arguments[:i], *arguments[i + 2 :]]
    return ["quality", *arguments]


@click.group("pmpd-eval", cls=Group, extra="cpu,eval", default="quality", route=_route)
@click.version_option(package_name="pmpd")
def main() -> None:
    """Measure the quality or the speed of a bundle under precision schedules.

    `pmpd-eval BUNDLE --task NAME` is short for `pmpd-eval quality`, and `--task speed` for `pmpd-eval speed`.
    """


@main.command(
    cls=Command,
    extra="cpu,eval",
    interrupted=_KEPT,
    examples=(
        "pmpd-eval demo-pmpd --task fidelity --data exporter/demo/openings.jsonl --html report.html",
        "pmpd-eval demo-pmpd --task perplexity --data stories.txt --schedule uniform:4 --schedule static:3@16,2@32",
    ),
)
@_BUNDLE
@click.option(
    "--task",
    required=True,
    metavar="NAME",
    help="What to measure: perplexity, decode_perplexity, fidelity, dialogsum, cnn_dailymail, iwslt, mt_bench, python "
    "or jsonl (your own prompts).",
)
@click.option(
    "--data", metavar="FILE", type=FILE, help="The texts or prompts: JSON lines (.jsonl, .jsonl.gz) or plain text."
)
@_ROWS
@TASK_OPTIONS
@click.option(
    "--reference",
    metavar="MODEL",
    help="Folder, GGUF file, name or hub id of the unquantized fp model.  [default: the one the bundle was made from]",
)
@click.option(
    "--reference-backend",
    metavar="NAME",
    default="transformers",
    show_default=True,
    help="What runs the fp model: transformers or optimum.",
)
@list_option(
    "--metric",
    "metrics",
    metavar="NAME",
    help="A column: rougeL, rouge2, rouge1, sacrebleu, bleu or bertscore. Repeatable.  [default: the task's]",
)
@click.option("--encoder", metavar="MODEL", help="Folder or hub id of the encoder of BERTScore, which it adds.")
@click.option("--stride", type=int, metavar="N", help="Tokens between windows, of perplexity.  [default: the window]")
@click.option("--speed", is_flag=True, help="Measure decode speed, too, all rows in turn.")
@WORKER_OPTIONS
@_FILES
@click.option(
    "--html", "html_file", type=FILE, metavar="FILE", help="Write a report with plots as one self-contained page."
)
def quality(
    bundle: Path,
    json_file: Path | None,
    csv_file: Path | None,
    html_file: Path | None,
    data: Path | None,
    **options: Any,
) -> None:
    """Measure how good the answers are (the default).

    Prints a table with one row per schedule; its first row, fp, is the unquantized model.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports every model it loads
    # Imported here, so that --help answers at once and a missing package is one line.
    from pmpd.eval.runner import evaluate
    from pmpd.eval.settings import Settings
    from pmpd.runtime import Bundle

    if html_file is not None:
        from pmpd.eval.report.page import render_html
    check_outputs(json_file, csv_file, html_file)
    settings = Settings(data=data or Path(), **options)
    opened = Bundle.open(bundle, verify=True)
    warn_unverified(bundle, verified=opened.manifest.verified)
    results = evaluate(opened, settings, quiet=is_quiet())
    print_result(results.to_markdown(), json_file, results.to_json)
    write_result(csv_file, results.to_csv)
    if html_file is not None:
        write_result(html_file, lambda: render_html(results))


@main.command(
    cls=Command,
    extra="cpu,eval",
    interrupted=_INTERRUPTED,
    examples=(
        "pmpd-eval speed demo-pmpd --schedule uniform:4 --schedule static:3@16,2@32 --repetitions 10",
        "pmpd-eval speed demo-pmpd --peer llama.cpp:Q4_0,Q2_K --peer-models peers",
    ),
)
@_BUNDLE
@_ROWS
@_TURNS
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the random prompt.")
@_PEERS
@click.option(
    "--peer-weights",
    type=FILE,
    metavar="MODEL",
    help="Make the peers' models of this checkpoint folder or GGUF file.  [default: random weights of the bundle's "
    "shape]",
)
@_FILES
def speed(bundle: Path, json_file: Path | None, csv_file: Path | None, **options: Any) -> None:
    """Measure tokens per second and bytes per token.

    Prints a table with one row per schedule, and one for each peer (--peer).
    """
    from pmpd.eval.speed.speed import SpeedSettings, measure_speed
    from pmpd.runtime import Bundle

    check_outputs(json_file, csv_file)
    settings = SpeedSettings(**options)
    opened = Bundle.open(bundle, verify=True)
    warn_unverified(bundle, verified=opened.manifest.verified)
    results = measure_speed(opened, settings, quiet=is_quiet())
    print_result(results.to_markdown(), json_file, results.to_json)
    write_result(csv_file, results.to_csv)
    _fail_if_unfinished(results)


@main.command(
    cls=Command,
    extra="cpu,eval",
    interrupted=_INTERRUPTED,
    examples=(
        "pmpd-eval peers smollm2-pmpd --data wiki.test.raw --peer llama.cpp:Q4_K_M,Q2_K --peer-models peers",
        "pmpd-eval peers smollm2-pmpd --reference smollm2 --data wiki.test.raw --limit 40 --json table.json",
    ),
)
@_BUNDLE
@click.option("--data", metavar="FILE", type=FILE, required=True, help="The text: plain, or JSON lines (.jsonl).")
@_SCHEDULES
@_RESOURCES
@click.option("--limit", type=int, default=16, show_default=True, metavar="N", help="Windows of text for perplexity.")
@click.option(
    "--reference",
    metavar="MODEL",
    help="Folder, name or hub id of the unquantized model that all are made of.  [default: the bundle's source]",
)
@_TURNS
@_PEERS
@click.option(
    "--peer-weights",
    type=FILE,
    metavar="MODEL",
    help="Make the peers' models of this checkpoint folder or GGUF file.  [default: the --reference]",
)
@json_option("the table, each repetition and each window,")
def peers(bundle: Path, json_file: Path | None, data: Path, limit: int, reference: str | None, **options: Any) -> None:
    """Compare a bundle with other programs on the same weights.

    Prints size, bytes per token, speed and perplexity of the unquantized model, of the bundle at each precision, and of
    each peer (--peer).
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from pmpd.eval.peers.measure import PeerSettings, measure_peers
    from pmpd.eval.speed.speed import SpeedSettings
    from pmpd.runtime import Bundle

    check_outputs(json_file)
    settings = PeerSettings(data=data, limit=limit, reference=reference, speed=SpeedSettings(**options))
    opened = Bundle.open(bundle, verify=True)
    warn_unverified(bundle, verified=opened.manifest.verified)
    results = measure_peers(opened, settings, quiet=is_quiet())
    print_result(results.to_markdown(), json_file, results.to_json)
    _fail_if_unfinished(results)


@main.command(
    cls=Command,
    extra="cpu,eval",
    examples=(
        "pmpd-eval compare monday.json tuesday.json --csv changes.csv",
        "pmpd-eval compare run.json run.json --row uniform:5=static:4@0,3@11 --row uniform:4=uniform:3",
    ),
)
@click.argument("a", type=FILE, metavar="A.json")
@click.argument("b", type=FILE, metavar="B.json")
@click.option(
    "--row",
    "rows",
    multiple=True,
    metavar="A=B",
    help="Compare a row of A with a row of B. Repeatable.  [default: rows of one name]",
)
@json_option("each difference, and what else differs,")
@click.option("--csv", "csv_file", type=FILE, metavar="FILE", help="Write the table as CSV.")
def compare(a: Path, b: Path, rows: tuple[str, ...], json_file: Path | None, csv_file: Path | None) -> None:
    """Compare two results that pmpd-eval wrote with --json.

    Prints each metric of each row in A and in B, and the difference over the samples that both have. To compare a
    bundle with other programs, see `pmpd-eval peers`.
    """
    from pmpd.eval.report.compare import compare_results, parse_pair
    from pmpd.eval.report.results import QualityResults

    check_outputs(json_file, csv_file)
    pairs = [parse_pair(row) for row in rows]
    comparison = compare_results(QualityResults.from_json(a), QualityResults.from_json(b), pairs)
    print_result(comparison.to_markdown(), json_file, comparison.to_json)
    write_result(csv_file, comparison.to_csv)


main.add_command(recipe)


def _fail_if_unfinished(results: SpeedResults | PeerResults) -> None:
    """Fail as what ended the measurement early would have failed. The results are written."""
    if not results.unfinished:
        return
    what, code = "interrupted: ", INTERRUPTED
    if isinstance(results.cause, Terminated):
        code = 128 + results.cause.number
    elif isinstance(results.cause, PmpdError):
        what, code = f"{results.cause}; ", FAILED
    raise Failure(f"{what}{results.progress}; missing: {', '.join(results.unfinished)}", code)


if __name__ == "__main__":
    main()
