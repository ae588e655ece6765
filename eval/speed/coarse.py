"""Coarse to fine in the output layer, measured: ``python -m pmpd.eval.speed.coarse BUNDLE``.

Greedy texts with all logits finished and with only those that can be the best, in turns on one loaded bundle: whether
they are the same, what was read of the output layer, and how fast each was. With ``--margins``, what a margin does to
the distribution that sampling draws from: the total variation distance from that of exact logits at temperature 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from pmpd.runtime import Bundle, Engine, PmpdError, Tokenizer
from pmpd.runtime import Sequence as Conversation
from pmpd.runtime.console.command import Command, write_result
from pmpd.runtime.console.output import json_text
from pmpd.runtime.engine.kernels import LOGITS
from pmpd.runtime.format.manifest import Manifest

__all__ = ["Comparison", "bytes_read", "compare", "main"]

PROMPT_TOKENS = 48


@dataclass
class Comparison:
    """What a comparison measured.

    Attributes:
        tokens: decoded tokens, of either way.
        texts, same_texts: greedy texts, and those of them that were the same.
        same_tokens: tokens that were the same, up to the first difference of each text.
        finished: share of the logits that were finished, in the coarse way.
        bytes_read: share of the output layer's bytes that were read, in the coarse way.
        whole, coarse: seconds of a decode step, median.
        variation: by margin: mean and largest total variation distance, and share of the logits finished.
    """

    tokens: int = 0
    texts: int = 0
    same_texts: int = 0
    same_tokens: int = 0
    finished: float = 0.0
    bytes_read: float = 0.0
    whole: float = 0.0
    coarse: float = 0.0
    variation: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def bytes_read(manifest: Manifest, finished: float) -> float:
    """Return the share of an output layer's bytes that a step reads, if it finishes a share of the rows.

    Raises:
        PmpdError: the bundle's output layer is not computed coarse to fine.
    """
    bound = next((tensor for tensor in manifest.tensors if tensor.role == "bound"), None)
    if bound is None:
        raise PmpdError(
            "the bundle has no coarse output layer: export the model with --coarse-precision 4 --overwrite, or measure "
            "another"
        )
    parts = [tensor for tensor in manifest.tensors if tensor.layer == bound.layer]
    planes = next(tensor for tensor in parts if tensor.role == "planes")
    codebooks = {tensor.bits or 0: tensor.length for tensor in parts if tensor.role == "codebook"}
    bits, coarse = max(codebooks), min(codebooks)
    whole = planes.length + codebooks[bits]
    always = planes.length * coarse / bits + codebooks[coarse] + bound.length
    return (always + finished * whole) / whole


def compare(
    engine: Engine, prompts: Sequence[Sequence[int]], *, tokens: int, precision: float, margins: Sequence[float] = ()
) -> Comparison:
    """Continue prompts greedily with `tokens` tokens each, in both ways.

    Raises:
        PmpdError: the bundle's output layer is not computed coarse to fine, or no kernel runs it.
    """
    result, manifest = Comparison(), engine.bundle.manifest
    bytes_read(manifest, 0)
    conversation = Conversation(engine, context_length=max(map(len, prompts)) + tokens)
    seconds: dict[float, list[float]] = {math.inf: [], 0.0: []}
    shares: list[float] = []
    distances: dict[float, list[tuple[float, float]]] = {margin: [] for margin in margins}
    for number, prompt in enumerate(prompts):
        texts = {}
        for margin in (math.inf, 0.0) if number % 2 else (0.0, math.inf):
            engine.kernels(reset=True)
            texts[margin] = _continue(conversation, prompt, tokens, precision, margin, seconds[margin])
            if margin == 0:
                shares.append(_finished(engine))
        whole, coarse = texts[math.inf], texts[0.0]
        different = next((i for i, pair in enumerate(zip(whole, coarse, strict=True)) if pair[0] != pair[1]), tokens)
        result.texts += 1
        result.tokens += tokens
        result.same_tokens += different
        result.same_texts += different == tokens
        for margin, measured in distances.items():
            measured += _variations(engine, conversation, prompt, whole, precision, margin)
    result.finished = float(np.mean(shares))
    result.bytes_read = bytes_read(manifest, result.finished)
    result.whole, result.coarse = (float(np.median(seconds[margin])) for margin in (math.inf, 0.0))
    for margin, measured in distances.items():
        distance, share = np.array(measured).T
        result.variation[f"{margin:g}"] = float(distance.mean()), float(distance.max()), float(share.mean())
    return result


def _continue(
    conversation: Conversation,
    prompt: Sequence[int],
    tokens: int,
    precision: float,
    margin: float,
    seconds: list[float],
) -> list[int]:
    """Return the greedy continuation of a prompt; add the time of each step."""
    conversation.reset()
    text = [int(conversation.prefill(prompt).argmax())]
    while len(text) < tokens:
        begin = time.perf_counter()
        text.append(int(conversation.step(text[-1], precision=precision, margin=margin).argmax()))
        seconds.append(time.perf_counter() - begin)
    return text


def _variations(
    engine: Engine,
    conversation: Conversation,
    prompt: Sequence[int],
    text: Sequence[int],
    precision: float,
    margin: float,
) -> Iterator[tuple[float, float]]:
    """Yield, for each step of a text, the total variation distance that a margin makes, and the share finished."""
    conversation.reset()
    conversation.prefill(prompt)
    for token_id in text[:-1]:
        exact = _softmax(conversation.step(token_id, precision=precision))
        conversation.truncate(len(conversation.tokens) - 1)
        engine.kernels(reset=True)
        near = _softmax(conversation.step(token_id, precision=precision, margin=margin))
        yield float(np.abs(exact - near).sum() / 2), _finished(engine)


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    p: npt.NDArray[np.float64] = np.exp(logits - logits.max(), dtype=np.float64)
    p /= p.sum()
    return p


def _finished(engine: Engine) -> float:
    shares = [node.finished for node in engine.kernels() if node.op == LOGITS and node.finished is not None]
    if not shares:
        raise PmpdError("no kernel runs the bundle's output layer: export the model with --target for this machine")
    return shares[0]


def _prompts(bundle: Bundle, files: Sequence[Path], count: int) -> list[list[int]]:
    """Return the beginnings of `count` stretches of some texts, as token ids; random ids without a text."""
    if not files:
        words = bundle.manifest.architecture.vocab_size
        return [list(map(int, row)) for row in np.random.default_rng(0).integers(0, words, (count, PROMPT_TOKENS))]
    tokenizer = Tokenizer.from_bundle(bundle)
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    length = len(text) // count
    return [tokenizer.encode(text[i * length : i * length + 2000])[:PROMPT_TOKENS] for i in range(count)]


@click.command(cls=Command)
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, type=click.Path(exists=True, path_type=Path), help="Text for prompts.")
@click.option("--tokens", default=20_000, show_default=True, type=click.IntRange(2), help="Tokens in all.")
@click.option("--length", default=200, show_default=True, type=click.IntRange(2), help="Tokens of each text.")
@click.option("--precision", type=float, help="Bits of the other layers.  [default: the highest]")
@click.option("--margins", default="", metavar="LIST", help="Margins whose distributions to compare, such as 0,4,8.")
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: all processors]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result to this file.")
def main(
    path: Path,
    texts: tuple[Path, ...],
    tokens: int,
    length: int,
    precision: float | None,
    margins: str,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Compare greedy texts of a bundle with a coarse output layer with those of all logits finished."""
    bundle = Bundle.open(path)
    engine = Engine(bundle, threads=threads)
    prompts = _prompts(bundle, texts, -(-tokens // length))
    result = compare(
        engine,
        prompts,
        tokens=length,
        precision=precision or bundle.manifest.precisions[0],
        margins=[float(margin) for margin in margins.split(",") if margin],
    )
    click.echo(
        f"texts     {result.same_texts} of {result.texts} the same, {result.same_tokens} of {result.tokens} tokens"
    )
    click.echo(
        f"read      {result.bytes_read:.1%} of the output layer's bytes, {result.finished:.3%} of logits finished"
    )
    click.echo(
        f"step      {result.whole * 1e3:.2f} ms with all logits, {result.coarse * 1e3:.2f} ms coarse to fine "
        f"({result.whole / result.coarse:.3f} times as fast)"
    )
    for margin, (mean, largest, share) in result.variation.items():
        click.echo(f"margin    {margin}: total variation {mean:.2g}, at most {largest:.2g}; {share:.3%} finished")
    write_result(json_file, lambda: json_text(asdict(result)))


if __name__ == "__main__":
    main()
