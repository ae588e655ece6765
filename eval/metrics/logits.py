"""Scores of positions, from logits: nats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import PmpdError

__all__ = ["kl_divergence", "log_softmax", "negative_log_likelihood", "top1_agreement"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def log_softmax(logits: Floats) -> Doubles:
    """Return log probabilities ``[..., V]`` in float64.

    Raises:
        PmpdError: a logit is NaN or infinite.
    """
    x = logits.astype(np.float64)
    if not np.isfinite(x).all():
        raise PmpdError(
            "the model computes logits that are not finite: its weights or kernels are broken, export again"
        )
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def negative_log_likelihood(logits: Floats, targets: Sequence[int]) -> Doubles:
    """Return ``-log p(target)`` in nats ``[T]`` for logits ``[T, V]`` and T token ids.

    The perplexity of a text is exp of its mean.
    """
    index = np.asarray(targets, dtype=np.int64)[:, None]
    return -np.take_along_axis(log_softmax(logits), index, axis=-1)[:, 0]


def kl_divergence(reference: Floats, logits: Floats) -> Doubles:
    """Return ``KL(reference || logits)`` in nats ``[T]``, from logits of both ``[T, V]``."""
    log_p = log_softmax(reference)
    divergence: Doubles = (np.exp(log_p) * (log_p - log_softmax(logits))).sum(axis=-1)
    return divergence


def top1_agreement(reference: Floats, logits: Floats) -> npt.NDArray[np.bool_]:
    """Return for each position of logits ``[T, V]`` whether both have the same most likely token, ``[T]``."""
    agreement: npt.NDArray[np.bool_] = reference.argmax(axis=-1) == logits.argmax(axis=-1)
    return agreement
