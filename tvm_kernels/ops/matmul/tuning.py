"""What a search may choose for a kernel of `BitplaneMatMul`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Tuning"]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a search may choose for a kernel.

    Attributes:
        rows: weight rows computed together, a power of two.
        batch: gemv: tiles of `rows` rows whose tables are built, and whose sums are folded, together; a power of two.
        sums: gemv: independent sums of the products of a vector of plane bytes.
        prefetch: gemv: how many bytes ahead every plane is prefetched; 0 leaves it to the processor.
        tokens: gemm: rows of activations multiplied together.
        depth: gemm: cache lines (512 columns) of a weight row decoded at a time.
        chunk: rows handed to a thread at a time.
    """

    rows: int = 2
    batch: int = 1
    sums: int = 1
    prefetch: int = 0
    tokens: int = 1
    depth: int = 1
    chunk: int = 64
