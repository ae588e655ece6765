"""What a learned schedule is worth: choices for prompts that a network has never seen, beside choices at random."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.eval.metrics.base import Sample
from pmpd.eval.metrics.statistics import PLUS_MINUS, Estimate
from pmpd.eval.solve.network import Training
from pmpd.runtime import StaticSchedule
from pmpd.runtime.console.output import json_text, markdown_table

__all__ = ["Lesson"]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What was learned, and how networks that were trained alike do on prompts that they have not seen.

    Attributes:
        choices: the schedules, low to high in bits.
        length: decode steps of the longest answer.
        labels: of each prompt, the lowest choice that is good enough.
        samples: of each prompt under each choice.
        chosen: for each prompt, by a network trained on others (cross-validation).
        course: how the training of the network that stays went.
        settings: what was asked for, JSON-ready.
        reference: what ROUGE-L compares answers with.
        milliseconds: that a choice takes.
        share_of_prefill: of a prompt of 128 tokens.
    """

    choices: tuple[StaticSchedule, ...]
    length: int
    labels: tuple[int, ...]
    samples: tuple[tuple[Sample, ...], ...]
    chosen: tuple[int, ...]
    course: Training
    settings: dict[str, Any]
    reference: str
    milliseconds: float
    share_of_prefill: float

    @property
    def shares(self) -> tuple[float, ...]:
        """How often each choice is a label."""
        counts = np.bincount(self.labels, minlength=len(self.choices))
        return tuple((counts / counts.sum()).tolist())

    def rows(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return how likely each row of the table makes each choice for each prompt: ``[prompts, choices]``.

        ``shuffled`` gives the learned choices to the prompts at random, so both have the same choices equally often.
        """
        prompts, count = len(self.samples), len(self.choices)
        learned = np.eye(count)[list(self.chosen)]
        always = {str(choice): np.tile(np.eye(count)[i], (prompts, 1)) for i, choice in enumerate(self.choices)}
        return {
            **always,
            "learned": learned,
            "random, uniform": np.full((prompts, count), 1 / count),
            "random, prior": np.tile(self.shares, (prompts, 1)),
            "random, shuffled": np.tile(learned.mean(0), (prompts, 1)),
            "labels": np.eye(count)[list(self.labels)],
        }

    def score(self, row: npt.NDArray[np.float64]) -> Estimate:
        """Return the mean ROUGE-L of a row."""
        return Estimate.of((row * self._scores()).sum(1).tolist())

    def ahead(self, row: npt.NDArray[np.float64]) -> Estimate:
        """Return the ROUGE-L of the network's choices minus that of a row, paired by prompt."""
        return Estimate.of(((self.rows()["learned"] - row) * self._scores()).sum(1).tolist())

    def bits(self, row: npt.NDArray[np.float64]) -> float:
        """Return the mean bits of the decode steps of a row."""
        steps = np.array([[sample.steps for sample in prompt] for prompt in self.samples])
        spent = np.array([[sum(sample.passes) for sample in prompt] for prompt in self.samples])
        return float((row * spent).sum() / max(1, (row * steps).sum()))

    @property
    def verdict(self) -> str:
        """What the network is worth, in a sentence."""
        rows = self.rows()
        high, shuffled = str(self.choices[-1]), rows["random, shuffled"]
        return (
            f"a choice for each prompt of {len(self.choices)} schedules: {self.bits(rows['learned']):.2f} bits on "
            f"average where {high} has {self.bits(rows[high]):.2f}, ROUGE-L "
            f"{self.ahead(rows[high]).text(2, sign=True)} on {len(self.samples)} prompts, "
            f"{self.ahead(shuffled).text(2, sign=True)} to the same choices at random"
        )

    def to_markdown(self) -> str:
        """Return the table of all rows, and what they mean."""
        header = ["schedule", "average bits", "ROUGE-L", "learned is ahead by", "is the label of"]
        table = [header]
        for name, row in self.rows().items():
            ahead = "" if name == "learned" else self.ahead(row).text(2, sign=True)
            cells = [name, f"{self.bits(row):.2f}", self.score(row).text(2), ahead]
            index = len(table) - 1
            table.append([*cells, f"{100 * self.shares[index]:.0f} %" if index < len(self.choices) else ""])
        right = sum(a == b for a, b in zip(self.chosen, self.labels, strict=True))
        notes = (
            f"{len(self.labels)} prompts, each chosen for by a network that has not seen it; ROUGE-L to "
            f"{self.reference}; the label is chosen for {right}; cross-entropy {self.course.validation:.3f} nats, of "
            f"the labels' shares {self.course.prior:.3f}; {PLUS_MINUS}, paired.\n"
            f"A choice takes {self.milliseconds:.3f} ms, {100 * self.share_of_prefill:.2f} % of a prefill."
        )
        return f"{markdown_table(table)}\n\nlearned: {self.verdict}\n{notes}"

    def to_json(self) -> str:
        """Return everything as JSON text."""
        document: dict[str, Any] = {
            "verdict": self.verdict,
            "settings": self.settings,
            "reference": self.reference,
            "choices": [str(choice) for choice in self.choices],
            "label_shares": self.shares,
            "training": asdict(self.course),
            "milliseconds": self.milliseconds,
            "share_of_prefill": self.share_of_prefill,
            "prompts": {"scores": self._scores().tolist(), "labels": self.labels, "chosen": self.chosen},
            "rows": {
                name: {
                    "average_bits": self.bits(row),
                    "score": asdict(self.score(row)),
                    "learned_ahead": asdict(self.ahead(row)),
                }
                for name, row in self.rows().items()
            },
        }
        return json_text(document)

    def _scores(self) -> npt.NDArray[np.float64]:
        return np.array([[sample.scores["rougeL"] for sample in prompt] for prompt in self.samples])
