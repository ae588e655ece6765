"""Mixes: how many planes each layer reads, so that a model loses least for what it reads.

A knapsack: each layer has a loss for each number of planes, and bytes for each plane; the bytes of a model are limited.
Solved exactly by dynamic programming over bytes, in steps of the greatest common divisor of the sizes, or of a
hundred-thousandth of all where that is larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.precision import LARGEST_GAP, mean_planes

__all__ = ["allocate"]

CELLS = 100_000
"""Steps of the bytes at most; a layer's bytes are rounded up to whole ones."""


def allocate(
    losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], precision: float, *, cells: int = CELLS
) -> dict[str, int]:
    """Return how many planes each layer reads: of least loss in sum, and not more than `precision` in the mean.

    A higher precision never has a greater loss. Of choices that lose the same, the one that reads less is taken.

    Args:
        losses: of each layer, by the numbers of planes that it may read; the same numbers for all layers.
        sizes: bytes of one plane of each layer, by which the mean is weighted.
        precision: planes in the mean, at least the lowest of those numbers.
        cells: steps of the bytes at most.

    Raises:
        PmpdError: a loss is not finite, or the layers are so few and large that no choice comes near the precision.
    """
    for layer, of_layer in losses.items():
        if not all(map(math.isfinite, of_layer.values())):
            raise PmpdError(f"the loss of {layer} is not finite: delete the statistics of this model and export again")
    choices = sorted(next(iter(losses.values())))
    low, total = choices[0], sum(sizes.values())
    step = max(math.gcd(*sizes.values()), -(-total * (choices[-1] - low) // cells))
    budget = int((precision - low) * total / step + 1e-6)
    best = np.zeros(budget + 1)  # the least loss of the layers so far, by the bytes above `low` that they may read
    taken = np.empty((len(losses), budget + 1), dtype=np.uint8)
    for number, (layer, of_layer) in enumerate(losses.items()):
        before, best = best, np.full(budget + 1, np.inf)
        for planes in choices:
            extra = -(-sizes[layer] * (planes - low) // step)
            if extra > budget:
                break
            loss = before[: budget + 1 - extra] + of_layer[planes]
            better = loss < best[extra:]
            best[extra:][better] = loss[better]
            taken[number, extra:][better] = planes
    mix = dict[str, int]()
    left = budget
    for number, layer in reversed(list(enumerate(losses))):
        mix[layer] = int(taken[number, left])
        left -= -(-sizes[layer] * (mix[layer] - low) // step)
    mix = {layer: mix[layer] for layer in losses}
    if (mean := mean_planes(mix, sizes)) < precision - LARGEST_GAP:
        raise PmpdError(
            f"precision {precision}: the nearest mix of these layers reads {mean:.2f} planes: choose another precision"
        )
    return mix
