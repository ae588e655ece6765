"""`pmpd-export`: the command line of the exporter."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import click
except ImportError:
    sys.exit("error: click is not installed: run `pip install 'pmpd[export]'`")

from pmpd.runtime.console.command import (
    Command,
    check_outputs,
    is_quiet,
    json_option,
    list_option,
    print_result,
    warn_unverified,
)
from pmpd.runtime.console.output import json_text, markdown_table
from pmpd.runtime.format.targets import MACHINES

if TYPE_CHECKING:
    from pmpd.exporter.config import ExportConfig
    from pmpd.exporter.pipeline import Export
    from pmpd.exporter.skeleton import Skeleton

log = logging.getLogger("pmpd.exporter")

_EXAMPLES = (
    "pmpd-export --model demo --output demo-pmpd",
    "pmpd-export --model ./Phi-1.5 --precisions 4,3,2 --calibration stories.txt --schedule static:3@16,2@32",
    "pmpd-export --model ./Phi-1.5 --precisions 4,3.25,3    # a precision between 3 and 4",
    "pmpd-export --model vicuna-7b --skeleton    # graphs alone, for pmpd-npu",
)


def _calibration(_context: click.Context, _parameter: click.Parameter, value: str | None) -> Path | str | None:
    from pmpd.exporter.config import calibration_text

    return calibration_text(value)


def _bits(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    from pmpd.exporter.config import parse_bits
    from pmpd.runtime.errors import PmpdError

    if value is None:
        return None
    try:
        return parse_bits(value)
    except PmpdError as error:
        raise click.BadParameter(str(error)) from None


def _single_bits(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    bits = _bits(context, parameter, value)
    if bits is not None and len(bits) > 1:
        raise click.BadParameter(f"{value!r} is more than one precision")
    return None if bits is None else bits[0]


def _tuned(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    return () if value == "none" else _bits(context, parameter, value)


@click.command(
    "pmpd-export",
    cls=Command,
    extra="cpu,export",
    interrupted="interrupted: run the same command again to resume",
    examples=_EXAMPLES,
)
@click.option(
    "-m",
    "--model",
    required=True,
    help="A checkpoint folder, a GGUF file, a model id of the Hugging Face hub, or a name such as demo or vicuna-7b.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the bundle.  [default: NAME-pmpd or NAME-skeleton]",
)
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option(
    "--precisions",
    metavar="LIST",
    callback=_bits,
    help="Bits of the weights that decoding can use, from high to low. One such as 3.25 is a mix: 3.25 in the mean, "
    "more in layers where it pays most.  [default: 5,4,3, without those of no use for the model]",
)
@click.option(
    "--parent",
    type=int,
    metavar="BITS",
    help="Bits of the stored codes, of which lower precisions are the top bits.  [default: the highest precision]",
)
@click.option(
    "--method",
    metavar="NAME",
    help="How weights are quantized: guided or anyprecision; gptq, rtn and hqq are there to compare with.  [default: "
    "guided, or anyprecision without calibration]",
)
@click.option(
    "--seed-precision",
    type=int,
    metavar="BITS",
    default=2,
    show_default=True,
    help="Precision whose codebooks k-means finds directly; higher ones split its clusters.",
)
@click.option(
    "--prefill",
    callback=_single_bits,
    metavar="BITS",
    help="Bits of the prompt's graph.  [default: the highest]",
)
@click.option(
    "--head-precision", type=int, metavar="BITS", help="Bits of the output layer in all graphs.  [default: 6]"
)
@click.option(
    "--embedding-precision",
    type=int,
    metavar="BITS",
    help="Bits of the embedding in all graphs; one that is tied to the output layer has that layer's.  [default: 6]",
)
@click.option(
    "--coarse-precision",
    type=int,
    metavar="BITS",
    help="Bits of the output layer that each step reads of all words; it reads the others of words that can still win. "
    "0: all bits of all words.  [default: 4 for large vocabularies]",
)
@click.option(
    "--groups", type=int, metavar="N", default=1, show_default=True, help="Codebooks per row of a weight matrix."
)
@click.option(
    "--schedule",
    metavar="SPEC",
    help="The bundle's default schedule, such as static:4@16,3@32.  [default: uniform at the highest precision]",
)
@click.option(
    "--context-length", type=int, metavar="N", help="Longest text in tokens.  [default: what the checkpoint allows]"
)
@click.option(
    "--calibration",
    callback=_calibration,
    metavar="FILE|builtin|own|none",
    help="Text that tells which weights matter: a file (.txt, .jsonl, .jsonl.gz); builtin, which comes with pmpd; own, "
    "which the model writes; or none.  [default: builtin, or none above 3 G parameters]",
)
@click.option(
    "--calibration-samples",
    type=int,
    metavar="N",
    default=64,
    show_default=True,
    help="Sequences to take from that text.",
)
@click.option(
    "--calibration-length", type=int, metavar="N", default=256, show_default=True, help="Tokens in each sequence."
)
@click.option(
    "--tune",
    callback=_tuned,
    metavar="LIST|none",
    help="Precisions whose codebooks are tuned end to end on the calibration text, unless they are within "
    "0.05 nats of the model.  [default: those of up to 4 bits, or none above 2 G parameters]",
)
@list_option(
    "--target",
    "targets",
    metavar="NAME",
    help=f"Machine to build kernels for: {', '.join(MACHINES)} or none. Repeatable, or a list with commas."
    "  [default: this machine]",
)
@click.option(
    "--accuracy", metavar="NAME", help="Default arithmetic of the kernels: int8 (fast) or exact.  [default: int8]"
)
@click.option("--skeleton", is_flag=True, help="Write graphs and tensor table without weights, from config.json alone.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle, once the new one is complete.")
@click.option(
    "--no-verify",
    "verify",
    flag_value=False,
    default=True,
    help="Publish the bundle without checking it. It records that, and every command that opens it says so.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@json_option("the result")
@click.version_option(package_name="pmpd")
def main(
    model: str,
    output: Path | None,
    targets: tuple[str, ...],
    head_precision: int | None,
    accuracy: str | None,
    skeleton: bool,
    dry_run: bool,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Turn a language model into a PMPD bundle: ONNX graphs at several precisions over one file of nested weights.

    Prints the bundle's folder. An interrupted export resumes when the same command is run again.
    """
    # transformers reports every model it builds; the progress shown is ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if is_quiet():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of transformers too
    from pmpd.exporter.config import DEFAULT_HEAD_PRECISION, ExportConfig

    check_outputs(json_file)
    config = ExportConfig(
        model=model,
        output=output
        or Path(f"{Path(model).resolve().name.removesuffix('.gguf')}-{'skeleton' if skeleton else 'pmpd'}"),
        targets=_chosen_targets(targets),
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
    manifest = export.run()
    if manifest.quality is not None:
        log.info("quality   on %s\n%s", manifest.quality.heading, markdown_table(manifest.quality.rows()))
    elif not skeleton:
        log.info("quality   not measured (--no-verify)")
        warn_unverified(config.output, verified=manifest.verified)
    quality = None if manifest.quality is None else asdict(manifest.quality)
    document = {"bundle": str(config.output), "verification": manifest.verification, "quality": quality}
    print_result(str(config.output), json_file, lambda: json_text(document))


def _chosen_targets(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the named targets, none of them for ``none``, and None for the machine's own if no name was given."""
    if not names:
        return None
    return () if names == ("none",) else names


def _prepare(config: ExportConfig, *, skeleton: bool) -> Export | Skeleton:
    if skeleton:
        from pmpd.exporter.skeleton import Skeleton

        return Skeleton.prepare(config)
    from pmpd.exporter.pipeline import Export  # needs torch, which a skeleton does not

    return Export.prepare(config)


if __name__ == "__main__":
    main()
