"""Calibration text as token sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pmpd.runtime.errors import PmpdError

__all__ = ["calibration_batches"]


def calibration_batches(ids: Sequence[int], samples: int, length: int) -> list[torch.Tensor]:
    """Cut a token sequence into `samples` pieces of `length` tokens, spread evenly: each int64 ``[1, length]``.

    A text of fewer tokens than asked for gives as many whole pieces as it holds.

    Raises:
        PmpdError: not even one.
    """
    if len(ids) < length:
        raise PmpdError(
            f"the calibration text has {len(ids)} tokens, fewer than one sequence of {length}: give more text, or a "
            "smaller --calibration-length"
        )
    count = min(samples, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [torch.tensor([list(ids[start : start + length])]) for start in starts]
