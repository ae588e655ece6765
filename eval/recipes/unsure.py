"""Where low precision errs, and whether the model notices: ``python -m pmpd.eval.recipes.unsure BUNDLE --task …``.

An adaptive schedule trusts that errors happen where the two best tokens are near each other, and that bits repair them
there. The low precision is fed the answer that the high one gives. Which steps choose another token, how near are the
best two then and otherwise, and what does the high precision choose over the keys and values that the low one wrote?
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from pmpd.eval.measure.models import Scheduled
from pmpd.eval.metrics.statistics import PLUS_MINUS, Estimate
from pmpd.eval.runner import prepare, read_items
from pmpd.eval.settings import Settings
from pmpd.eval.tasks.base import Item
from pmpd.eval.tasks.options import TASK_OPTIONS
from pmpd.eval.tasks.registry import ANSWERING
from pmpd.runtime import Bundle, Generator, StaticSchedule
from pmpd.runtime.console.command import FILE, Command, check_outputs, is_quiet, json_option, print_result
from pmpd.runtime.console.output import json_text, markdown_table
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["Errors", "find_errors", "main"]


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Shares of the decode steps of each sample's answer.

    Attributes:
        high, low: the precisions, in bits.
        nats: the gap between the two best logits, below which a step counts as unsure.
        wrong: steps where the low precision chooses another token than the high one.
        unsure: steps that are unsure at the low precision.
        both: steps that are both.
        behind: steps where the high precision does, over the keys and values that the low one wrote before.
    """

    high: float
    low: float
    nats: float
    wrong: tuple[float, ...]
    unsure: tuple[float, ...]
    both: tuple[float, ...]
    behind: tuple[float, ...]

    def to_markdown(self) -> str:
        """Return the table."""
        lines = {
            f"{self.low:g} bits choose another token": self.wrong,
            f"… and their best two are less than {self.nats:g} nats apart": self.both,
            f"their best two are less than {self.nats:g} nats apart": self.unsure,
            f"{self.high:g} bits choose another token, over keys and values of {self.low:g}": self.behind,
        }
        head = [f"steps of the answer of {self.high:g} bits in which", "share, %"]
        rows = [[line, Estimate.of(shares).text(1, scale=100)] for line, shares in lines.items()]
        return f"{markdown_table([head, *rows])}\n\nMeans over {len(self.wrong)} samples; {PLUS_MINUS}."

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json_text(asdict(self))


def find_errors(
    bundle: Bundle, settings: Settings, *, high: float, low: float, nats: float = 1.0, quiet: bool = True
) -> Errors:
    """Feed the answers of a high precision to a low one.

    Args:
        bundle: the model.
        settings: task, data and its options; schedules do not matter.
        high, low: precisions, in bits.
        nats: the gap below which a step counts as unsure.
        quiet: show no progress.

    Raises:
        PmpdError: a precision that the bundle lacks, a task without answers, data that do not fit, or answers of one
            token.
    """
    for precision in (high, low):
        if precision not in bundle.manifest.precisions:
            raise PmpdError(unknown_choice("precision", precision, bundle.manifest.precisions))
    task, _ = prepare(bundle, settings)
    if settings.task not in ANSWERING:
        raise PmpdError(f"the task {settings.task} gives no answers: choose one of {', '.join(ANSWERING)}")
    items, _ = read_items(task, settings)
    generator = Generator(bundle, threads=settings.threads, context_length=max(map(task.positions, items)))
    model = Scheduled(generator, StaticSchedule(((high, 0),)))
    shares = []
    for item in track(items, step="answers", total=len(items), unit="sample", quiet=quiet):
        answer = model.generate(item.ids, max_new_tokens=task.max_new_tokens, stop_ids=task.stop_ids).ids
        if len(answer) > 1:
            shares.append(_shares(generator, item, answer, high, low, nats))
    if not shares:
        raise PmpdError("all answers have one token, so there is no decode step: use other prompts")
    wrong, unsure, both, behind = (tuple(column) for column in np.array(shares).T.tolist())
    return Errors(high=high, low=low, nats=nats, wrong=wrong, unsure=unsure, both=both, behind=behind)


def _shares(
    generator: Generator, item: Item, answer: Sequence[int], high: float, low: float, nats: float
) -> npt.NDArray[np.float64]:
    """Return the shares of one answer's steps: wrong, unsure, both, behind."""
    sequence = generator.sequence
    sequence.reset()
    sequence.prefill(item.ids)
    counts = np.zeros(4)
    for token, following in pairwise(answer):
        behind = int(sequence.step(token, precision=high).argmax()) != following
        sequence.truncate(len(sequence.tokens) - 1)
        logits = sequence.step(token, precision=low)
        second, best = np.partition(logits, -2)[-2:]
        wrong, unsure = int(logits.argmax()) != following, best - second < nats
        counts += (wrong, unsure, wrong and unsure, behind)
    return counts / (len(answer) - 1)


@click.command("python -m pmpd.eval.recipes.unsure", cls=Command, extra="cpu,eval")
@click.argument("bundle", type=FILE)
@click.option(
    "--task", required=True, metavar="NAME", help="dialogsum, cnn_dailymail, iwslt, mt_bench, python or jsonl."
)
@click.option("--data", metavar="FILE", type=FILE, required=True, help="Examples: JSON lines (.jsonl, .jsonl.gz).")
@TASK_OPTIONS
@click.option("--high", type=float, metavar="BITS", help="The high precision.  [default: the bundle's highest]")
@click.option("--low", type=float, metavar="BITS", help="The low precision.  [default: the bundle's lowest]")
@click.option("--nats", type=float, default=1.0, show_default=True, metavar="GAP", help="Below it a step is unsure.")
@click.option("--threads", type=int, metavar="N", help="Threads to compute with.  [default: all processors]")
@json_option()
def main(
    bundle: Path, high: float | None, low: float | None, nats: float, json_file: Path | None, **options: Any
) -> None:
    """See where a low precision errs, whether the model is unsure there, and whether the high one would do better."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    check_outputs(json_file)
    opened = Bundle.open(bundle, verify=True)
    precisions = opened.manifest.precisions
    errors = find_errors(
        opened,
        Settings(**options),
        high=high or precisions[0],
        low=low or precisions[-1],
        nats=nats,
        quiet=is_quiet(),
    )
    print_result(errors.to_markdown(), json_file, errors.to_json)


if __name__ == "__main__":
    main()
