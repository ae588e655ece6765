"""The task ``fidelity``: how closely a bundle follows the floating-point model it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pmpd.eval.data.records import Record
from pmpd.eval.measure.metrics import kl_divergence, rouge, top1_agreement
from pmpd.eval.measure.models import ModelUnderTest
from pmpd.eval.measure.scoring import Metric, Sample
from pmpd.eval.tasks.base import Baseline, Item, Task

__all__ = ["Fidelity"]

COMPLETION_TOKENS = 32


class Fidelity(Task):
    """How closely the bundle follows the floating-point model, on its own greedy answers.

    Teacher forcing of the floating-point model's answer gives KL divergence and top-1 agreement at each decode step;
    the bundle's own greedy answer gives ROUGE-L. Prompts are the field ``prompt``, else the first 32 tokens of ``text``
    (a completion task as in Appendix A.1.2), else a template.
    """

    metrics = (
        Metric("kl_divergence", "KL divergence (nats)", higher_is_better=False, per_step=True, digits=4),
        Metric("top1_agreement", "top-1 agreement %", per_step=True, highest=100),
        Metric("rougeL", "ROUGE-L to fp", highest=100),
    )
    default_new_tokens = 64
    takes = frozenset({"chat"})

    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make prompts of records."""
        for record in records:
            if self.template:
                yield self._prompt(record, self.template.render(record))
            elif "prompt" in record.fields or "text" not in record.fields:
                yield self._prompt(record, record.text("prompt"))
            else:
                start = self.tokenizer.encode(record.text("text"), special_tokens=False)[:COMPLETION_TOKENS]
                yield self._prompt(record, self.tokenizer.decode(start))

    def measure(self, model: ModelUnderTest, item: Item, baseline: Baseline | None) -> tuple[Sample, Baseline]:
        """Generate, and force the floating-point model's answer; an answer of one token has no decode step to force."""
        answer = model.generate(item.ids, max_new_tokens=self.max_new_tokens, stop_ids=self.stop_ids)
        baseline_ids = baseline.ids if baseline else answer.ids
        logits = model.force(item.ids, baseline_ids).logits if len(baseline_ids) > 1 else None
        baseline = baseline or Baseline(ids=answer.ids, text=self.tokenizer.decode(answer.ids), logits=logits)
        scores = {"rougeL": rouge(self.tokenizer.decode(answer.ids), [baseline.text])["rougeL"]}
        if logits is not None and baseline.logits is not None:
            scores["kl_divergence"] = float(kl_divergence(baseline.logits, logits).mean())
            scores["top1_agreement"] = 100 * float(top1_agreement(baseline.logits, logits).mean())
        steps = 0 if logits is None else len(logits)
        return self._sample(item, answer, (baseline.text,), scores, steps), baseline
