"""The task ``fidelity``: how closely a bundle follows the floating-point model it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt

from pmpd.eval.data.records import Record
from pmpd.eval.metrics.base import Metric, Sample
from pmpd.eval.metrics.logits import kl_divergence, top1_agreement
from pmpd.eval.metrics.registry import METRICS
from pmpd.eval.metrics.texts import TextScorer
from pmpd.eval.tasks.base import Item, Task

__all__ = ["Fidelity"]

COMPLETION_TOKENS = 32


class Fidelity(Task):
    """How closely the bundle follows the floating-point model, on its own greedy answers.

    Teacher forcing of the floating-point model's answer gives KL divergence and top-1 agreement at each decode step;
    the bundle's own greedy answer gives ROUGE-L. Prompts are the field ``prompt``, else the first 32 tokens of ``text``
    (a completion task as in Appendix A.1.2), else a template.
    """

    default_new_tokens = 64
    generates = forces = compares = True
    takes = frozenset({"template", "chat"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _scorer()  # a missing package shows here, before a model is loaded

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """KL divergence, top-1 agreement, and ROUGE-L to the floating-point model's answer."""
        return tuple(METRICS[name] for name in ("kl_divergence", "top1_agreement", "rougeL"))

    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make prompts of records."""
        for record in records:
            if self.template:
                text = self.template.render(record)
            elif "prompt" in record.fields or "text" not in record.fields:
                text = record.text("prompt")
            else:
                start = self.tokenizer.encode(record.text("text"), special_tokens=False)[:COMPLETION_TOKENS]
                text = self.tokenizer.decode(start)
            yield replace(self._prompt(record, text), unscored=1)  # decode steps only

    def force_scores(
        self, targets: Sequence[int], logits: npt.NDArray[np.float32], reference: npt.NDArray[np.float32] | None
    ) -> dict[str, list[float]]:
        """Return the KL divergence from the floating-point model and whether both have the same most likely token."""
        theirs = logits if reference is None else reference
        return {
            "kl_divergence": kl_divergence(theirs, logits).tolist(),
            "top1_agreement": (100.0 * top1_agreement(theirs, logits)).tolist(),
        }

    def scored(self, sample: Sample) -> Sample:
        """Return a sample with the ROUGE-L of its answer."""
        return _scorer().scored(sample)


@cache
def _scorer() -> TextScorer:
    return TextScorer(["rougeL"])
