"""Train a small Llama language model from text: how the embedded demo model was made.

``python -m pmpd.exporter.demo.train --text stories.jsonl.gz --output my-model --minutes 30``

Documents are split into training and held-out ones, a byte-level BPE tokenizer is trained on the former, they are
packed end to end into rows of equal length, and a Llama model is trained on the rows from scratch. With ``--tokens``
the result depends only on the text, the options, the machine and its thread count; with ``--minutes`` the number of
steps also depends on how fast the machine is.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpd.runtime.errors import MissingExtraError, PmpdError, one_line

try:
    import click
    import torch
    from safetensors import SafetensorError
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    from pmpd.exporter.demo.corpus import PAD, SPECIAL_TOKENS, pack, split_documents, train_tokenizer
    from pmpd.exporter.demo.recipe import Recipe, build_model
    from pmpd.exporter.documents import read_documents
    from pmpd.runtime.console.command import Command
    from pmpd.runtime.console.progress import progress
except ImportError as error:
    missing = MissingExtraError(error.name or "a package", "export")
    if __name__ == "__main__":
        sys.exit(f"error: {missing}")
    raise missing from error

log = logging.getLogger("pmpd.exporter")

WARM_UP = 0.05  # the part of the training over which the learning rate rises from a tenth of its peak


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """A step of the training, of `steps` (an estimate where time is the limit). The loss is in nats."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float


def _loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss in nats over rows ``[B, L]``, without the padding."""
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
    """Yield batches ``[batch_size, L]`` without end, every row once per pass, each pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        yield rows[order[:batch_size]]
        order = order[batch_size:]


def train(model: Any, rows: torch.Tensor, recipe: Recipe, *, report: Callable[[TrainingStep], None]) -> int:
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
            TrainingStep(
                step=step,
                steps=max(step, round(step / done)),
                loss=loss.item(),
                tokens_per_second=step * batch.numel() / elapsed,
            )
        )
    return step


@contextmanager
def publish(output: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `output` when the block succeeds, and is removed when it does not.

    Raises:
        PmpdError: `output` exists, or appeared while the block ran (the folder then stays), or has no parent folder.
    """
    if output.exists():
        raise PmpdError(f"output '{output}' exists: choose another --output, or remove it")
    if not output.parent.is_dir():
        raise PmpdError(f"'{output.parent}' is not a folder: create it, or choose another --output")
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        partial.rename(output)
    except OSError as error:
        raise PmpdError(
            f"cannot move {partial} to {output} ({error.strerror}): the trained model stays in the former"
        ) from None


def save(folder: Path, model: Any, tokenizer: Tokenizer) -> None:
    """Write model and tokenizer in Hugging Face format: float16 safetensors, configurations, tokenizer files.

    Raises:
        PmpdError: the weights cannot be written.
    """
    disable_progress_bar()  # transformers 5 shows one for writing; the progress here is ours
    try:
        model.half().save_pretrained(folder)
    except SafetensorError as error:
        raise PmpdError(f"cannot write the model ({one_line(error)}): free disk space") from None
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


_COUNT = click.IntRange(min=1)


@click.command(
    "python -m pmpd.exporter.demo.train",
    cls=Command,
    extra="export",
    interrupted="interrupted: nothing was written",
    context_settings={"show_default": True},
    examples=("python -m pmpd.exporter.demo.train --text stories.jsonl.gz --output my-model --minutes 30",),
)
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Text to train on (.txt, .jsonl, .jsonl.gz). Repeatable.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Train for this many minutes.")
@click.option("--tokens", type=_COUNT, help="Train on this many tokens, reading the text repeatedly if it is shorter.")
@click.option(
    "--vocab-size", type=click.IntRange(min=256 + len(SPECIAL_TOKENS)), default=4096, help="Tokens of the tokenizer."
)
@click.option("--hidden-size", type=_COUNT, default=256, help="Width of the model.")
@click.option("--layers", type=_COUNT, default=5, help="Decoder layers.")
@click.option("--heads", type=_COUNT, default=4, help="Attention heads.")
@click.option("--kv-heads", type=_COUNT, default=2, help="Key and value heads.")
@click.option("--intermediate-size", type=_COUNT, default=768, help="Width inside the MLP.")
@click.option("--context", type=_COUNT, default=1024, help="Longest text of the model, in tokens.")
@click.option("--sequence-length", type=click.IntRange(min=2), default=256, help="Tokens in a row of training data.")
@click.option("--batch-size", type=_COUNT, default=8, help="Rows in a training step.")
@click.option(
    "--learning-rate", type=click.FloatRange(min=0, min_open=True), default=3e-3, help="Highest learning rate."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of weights and order.")
@click.version_option(package_name="pmpd")
def main(texts: tuple[Path, ...], output: Path, **options: Any) -> None:
    """Train a small Llama language model on text, on the CPU."""
    recipe = Recipe(**options)
    with publish(output) as folder:
        documents = [document for path in texts for document in read_documents(path)]
        training, held_out = split_documents(documents, seed=recipe.seed)
        tokenizer = train_tokenizer(training, vocab_size=recipe.vocab_size)
        rows, held_out_rows = (
            pack(part, tokenizer, sequence_length=recipe.sequence_length) for part in (training, held_out)
        )
        model = build_model(recipe, vocab_size=tokenizer.get_vocab_size())
        log.info("%d documents, %d tokens, %d parameters", len(training), rows.numel(), model.num_parameters())
        before = evaluate(model, held_out_rows, batch_size=recipe.batch_size)
        with progress("train", total=1, unit="step") as shown:

            def report(step: TrainingStep) -> None:
                shown.expect(step.steps)
                shown.note(f"loss {step.loss:.3f}, {step.tokens_per_second:.0f} tokens/s")
                shown.advance()

            steps = train(model, rows, recipe, report=report)
        after = evaluate(model, held_out_rows, batch_size=recipe.batch_size)
        save(folder, model, tokenizer)
        record = dataclasses.asdict(recipe) | {"steps": steps, "validation_loss": after}
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    click.echo(
        f"{output}: {steps} steps, loss {before:.3f} before and {after:.3f} nats per token after, "
        f"on {len(held_out)} held-out documents"
    )


if __name__ == "__main__":
    main()
