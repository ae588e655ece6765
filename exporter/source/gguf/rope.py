"""Rotary scalings of a GGUF file in the terms of `config.json`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["llama3_scaling", "read_scaling"]

_KINDS = ("none", "linear", "yarn", "longrope")
_TOLERANCE = 1e-4  # of a factor, which is stored in float32


def read_scaling(get: Callable[..., Any], context_length: int) -> dict[str, Any] | None:
    """Return `rope_scaling` as the metadata says it, None if there is none.

    Args:
        get: gives a value of the metadata without the architecture's name in front, or a default.
        context_length: longest text of the model.

    Raises:
        PmpdError: a kind that has no equal in `config.json`.
    """
    kind = get("rope.scaling.type", None)
    factor = get("rope.scaling.factor", get("rope.scale_linear", 1.0))
    if kind is None:
        kind = "none" if factor in (0, 1) else "linear"
    match kind:
        case "none" | "longrope":  # the factors of the latter are tensors
            return None
        case "linear":
            return None if factor in (0, 1) else {"rope_type": "linear", "factor": float(factor)}
        case "yarn":
            scaling = {
                "rope_type": "yarn",
                "factor": float(factor),
                "original_max_position_embeddings": get(
                    "rope.scaling.original_context_length", round(context_length / float(factor))
                ),
            }
            for name in ("beta_fast", "beta_slow"):
                if (value := get(f"rope.scaling.yarn_{name}", None)) is not None:
                    scaling[name] = float(value)
            if (multiplier := get("rope.scaling.yarn_log_multiplier", None)) is not None:
                scaling |= {"mscale": 10 * float(multiplier), "mscale_all_dim": 10 * float(multiplier)}
            return scaling
    raise PmpdError(f"rope.scaling.type: {unknown_choice('rope scaling', kind, _KINDS)}")


def llama3_scaling(factors: npt.NDArray[np.float32], theta: float) -> dict[str, Any] | None:
    """Return the `rope_scaling` of Llama 3 that divides frequencies by `factors` ``[dim / 2]``; None if all are 1.

    A GGUF file keeps the factors and not the four numbers that they are made of. The blend between full and no scaling
    is linear in the frequency, so any two blended factors give the numbers, up to a scale that changes nothing.

    Raises:
        PmpdError: no such numbers give the factors.
    """
    divisors = np.asarray(factors, dtype=np.float64)
    if not np.isfinite(divisors).all() or (divisors < 1 - _TOLERANCE).any():
        raise PmpdError("rope_freqs.weight is not the rotary scaling of Llama 3: give the original checkpoint")
    if np.allclose(divisors, 1, rtol=_TOLERANCE):
        return None
    factor = float(divisors.max())
    frequencies = theta ** (-np.arange(len(divisors)) / len(divisors)) / (2 * math.pi)  # turns per position
    # Llama 3's own numbers first; few frequencies may all fit to several.
    candidates = [(1.0, 4.0, original) for original in (8192, *(1 << power for power in range(4, 21)))]
    share = (1 / divisors - 1 / factor) / (1 - 1 / factor)  # of the frequency that is not scaled
    blended = (share > _TOLERANCE) & (share < 1 - _TOLERANCE)
    if blended.sum() >= 2:
        slope, offset = np.polyfit(
            frequencies[blended], share[blended], 1
        )  # original / (high - low), -low / (high - low)
        if slope > 0 > offset:
            original = max(1, round(-slope / offset))
            candidates.append((1.0, 1 + original / slope, original))
    for low, high, original in candidates:
        again = ((original * frequencies - low) / (high - low)).clip(0, 1)
        if np.allclose(1 / (again + (1 - again) / factor), divisors, rtol=_TOLERANCE):
            return {
                "rope_type": "llama3",
                "factor": round(factor, 4),
                "low_freq_factor": low,
                "high_freq_factor": round(high, 4),
                "original_max_position_embeddings": original,
            }
    raise PmpdError("rope_freqs.weight is not the rotary scaling of Llama 3: give the original checkpoint")
