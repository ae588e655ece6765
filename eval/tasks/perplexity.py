"""The tasks ``perplexity`` and ``decode_perplexity``: how well a model predicts a text."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pmpd.eval.data.records import Record
from pmpd.eval.metrics.base import Metric
from pmpd.eval.metrics.logits import negative_log_likelihood
from pmpd.eval.metrics.registry import METRICS
from pmpd.eval.tasks.base import Item, Task
from pmpd.runtime.errors import PmpdError

__all__ = ["DecodePerplexity", "Perplexity"]

STRETCHES = 16  # that a text of one document is divided into, to see how it varies
WINDOW = 2048
_HEADING = re.compile(r"^ = [^=\n]+ = $", re.MULTILINE)  # of an article of WikiText


class _OfText(Task):
    """What both have in common: windows of a text are scored as they are.

    Windows of one document are not independent. Those of a text that is one document are divided into 16 stretches.
    """

    forces = spreads = True
    takes = frozenset({"template"})

    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make windows of the text of each record (field ``text``, or the template)."""
        windows = list(self._windows(records))
        if len({window.group for window in windows}) > 1:
            yield from windows
            return
        for i, window in enumerate(windows):
            yield replace(window, group=f"{window.group}, stretch {STRETCHES * i // len(windows) + 1}")

    def positions(self, item: Item) -> int:
        """Return the tokens of the window."""
        return len(item.ids) + len(item.answer)

    @abstractmethod
    def _windows(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make the windows; their group is the document."""

    def force_scores(
        self, targets: Sequence[int], logits: npt.NDArray[np.float32], reference: npt.NDArray[np.float32] | None
    ) -> dict[str, list[float]]:
        """Return the negative log-likelihood of each token in nats."""
        return {"nll": negative_log_likelihood(logits, targets).tolist()}

    def _texts(self, records: Iterable[Record]) -> Iterator[tuple[str, str]]:
        """Yield the source and the text of each record."""
        for record in records:
            yield record.source, self.template.render(record) if self.template else record.text("text")


class Perplexity(_OfText):
    """Perplexity as the literature has it: every token of a text is scored, all at the precision of decode steps.

    Documents are joined by an empty line and cut into windows of 2,048 tokens (`max_new_tokens`, or the model's
    context), as GPTQ and most quantization papers after it do. Each window is a text of its own: its first token is not
    scored. With a `stride` windows overlap, and of each but the first only its last `stride` tokens are scored, so that
    every token but the first has a context of a window less a stride at least. The result is exp of the mean over all
    scored tokens.

    A document is a record, or an article of WikiText.
    """

    default_new_tokens = WINDOW
    decodes_prompt = True
    takes = frozenset({"template", "stride"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Perplexity."""
        return (METRICS["perplexity"],)

    def _windows(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make windows of all texts together."""
        size = min(self.max_new_tokens, self.context_length)
        stride = self.stride or size
        if size < 2 or stride > size:
            raise PmpdError(f"windows of {size} tokens with a stride of {stride}: a stride is 1 to the window's length")
        documents = list(self._documents(records))
        ids: list[int] = []
        starts: list[tuple[int, str]] = []
        for source, text in documents:
            starts.append((len(ids), source))
            ids += self.tokenizer.encode(text, special_tokens=not ids)
        document = 0
        scored = 1  # tokens before this one are scored, or never will be
        for start in range(0, len(ids), stride):
            window = ids[start : start + size]
            fresh = max(scored, start + 1)
            if len(window) < 2 or fresh >= start + len(window):
                break
            while document + 1 < len(starts) and starts[document + 1][0] <= fresh:
                document += 1
            yield Item(
                source=f"{starts[document][1]} token {start}",
                group=starts[document][1],
                ids=(window[0],),
                answer=tuple(window[1:]),
                unscored=fresh - start - 1,
            )
            scored = start + len(window)

    def _documents(self, records: Iterable[Record]) -> Iterator[tuple[str, str]]:
        """Yield records, those of WikiText article by article; together they are the whole text."""
        for i, (source, record) in enumerate(self._texts(records)):
            text = record if i == 0 else f"\n\n{record}"
            starts = [match.start() for match in _HEADING.finditer(text)] or [0]
            for start, end in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True):
                yield source if len(starts) == 1 else f"{source}+{start}", text[start:end]


class DecodePerplexity(_OfText):
    """Decode perplexity: how well the decode steps predict a text, each at the precision of the schedule.

    A text is cut into windows of twice `max_new_tokens` (shorter at its end, or where the model's context is shorter).
    The first half of a window is prefilled as context; the other half is fed as the answer (teacher forcing). Its
    tokens after the first are scored, each by the decode step that the schedule gives to it: the first one is predicted
    by prefill, which all schedules share. The result is exp of the mean over all scored tokens. It is not the
    perplexity of the literature, which scores every token of a text: compare it only within a table.
    """

    default_new_tokens = 256

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Decode perplexity."""
        return (METRICS["decode_perplexity"],)

    def _windows(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make windows of each text."""
        size = min(2 * self.max_new_tokens, self.context_length)
        for source, text in self._texts(records):
            ids = self.tokenizer.encode(text)
            for start in range(0, len(ids), size):
                window = ids[start : start + size]
                half = len(window) // 2
                if half > 0 and len(window) - half >= 2:
                    context, answer = window[:half], window[half:]
                    yield Item(
                        source=f"{source}+{start}",
                        group=source,
                        ids=tuple(context),
                        answer=tuple(answer),
                        unscored=1,
                    )
