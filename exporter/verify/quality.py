"""What quantization costs: a model with the weights of each precision beside the unquantized one, on held-out text.

The logits are those that the verification computes anyway, of a few hundred tokens more (`bundle.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from pmpd.exporter.calibrate.batches import calibration_batches
from pmpd.exporter.calibrate.text import text_tokens
from pmpd.exporter.config import OWN_TEXT, ResolvedConfig
from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.verify.texts import HELD_OUT_TEXT
from pmpd.runtime import Bundle, Tokenizer
from pmpd.runtime.format.quality import PrecisionQuality, Quality

__all__ = ["QualityMeter", "Sample", "logits_nbytes"]

Floats = npt.NDArray[np.float32]

TOKENS = 384  # measuring them adds a tenth to the time of an export
LENGTH = 96  # tokens of a window
BLOCKS = 16  # parts of the text whose means give the interval
T95 = 2.13  # 97.5 % quantile of Student's t with BLOCKS - 1 degrees of freedom
CHUNK = 16  # positions at a time: of a large vocabulary, 16 MB of temporaries
MAX_NLL = 700.0  # nats; no float is the exponential of 710


@dataclass(frozen=True)
class Sample:
    """A text to measure with.

    Attributes:
        text: what text it is, in words.
        windows: token ids ``[W, L + 1]``: of each window the model is given the first L and predicts the last L.
    """

    text: str
    windows: npt.NDArray[np.int64]

    @classmethod
    def of(cls, bundle: Bundle, checkpoint: Checkpoint, config: ResolvedConfig) -> Self:
        """Choose the text: what the statistics left of the calibration text, else one of ours, else random tokens.

        Each window begins with what the tokenizer puts in front of a text.

        Raises:
            PmpdError: the calibration text cannot be read.
        """
        manifest = bundle.manifest
        vocabulary, length = manifest.architecture.vocab_size, min(LENGTH, manifest.context_length)
        count = TOKENS // length
        if "tokenizer.json" in manifest.files:
            tokenizer = Tokenizer.from_bundle(bundle)
            front = tokenizer.encode("")[: length - 1]
            for text, runs in _texts(tokenizer, checkpoint, config):
                windows = _windows(runs, count, length + 1 - len(front))
                if windows is not None and windows.max() < vocabulary:
                    return cls(text, np.hstack([np.tile(np.array(front, np.int64), (count, 1)), windows]))
        return cls("random text", np.random.default_rng(0).integers(0, vocabulary, (count, length + 1)))

    @property
    def inputs(self) -> npt.NDArray[np.int64]:
        """What the model is given, ``[W, L]``."""
        return self.windows[:, :-1]


class QualityMeter:
    """Compares logits of a sample with those of the unquantized model, precision by precision.

    Args:
        sample: the text.
        unquantized: the unquantized model's logits ``[W, L, V]``.
    """

    def __init__(self, sample: Sample, unquantized: Floats) -> None:
        self._sample, self._unquantized = sample, unquantized
        self._targets = torch.from_numpy(sample.windows[:, 1:].flatten())
        self._perplexity = _perplexity([self._nll(log_p, at) for at, log_p in _log_softmax(unquantized)])
        self._rows: list[PrecisionQuality] = []

    def measure(self, precision: float, logits: Floats) -> PrecisionQuality:
        """Measure the logits ``[W, L, V]`` of a precision."""
        divergences, same, nll = [], [], []
        for (at, log_p), (_, log_q) in zip(_log_softmax(self._unquantized), _log_softmax(logits), strict=True):
            divergences.append((log_p.exp() * (log_p - log_q)).sum(1))
            same.append(log_p.argmax(1) == log_q.argmax(1))
            nll.append(self._nll(log_q, at))
        kl = torch.cat(divergences).double().clamp(min=0).numpy()
        means = [block.mean() for block in np.array_split(kl, BLOCKS)]
        self._rows.append(
            PrecisionQuality(
                precision=precision,
                kl=float(kl.mean()),
                kl_ci95=float(T95 * np.std(means, ddof=1) / math.sqrt(BLOCKS)),
                top1=float(torch.cat(same).double().mean()),
                perplexity=_perplexity(nll),
            )
        )
        return self._rows[-1]

    @property
    def quality(self) -> Quality:
        """What was measured so far."""
        return Quality(
            text=self._sample.text,
            tokens=len(self._targets),
            perplexity=self._perplexity,
            precisions=tuple(self._rows),
        )

    def _nll(self, log_q: torch.Tensor, at: int) -> torch.Tensor:
        """Return the surprise ``[T]`` at the tokens that follow positions `at` to `at + T`."""
        return -log_q.gather(1, self._targets[at : at + len(log_q), None])[:, 0]


def logits_nbytes(vocab_size: int) -> int:
    """Return how many bytes the logits of one model and the text that everything is checked with take at most."""
    return 4 * (TOKENS + LENGTH) * vocab_size


def _texts(
    tokenizer: Tokenizer, checkpoint: Checkpoint, config: ResolvedConfig
) -> Iterator[tuple[str, list[npt.NDArray[np.int64]]]]:
    """Yield texts, best first: what each is, and its tokens as runs of neighbours."""
    if config.calibration not in (None, OWN_TEXT):
        # As calibration reads it: only then the same tokens were used.
        ids = np.array(text_tokens(config.calibration, checkpoint.tokenizer()), dtype=np.int64)
        used = calibration_batches(range(len(ids)), config.calibration_samples, config.calibration_length)
        left = np.setdiff1d(np.arange(len(ids)), torch.cat(used, 1).numpy())
        yield "held-out calibration text", [ids[run] for run in np.split(left, np.flatnonzero(np.diff(left) > 1) + 1)]
    yield "a text that comes with pmpd", [np.array(tokenizer.encode(HELD_OUT_TEXT, special_tokens=False), np.int64)]


def _windows(runs: Iterable[npt.NDArray[np.int64]], count: int, size: int) -> npt.NDArray[np.int64] | None:
    """Cut runs of tokens into pieces of `size` and return `count` of them, evenly spread; None if there are fewer."""
    windows = [run[at : at + size] for run in runs for at in range(0, len(run) - size + 1, size)]
    if len(windows) < count:
        return None
    return np.stack([windows[i] for i in np.linspace(0, len(windows) - 1, count).astype(int)])


def _log_softmax(logits: Floats) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield log probabilities ``[T, V]`` of logits ``[W, L, V]``, some positions at a time, and the first position."""
    rows = torch.from_numpy(logits).flatten(0, 1)
    for at in range(0, len(rows), CHUNK):
        yield at, torch.log_softmax(rows[at : at + CHUNK], 1)


def _perplexity(nll: Sequence[torch.Tensor]) -> float:
    return math.exp(min(float(torch.cat(list(nll)).double().mean()), MAX_NLL))
