"""The command `pmpd-eval`: reads the options, and leaves the rest to `runner`, `results` and `report`."""

from __future__ import annotations

import logging
import os
import sys
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
    "--task", required=True, metavar="NAME", help="perplexity, fidelity, dialogsum, cnn_dailymail, mt_bench or jsonl."
)
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="JSON lines (.jsonl, .jsonl.gz) or a text.",
)
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    metavar="SPEC",
    help="A row of the table: uniform:4, static:3@16,2@32, … Repeatable. [default: uniform at every precision]",
)
@click.option("--limit", type=int, metavar="N", help="Only the first N records (perplexity: windows of text).")
@click.option("--max-new-tokens", type=int, metavar="N", help="Tokens per answer. [default: the task's]")
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
    default="transformers",
    show_default=True,
    metavar="NAME",
    help="What runs the fp model: transformers or optimum.",
)
@click.option("--threads", type=int, metavar="N", help="Threads to compute with. [default: all processors]")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write all results, samples too, as JSON.",
)
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
    prompt_template: str | None,
    json_file: Path | None,
    html_file: Path | None,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Measure quality and speed of BUNDLE under precision schedules, beside its floating-point model.

    The table goes to stdout: one row per schedule, after the row "fp" of the unquantized model.
    """
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pmpd").setLevel(level)
    # transformers announces every model it loads; the progress here is ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    stage = USAGE
    try:
        # Imported here, so that --help answers at once and a missing package is one line.
        from pmpd.eval.results import write_atomically
        from pmpd.eval.runner import Settings, evaluate, prepare
        from pmpd.runtime import Bundle

        if html_file is not None:
            from pmpd.eval.report import render_html
        for file in filter(None, (json_file, html_file)):
            _check_output(file)
        settings = Settings(prompt_template=prompt_template and _unescape(prompt_template), **options)
        opened = Bundle.open(bundle, verify=True)
        prepare(opened, settings)
        stage = FAILED
        results = evaluate(opened, settings, quiet=quiet)
        click.echo(results.to_markdown())
        if json_file is not None:
            write_atomically(json_file, results.to_json())
        if html_file is not None:
            write_atomically(html_file, render_html(results))
    except (BundleError, MissingExtraError) as error:
        _fail(str(error))
    except ImportError as error:
        _fail(f"{error.name} is not installed: run `pip install 'pmpd[cpu,eval]'`")
    except PmpdError as error:
        _fail(str(error), code=stage)
    except KeyboardInterrupt:
        _fail("interrupted: nothing was written", code=130)


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
