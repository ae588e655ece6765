"""The search for a kernel's best choices: small grids one after another, each searched by successive halving.

All candidates of a grid are sampled a few times, in turns; the better half goes on and is sampled twice as often, until
one is left. A few samples are enough to drop most candidates, and the many samples that tell the best ones apart are
spent on those alone (Jamieson and Talwalkar, AISTATS 2016). The next grid starts from what won the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product

from pmpd.tvm_kernels.ops.matmul.kernel import MatmulKernel, Phase

__all__ = ["GRIDS", "Scores", "candidates", "halve", "search"]

# Scores kernels (higher is better) from a number of samples of each.
Scores = Callable[[Sequence[MatmulKernel], int], Sequence[float]]

_FIRST_SAMPLES = 4

# Rows handed to a thread at a time come last: all candidates are then the same function. More rows gain nothing and
# leave little to share where there are many threads.
_CHUNKS = {"chunk": (32, 64, 128)}
GRIDS: Mapping[Phase, Sequence[Mapping[str, Sequence[int]]]] = {
    "gemv": (
        {"rows": (1, 2), "batch": (1, 4, 8), "prefetch": (0, 4096)},
        {"sums": (1, 2), "prefetch": (0, 2048, 4096, 8192)},
        _CHUNKS,
    ),
    "gemm": ({"rows": (1, 2, 4, 8), "tokens": (1, 2, 3, 4, 6, 8)}, {"depth": (1, 2, 4, 8)}, _CHUNKS),
}


def candidates(kernel: MatmulKernel, grid: Mapping[str, Sequence[int]]) -> list[MatmulKernel]:
    """Return the kernel with every combination of a grid's values that is worth a try."""
    combinations = (dict(zip(grid, values, strict=True)) for values in product(*grid.values()))
    tried = (replace(kernel, tuning=replace(kernel.tuning, **values)) for values in combinations)
    return [candidate for candidate in tried if _sensible(candidate)]


def _sensible(kernel: MatmulKernel) -> bool:
    """Return whether a tile's sums fit the vector registers, beside its weights and the activations of a token."""
    t = kernel.tuning
    if kernel.phase == "gemv":
        return True
    needed = t.rows * t.tokens + t.rows + 1
    return kernel.isa.registers // 3 < needed <= kernel.isa.registers


def halve(entrants: Sequence[MatmulKernel], scores: Scores) -> MatmulKernel:
    """Return the best of the entrants."""
    samples = _FIRST_SAMPLES
    while len(entrants) > 1:
        ranking = sorted(zip(scores(entrants, samples), entrants, strict=True), key=lambda scored: -scored[0])
        entrants = [kernel for _, kernel in ranking[: (len(ranking) + 1) // 2]]
        samples *= 2
    return entrants[0]


def search(kernel: MatmulKernel, enter: Callable[[Sequence[MatmulKernel]], Scores]) -> MatmulKernel:
    """Return the kernel with the best choices, starting from those it has.

    Args:
        kernel: what to tune.
        enter: prepares candidates that differ in the values of one grid, and returns what scores them.
    """
    for grid in GRIDS[kernel.phase]:
        entrants = candidates(kernel, grid)
        kernel = halve(entrants, enter(entrants))
    return kernel
