"""The command `pmpd-eval`: reads the options, and leaves the rest to `runner`, `results` and `report`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[eval]'`")

from pmpd.runtime.errors import BundleError, MissingExtraError, PmpdError

__all__ = ["main"]

FAILED, USAGE = 1, 2


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--task",
    required=True,
    metavar="NAME",
    help="perplexity, fidelity, dialogsum, cnn_dailymail, mt_bench, jsonl or speed.",
)
@click.option(
    "--data",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="JSON lines (.jsonl, .jsonl.gz) or a text. Speed needs none.",
)
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    metavar="SPEC",
    help="A row of the table: uniform:4, static:3@16,2@32, … Repeatable. [default: uniform at every precision]",
)
@click.option(
    "--accuracy",
    "accuracies",
    multiple=True,
    metavar="NAME",
    help="How compiled kernels compute: exact or int8. Repeatable: all rows with each. [default: the bundle's]",
)
@click.option(
    "--kernels",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Use this kernel library instead of the bundle's.",
)
@click.option("--require-fast-kernels", is_flag=True, help="Fail where anything slower than a fast kernel would run.")
@click.option("--limit", type=int, metavar="N", help="Only the first N records (perplexity: windows of text).")
@click.option("--max-new-tokens", type=int, metavar="N", help="Tokens per answer. [default: the task's]")
@click.option("--prompt-tokens", type=int, metavar="N", help="Speed: random tokens in the prompt. [default: 128]")
@click.option("--repetitions", type=int, metavar="N", help="Speed: how often each row is measured. [default: 5]")
@click.option("--seed", type=int, metavar="N", help="Speed: seed of the random tokens. [default: 0]")
@click.option(
    "--max-others",
    type=float,
    metavar="PERCENT",
    help="Speed: measure again, up to 5 times, where other processes used more of all processors. [default: never]",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="SPEC",
    help="Speed: measure beside it, in turns, llama.cpp:Q4_0,Q2_K or onnxruntime-genai:int4g32,… Repeatable.",
)
@click.option("--peer-python", metavar="FILE", help="Speed: the Python that has the peers' packages. [default: this]")
@click.option(
    "--peer-models",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Speed: where random models of the bundle's shape are made for peers, and kept.",
)
@click.option(
    "--prompt-template",
    metavar="TEXT",
    help=r"The prompt, with {field} from the record; \n is a new line. [default: the task's]",
)
@click.option(
    "--reference-field",
    metavar="NAME",
    help="Field with the reference text. [default: the task's, else the fp model's answer]",
)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Put prompts through the model's chat template. [default: where task and model have one]",
)
@click.option(
    "--reference",
    metavar="MODEL",
    help="Folder, alias or hub id of the fp model. [default: what the bundle was made from]",
)
@click.option(
    "--reference-backend",
    metavar="NAME",
    help="What runs the fp model: transformers or optimum. [default: transformers]",
)
@click.option("--threads", type=int, metavar="N", help="Threads to compute with. [default: all processors]")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write all results, samples too, as JSON.",
)
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the table as CSV.")
@click.option(
    "--html",
    "html_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a report with plots, one self-contained page.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress, no warnings.")
@click.option("-v", "--verbose", is_flag=True, help="Say more of what is done.")
@click.version_option(package_name="pmpd")
def main(
    bundle: Path,
    task: str,
    json_file: Path | None,
    csv_file: Path | None,
    html_file: Path | None,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Measure quality or speed of BUNDLE under precision schedules.

    The table goes to stdout: one row per schedule. Quality stands beside the row "fp" of the unquantized model, speed
    beside other programs (--peer).
    """
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pmpd").setLevel(level)
    # transformers announces every model it loads; the progress here is ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    stage = USAGE
    try:
        # Imported here, so that --help answers at once and a missing package is one line.
        from pmpd.eval import runner
        from pmpd.eval.speed import speed
        from pmpd.runtime import Bundle
        from pmpd.runtime.console.output import write_atomically

        kind: Any = speed.SpeedSettings if task == speed.SPEED else runner.Settings
        prepare: Any = speed.prepare_speed if task == speed.SPEED else runner.prepare
        measure: Any = speed.measure_speed if task == speed.SPEED else runner.evaluate
        if html_file is not None:
            from pmpd.eval.report.page import render_html
        for file in filter(None, (json_file, csv_file, html_file)):
            _check_output(file)
        settings = kind(task=task, **_given(options, kind, task=task, html=html_file is not None))
        opened = Bundle.open(bundle, verify=True)
        prepare(opened, settings)
        stage = FAILED
        results = measure(opened, settings, quiet=quiet)
        click.echo(results.to_markdown())
        if json_file is not None:
            write_atomically(json_file, results.to_json())
        if csv_file is not None:
            write_atomically(csv_file, results.to_csv())
        if html_file is not None:
            write_atomically(html_file, render_html(results))
        if results.unfinished:
            _fail(f"interrupted: {results.progress}; missing: {', '.join(results.unfinished)}", code=130)
    except (BundleError, MissingExtraError) as error:
        _fail(str(error))
    except ImportError as error:
        _fail(f"{error.name} is not installed: run `pip install 'pmpd[cpu,eval]'`")
    except PmpdError as error:
        _fail(str(error), code=stage)
    except KeyboardInterrupt:
        _fail("interrupted: nothing was written", code=130)


def _given(options: Mapping[str, Any], kind: Any, *, task: str, html: bool) -> dict[str, Any]:
    """Return the options that were given. Raises PmpdError for one that the task, of settings `kind`, does not have."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    known = {field.name for field in fields(kind)}
    flags = {param.name: param.opts[0] for param in click.get_current_context().command.params}
    stray = [flags[name] for name in given if name not in known]
    if html and "data" not in known:
        stray.append("--html")  # the report is one of quality
    if stray:
        raise PmpdError(f"{stray[0]} does not apply to the task {task}: leave it out")
    if "prompt_template" in given:
        given["prompt_template"] = _unescape(given["prompt_template"])
    return given


def _check_output(path: Path) -> None:
    """Find out now whether a result can be written, not after hours of work."""
    if path.exists() and not path.is_file():
        raise PmpdError(f"{path} is no file: choose another name for the result")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise PmpdError(f"cannot write {path}: the folder {path.parent} does not exist or is not writable")


def _unescape(template: str) -> str:
    """Take ``\\n`` for a new line: a shell passes it in plain quotes as two characters."""
    return template.replace(r"\n", "\n").replace(r"\t", "\t")


def _fail(message: str, *, code: int = FAILED) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
