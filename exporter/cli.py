"""`pmpd-export`: the command line of the exporter."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[export]'`")

from pmpd.runtime.errors import MissingExtraError, PmpdError

if TYPE_CHECKING:
    from pmpd.exporter.config import ExportConfig
    from pmpd.exporter.pipeline import Export
    from pmpd.exporter.skeleton import Skeleton

log = logging.getLogger("pmpd.exporter")


def _bits(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of bits like 4,3,2") from None


def _targets(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return () if value == "none" else tuple(dict.fromkeys(value.split(",")))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-m", "--model", required=True, help="Hub id, alias (demo, phi-1.5, vicuna-7b, …) or checkpoint folder.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Bundle folder.  [default: NAME-pmpd or NAME-skeleton]"
)
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option(
    "--precisions", default="4,3,2", show_default=True, callback=_bits, help="Bits to decode at, high to low."
)
@click.option("--parent", type=int, help="Bits of the nested codes.  [default: the highest precision]")
@click.option("--method", default="anyprecision", show_default=True, help="How weights are quantized.")
@click.option("--seed-precision", type=int, default=2, show_default=True, help="Bits of the first clustering.")
@click.option("--prefill", type=int, help="Bits to prefill at.  [default: the highest precision]")
@click.option("--head-precision", type=int, help="Bits of the output layer, in every graph.  [default: 6]")
@click.option("--groups", type=int, default=1, show_default=True, help="Codebooks per row.")
@click.option(
    "--schedule", help="Default schedule, e.g. static:3@16,2@32.  [default: uniform at the highest precision]"
)
@click.option("--context-length", type=int, help="Longest text in tokens.  [default: what the checkpoint allows]")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text (.txt, .jsonl, .jsonl.gz) whose gradients weight the clustering.",
)
@click.option("--calibration-samples", type=int, default=64, show_default=True, help="Sequences of that text.")
@click.option("--calibration-length", type=int, default=256, show_default=True, help="Tokens of each sequence.")
@click.option(
    "--target",
    "targets",
    callback=_targets,
    help="Machines to build kernels for: x86-64-v4,x86-64-v3,aarch64-linux or none.  [default: this one]",
)
@click.option("--accuracy", help="int8 or exact: how kernels compute.  [default: int8]")
@click.option("--skeleton", is_flag=True, help="Graphs and tensor table without weights, from config.json alone.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle, once the new one is complete.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing but errors and the result.")
@click.option("-v", "--verbose", is_flag=True, help="More of what happens.")
@click.version_option(package_name="pmpd")
def main(
    model: str,
    output: Path | None,
    head_precision: int | None,
    accuracy: str | None,
    skeleton: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Turn a language model into a PMPD bundle: ONNX graphs at several precisions over one file of nested weights.

    An interrupted export resumes when the same command is run again.
    """
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pmpd").setLevel(level)
    # transformers announces every model it builds; the progress here is ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of transformers too
    try:
        from pmpd.exporter.config import DEFAULT_HEAD_PRECISION, ExportConfig

        config = ExportConfig(
            model=model,
            output=output or Path(f"{Path(model).resolve().name}-{'skeleton' if skeleton else 'pmpd'}"),
            head_precision=DEFAULT_HEAD_PRECISION if head_precision is None else head_precision,
            accuracy=accuracy,
            **options,
        )
        export = _prepare(config, skeleton=skeleton)
        if dry_run:
            click.echo("\n".join(export.describe()))
            return
        for line in export.describe():
            log.info(line)
        manifest = export.run(quiet=quiet)
    except MissingExtraError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: run `pip install 'pmpd[cpu,export]'`")
    except (PmpdError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted: run the same command again to go on from here", code=130)
    for check, result in manifest.verification.items():
        log.info("verified  %s: cosine %.7f, argmax %.0f %%", check, result["cosine"], 100 * result["argmax_agreement"])
    if as_json:
        click.echo(json.dumps({"bundle": str(config.output), "verification": manifest.verification}, indent=1))
    else:
        click.echo(config.output)


def _prepare(config: ExportConfig, *, skeleton: bool) -> Export | Skeleton:
    if skeleton:
        from pmpd.exporter.skeleton import Skeleton

        return Skeleton.prepare(config)
    from pmpd.exporter.pipeline import Export  # takes torch, which a skeleton does without

    return Export.prepare(config)


def _fail(message: str, *, code: int = 1) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
