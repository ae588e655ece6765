"""The task ``perplexity``: how well a model predicts a text, decoding as the schedule says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pmpd.eval.data.records import Record
from pmpd.eval.measure.metrics import negative_log_likelihood
from pmpd.eval.measure.models import ModelUnderTest
from pmpd.eval.measure.scoring import Perplexity, Sample
from pmpd.eval.tasks.base import Baseline, Item, Task

__all__ = ["DecodePerplexity"]


class DecodePerplexity(Task):
    """Decode perplexity: how well the decode steps predict a text, each at the precision of the schedule.

    A text is cut into windows of twice `max_new_tokens` (shorter at its end, or where the model's context is shorter).
    The first half of a window is prefilled as context; the other half is fed as the answer (teacher forcing). Its
    tokens after the first are scored, each by the decode step that the schedule gives to it: the first one is predicted
    by prefill, which all schedules share. The result is exp of the mean over all scored tokens. It is not the
    perplexity of the literature, which scores every token of a text: compare it only within a table.
    """

    metrics = (Perplexity("perplexity", "decode perplexity", higher_is_better=False, per_step=True),)
    default_new_tokens = 256

    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make windows of the text of each record (field ``text``, or the template)."""
        size = min(2 * self.max_new_tokens, self.context_length)
        for record in records:
            text = self.template.render(record) if self.template else record.text("text")
            ids = self.tokenizer.encode(text)
            for start in range(0, len(ids), size):
                window = ids[start : start + size]
                half = len(window) // 2
                if half > 0 and len(window) - half >= 2:
                    context, answer = window[:half], window[half:]
                    yield Item(source=f"{record.source}+{start}", prompt="", ids=tuple(context), answer=tuple(answer))

    def measure(self, model: ModelUnderTest, item: Item, baseline: Baseline | None) -> tuple[Sample, Baseline]:
        """Score a window."""
        forced = model.force(item.ids, item.answer)
        nll = negative_log_likelihood(forced.logits, item.answer[1:])
        sample = Sample(
            source=item.source,
            prompt_tokens=len(item.ids),
            output_tokens=len(item.answer),
            precisions=forced.precisions,
            first_passes=forced.first_passes,
            prefill_seconds=forced.prefill_seconds,
            scores={"nll": float(nll.mean())},
            scored_steps=len(nll),
        )
        return sample, baseline or Baseline()
