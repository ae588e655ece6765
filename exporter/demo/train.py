"""Train a small Llama language model from text: how a model like the embedded demo is made.

``python -m pmpd.exporter.demo.train --text stories.jsonl.gz --output my-model --minutes 30``

Documents are split into training and held-out ones, a byte-level BPE tokenizer is trained on the former, they are
packed end to end into rows of equal length, and a Llama model is trained on the rows from scratch. With ``--tokens``
the result depends only on the text, the options, the machine and its thread count; with ``--minutes`` the number of
steps also depends on how fast the machine is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpd.runtime.errors import MissingExtraError, PmpdError

try:
    import click
    import torch
    from safetensors import SafetensorError
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from pmpd.exporter.demo.corpus import PAD, SPECIAL_TOKENS, pack, split_documents, train_tokenizer
    from pmpd.exporter.demo.recipe import Recipe, build_model
    from pmpd.exporter.source.documents import read_documents
except ImportError as error:
    raise MissingExtraError(error.name or "a package", "export") from error

WARM_UP = 0.05  # the part of the training over which the learning rate rises from a tenth of its peak


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the training stands; `steps` and `seconds_left` are estimates when time decides. The loss is in nats."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float


def _loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss in nats over rows ``[B, L]``, padding left out."""
    labels = rows.masked_fill(rows == PAD, -100)
    # Without bfloat16 instructions autocast would be slower than float32.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        loss: torch.Tensor = model(input_ids=rows, labels=labels, use_cache=False).loss
    return loss


@torch.no_grad()
def evaluate(model: Any, rows: torch.Tensor, *, batch_size: int) -> float:
    """Return the mean loss of rows ``[R, L]`` in nats per token."""
    model.eval()
    total = 0.0
    for batch in torch.split(rows, batch_size):
        total += float(_loss(model, batch)) * len(batch)
    return total / len(rows)


def _batches(rows: torch.Tensor, *, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches ``[batch_size, L]`` without end, every row once per pass in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        yield rows[order[:batch_size]]
        order = order[batch_size:]


def train(model: Any, rows: torch.Tensor, recipe: Recipe, *, report: Callable[[Progress], None]) -> int:
    """Train the model in place on rows ``[R, L]`` and return the number of steps taken.

    AdamW with gradients clipped to norm 1; the learning rate warms up and then falls along a cosine to zero.

    Raises:
        PmpdError: the loss is no longer finite.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    batches = _batches(rows, batch_size=recipe.batch_size, seed=recipe.seed)
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(0.1 + done / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * done))
        batch = next(batches)
        loss = _loss(model, batch)
        if not loss.isfinite():
            raise PmpdError(f"training diverged at step {step + 1}: lower --learning-rate {recipe.learning_rate:g}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        elapsed = time.monotonic() - start
        done = recipe.done(step=step, seconds=elapsed)
        report(
            Progress(
                step=step,
                steps=max(step, round(step / done)),
                loss=loss.item(),
                tokens_per_second=step * batch.numel() / elapsed,
                seconds_left=max(0.0, elapsed / done - elapsed),
            )
        )
    return step


@contextmanager
def publish(output: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `output` when the block succeeds, and is removed when it does not.

    Raises:
        PmpdError: `output` exists, or the folder it goes into does not.
    """
    if output.exists():
        raise PmpdError(f"output '{output}' exists: choose another --output, or remove it")
    if not output.parent.is_dir():
        raise PmpdError(f"'{output.parent}' is no folder: create it, or choose another --output")
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save(folder: Path, model: Any, tokenizer: Tokenizer) -> None:
    """Write model and tokenizer in Hugging Face format: float16 safetensors, configurations, tokenizer files."""
    model.half().save_pretrained(folder)
    # safetensors makes its files private; let them be as readable as the others.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model.config.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)


def _progress_line() -> Callable[[Progress], None]:
    """Return a reporter: one line that is rewritten on a terminal, a line every ten seconds elsewhere."""
    terminal = sys.stderr.isatty()
    due = 0.0

    def report(progress: Progress) -> None:
        nonlocal due
        last = progress.seconds_left == 0
        if time.monotonic() < due and not last:
            return
        due = time.monotonic() + (0.2 if terminal else 10.0)
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        line = (
            f"step {progress.step} of {progress.steps}, loss {progress.loss:.3f}, "
            f"{progress.tokens_per_second:.0f} tokens/s, {minutes}:{seconds:02} left"
        )
        click.echo(f"\r\x1b[K{line}" if terminal else line, err=True, nl=last or not terminal)

    return report


_COUNT = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option(
    "--text", "texts", type=click.Path(path_type=Path), multiple=True, required=True, help="File to train on."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Train for so long.")
@click.option("--tokens", type=_COUNT, help="Train on so many tokens, in passes over the text.")
@click.option("--vocab-size", type=click.IntRange(min=256 + len(SPECIAL_TOKENS)), default=4096)
@click.option("--hidden-size", type=_COUNT, default=256)
@click.option("--layers", type=_COUNT, default=5)
@click.option("--heads", type=_COUNT, default=4)
@click.option("--kv-heads", type=_COUNT, default=2)
@click.option("--intermediate-size", type=_COUNT, default=768)
@click.option("--context", type=_COUNT, default=1024, help="Tokens the model accepts.")
@click.option("--sequence-length", type=click.IntRange(min=2), default=256, help="Tokens in a training row.")
@click.option("--batch-size", type=_COUNT, default=8, help="Rows in a step.")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=3e-3)
@click.option("--seed", type=click.IntRange(min=0), default=0)
def command(texts: tuple[Path, ...], output: Path, **options: Any) -> None:
    """Train a small Llama language model on text (.txt, .jsonl or .jsonl.gz), on the CPU."""
    recipe = Recipe(**options)
    with publish(output) as folder:
        documents = [document for path in texts for document in read_documents(path)]
        training, held_out = split_documents(documents, seed=recipe.seed)
        tokenizer = train_tokenizer(training, vocab_size=recipe.vocab_size)
        rows, held_out_rows = (
            pack(part, tokenizer, sequence_length=recipe.sequence_length) for part in (training, held_out)
        )
        model = build_model(recipe, vocab_size=tokenizer.get_vocab_size())
        click.echo(f"{len(training)} documents, {rows.numel()} tokens, {model.num_parameters()} parameters", err=True)
        before = evaluate(model, held_out_rows, batch_size=recipe.batch_size)
        steps = train(model, rows, recipe, report=_progress_line())
        after = evaluate(model, held_out_rows, batch_size=recipe.batch_size)
        save(folder, model, tokenizer)
        record = dataclasses.asdict(recipe) | {"steps": steps, "validation_loss": after}
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    click.echo(
        f"{output}: {steps} steps, loss {before:.3f} before and {after:.3f} nats per token after, "
        f"on {len(held_out)} held-out documents"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; every error is one line on stderr."""
    try:
        command.main(arguments, prog_name="python -m pmpd.exporter.demo.train", standalone_mode=False)
    except click.Abort:
        click.echo("error: interrupted, nothing was written", err=True)
        return 130
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        return error.exit_code
    except PmpdError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except (OSError, SafetensorError) as error:
        click.echo(f"error: cannot write the model: {error}", err=True)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # So that a stopped run cleans up as Ctrl-C does.
    sys.exit(main())
