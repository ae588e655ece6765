"""From logits to a token: greedy, temperature, top-k, top-p, repetition penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import PmpdError

__all__ = ["Sampler", "Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. The default is greedy.

    `temperature` 0 takes the most likely token. `top_k` 0 and `top_p` 1 switch those limits off. `repetition_penalty`
    divides positive and multiplies negative logits of tokens already in the text (CTRL, Keskar et al., 2019; 1 is off).
    The same `seed` gives the same text.

    Raises:
        PmpdError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN fails every test.
        if not 0 <= self.temperature < float("inf"):
            raise PmpdError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise PmpdError(f"top-k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise PmpdError(f"top-p must be in (0, 1], got {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise PmpdError(f"repetition penalty must be greater than 0 (1 is off), got {self.repetition_penalty}")
        if self.seed is not None and self.seed < 0:
            raise PmpdError(f"seed must be 0 or more, got {self.seed}")


class Sampler:
    """Draws tokens under a `Sampling`, with its own random state."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: npt.NDArray[np.float32], history: Sequence[int]) -> int:
        """Return the next token id for logits ``[V]`` after the tokens of `history` (prompt and answer)."""
        s = self.sampling
        if s.repetition_penalty != 1 and history:
            seen = np.unique(np.asarray(history, dtype=np.int64))
            logits = logits.copy()
            old = logits[seen]
            logits[seen] = np.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
        if s.temperature == 0:
            return int(logits.argmax())
        ids, p = self.distribution(logits)
        return int(ids[np.searchsorted(np.cumsum(p), self._random.random(), side="right").clip(max=len(ids) - 1)])

    def distribution(self, logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the token ids that remain after top-k and top-p, and their probabilities (which sum to 1)."""
        s = self.sampling
        ids = np.arange(logits.size)
        if 0 < s.top_k < logits.size:
            ids = np.argpartition(logits, -s.top_k)[-s.top_k :]  # no full sort of the vocabulary
        below_best = logits[ids].astype(np.float64) - float(logits.max())
        with np.errstate(over="ignore"):  # a tiny temperature makes -inf of it, which is right
            p = np.exp(below_best / s.temperature)
        p /= p.sum()
        if s.top_p < 1:
            # The smallest set of most likely tokens whose probabilities reach top_p.
            order = np.argsort(-p, kind="stable")
            keep = order[: int(np.searchsorted(np.cumsum(p[order]), s.top_p)) + 1]
            ids, p = ids[keep], p[keep] / p[keep].sum()
        return ids, p
