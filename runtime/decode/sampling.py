"""From logits to a token: greedy, temperature, top-k, top-p, min-p, repetition penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import PmpdError

__all__ = ["Sampler", "Sampling", "left_out"]

# Nats below the likeliest token from which on probabilities may be approximate.
TAIL = 4.0
# Fields of a generation_config.json that change which tokens are chosen and are not in `Sampling`, with what switches
# each of them off.
_OTHERS: dict[str, Any] = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "sequence_bias": {},
}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. The default is greedy.

    `temperature` 0 takes the most likely token. `top_k` 0, `top_p` 1 and `min_p` 0 switch those limits off; `min_p`
    is the least probability of a token, relative to that of the likeliest (Nguyen et al., 2024). `repetition_penalty`
    divides positive and multiplies negative logits of tokens already in the text (CTRL, Keskar et al., 2019; 1 is off).
    The same `seed` gives the same text.

    Raises:
        PmpdError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
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
        if not 0 <= self.min_p <= 1:
            raise PmpdError(f"min-p must be 0 (off) to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise PmpdError(f"repetition penalty must be greater than 0 (1 is off), got {self.repetition_penalty}")
        if self.seed is not None and self.seed < 0:
            raise PmpdError(f"seed must be 0 or more, got {self.seed}")

    @property
    def margin(self) -> float:
        """How far below the best a logit may be and matter; see `Sequence.step`.

        Only the best one matters to greedy decoding. At a temperature T, tokens further than ``TAIL * T`` below the
        best are each less likely than it by a factor of e^-TAIL; their probabilities may be approximate. A repetition
        penalty may make any token the best.
        """
        return math.inf if self.repetition_penalty != 1 else TAIL * self.temperature

    @classmethod
    def from_config(cls, generation_config: Mapping[str, Any], *, seed: int | None = None) -> Self:
        """Return what a model's authors recommend in its `generation_config.json`, as transformers reads it.

        That is greedy unless it says ``do_sample``; then a temperature of 1 and the 50 most likely tokens unless it
        says otherwise. What else it may limit tokens by (``typical_p``, …) is left out: `left_out` names it.

        Raises:
            PmpdError: a value is not a number or out of its range.
        """
        stated = {name: value for name, value in generation_config.items() if value is not None}
        defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0} if stated.get("do_sample") else {}
        values: dict[str, Any] = {name: stated.get(name, default) for name, default in defaults.items()}
        values["repetition_penalty"] = stated.get("repetition_penalty", 1.0)
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise PmpdError(f"generation_config.json: {name} must be a number, got {value!r:.60}: export again")
        return cls(**values, seed=seed)


class Sampler:
    """Draws tokens under a `Sampling`, with its own random state."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        # All ids and their probabilities: arrays of this size cost more to get from the system than to compute with.
        self._all = np.arange(0), np.empty(0)

    def __call__(self, logits: npt.NDArray[np.float32], history: Sequence[int]) -> int:
        """Return the next token id for logits ``[V]`` after the tokens of `history` (prompt and answer)."""
        s = self.sampling
        if s.repetition_penalty != 1 and history:
            logits = logits.copy()
            seen = np.asarray(history, dtype=np.int64)  # what came twice is written twice, with the same value
            old = logits[seen]
            logits[seen] = np.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
        if s.temperature == 0:
            return int(logits.argmax())
        ids, p = self.distribution(logits)
        np.cumsum(p, out=p)
        return int(ids[np.searchsorted(p, self._random.random(), side="right").clip(max=len(ids) - 1)])

    def distribution(self, logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the token ids that remain after top-k, top-p and min-p, and their probabilities (which sum to 1).

        Tokens exactly as likely as the last that top-p keeps are kept with it. The next call may overwrite the arrays.
        """
        s = self.sampling
        if 0 < s.top_k < logits.size:
            ids = _likeliest(logits, s.top_k)
            p = logits[ids].astype(np.float64)
        else:
            if self._all[0].size != logits.size:
                self._all = np.arange(logits.size), np.empty(logits.size)
            ids, p = self._all
            p[:] = logits
        p -= p.max()
        with np.errstate(over="ignore"):  # a tiny temperature makes -inf of it, which is right
            p /= s.temperature
        np.exp(p, out=p)
        p /= p.sum()
        if s.top_p < 1:
            # The smallest set of most likely tokens whose probabilities reach top_p. Those below this bound have less
            # than 1 - top_p together: it leaves few to sort.
            ranked = np.sort(p[p >= (1 - s.top_p) / p.size])[::-1]
            last = min(int(np.searchsorted(np.cumsum(ranked), s.top_p)), ranked.size - 1)
            likely = np.flatnonzero(p >= ranked[last])
            ids, p = ids[likely], p[likely] / p[likely].sum()
        if s.min_p > 0:
            likely = np.flatnonzero(p >= s.min_p * p.max())
            ids, p = ids[likely], p[likely] / p[likely].sum()
        return ids, p


def left_out(generation_config: Mapping[str, Any]) -> list[str]:
    """Return the fields of a `generation_config.json` that choose tokens in a way that `Sampling` does not have."""
    stated = {name: value for name, value in generation_config.items() if name in _OTHERS and value is not None}
    return [name for name, value in stated.items() if value != _OTHERS[name]]


def _likeliest(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Return the ids of the k highest logits, in no order.

    At least k logits reach the k-th highest of the maxima of blocks, and few others do: eight times as fast as a
    partition of the whole vocabulary.
    """
    block = max(1, min(64, logits.size // k))
    maxima = np.maximum.reduceat(logits, np.arange(0, logits.size, block))
    ids = np.flatnonzero(logits >= np.partition(maxima, -k)[-k])
    return ids[np.argpartition(logits[ids], -k)[-k:]]
