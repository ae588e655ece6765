"""The codebooks of one precision, learned so that the whole model predicts what the unquantized one does.

Layer by layer, methods lower what statistics foretell of the loss. What they cannot know is how errors of layers meet.
Here codes are fixed, the model runs with all of them, and Adam lowers the Kullback-Leibler divergence from the
unquantized model's predictions. The codebooks of a precision are used by no other, so none can lose by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.exporter.tune.student import Codebooks, Coded, Student

__all__ = ["NEAR", "Tuned", "Tuner", "rate"]

Piece = tuple[torch.Tensor, torch.Tensor]
"""Token ids ``[1, T]``, and what the unquantized model gives its output layer there, ``[1, T, H]``."""
Progress = Callable[..., Iterable[Piece]]  # takes pieces, and their number as `total`

NEAR = 0.05
"""Mean KL in nats below which a precision is left as it is: from 0.042 tuning took 1 %, from 0.095 it took 9."""

HELD_OUT = 8  # one piece of so many only judges
WARM_UP = 8  # steps until the rate is reached; then it falls to zero
BETAS = (0.9, 0.99)  # of Adam: steps are few


def rate(bits: int) -> float:
    """Return Adam's rate for codebooks of so many bits, as a share of their values: few values have far to go."""
    return 0.016 / (1 << bits)


@dataclass(frozen=True)
class Tuned:
    """What came of tuning.

    Attributes:
        codebooks: those of least divergence on held-out text.
        before: mean divergence there of the codebooks that it started from, in nats a token.
        after: that of the tuned ones, which are not `codebooks` if it is not less; None if there are none, because the
            start is nearer than `NEAR`.
    """

    codebooks: Codebooks
    before: float
    after: float | None


class Tuner:
    """An unquantized model's predictions on a text, and a student that learns them.

    Args:
        model: as `Student` takes it.
        pieces: of the text, int64 ``[1, T]`` each; every eighth is held out. Each of the others is one step.
        dtype: of products.
    """

    def __init__(self, model: Any, pieces: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        self._student = Student(model, dtype)
        with torch.no_grad():
            known: list[Piece] = [(ids, self._student.hidden(ids)) for ids in pieces]
        self._held_out, self._pieces = known[::HELD_OUT], [p for i, p in enumerate(known) if i % HELD_OUT]

    def tune(
        self,
        layers: Mapping[str, tuple[LinearLayer, Coded]],
        *,
        rate: float,
        progress: Progress = lambda pieces, **_: pieces,
    ) -> Tuned:
        """Learn the codebooks of a precision.

        Args:
            layers: by name, with their codes of as many bits.
            rate: Adam's, as a share of the mean absolute value in a layer's codebooks.
            progress: shows which pieces are done.
        """
        start = {name: coded for name, (_, coded) in layers.items()}
        self._student.load(layers)
        before = self._judge()
        if before < NEAR:
            return Tuned({name: book for name, (_, book) in start.items()}, before, None)
        self._learn(rate, progress)
        for book in self._student.books:
            book.data = book.data.half().float()
        after = self._judge()
        better = after < before  # false if it is not a number
        books = self._student.codebooks(start) if better else {name: book for name, (_, book) in start.items()}
        return Tuned(books, before, after)

    def _learn(self, rate: float, progress: Progress) -> None:
        groups = [{"params": [book], "size": book.detach().abs().mean().item()} for book in self._student.books]
        adam = torch.optim.Adam(groups, betas=BETAS)
        order = torch.randperm(len(self._pieces), generator=torch.Generator().manual_seed(0))
        for step, piece in enumerate(progress([self._pieces[i] for i in order], total=len(order)), 1):
            for group in adam.param_groups:
                group["lr"] = rate * group["size"] * min(1, step / WARM_UP) * (1 - (step - 1) / len(order))
            adam.zero_grad()
            self._divergence(piece).backward()  # type: ignore[no-untyped-call]
            adam.step()

    @torch.no_grad()
    def _judge(self) -> float:
        return math.fsum(self._divergence(piece).item() for piece in self._held_out) / len(self._held_out)

    def _divergence(self, piece: Piece) -> torch.Tensor:
        """Return the mean divergence of the student's predictions from those of the unquantized model."""
        ids, known = piece
        with torch.no_grad():
            log_p = self._student.logits(known).log_softmax(-1)
        log_q = self._student.logits(self._student.hidden(ids)).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
