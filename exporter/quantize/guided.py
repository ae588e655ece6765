"""What the errors of a layer cost the model, foretold from statistics and lowered at all precisions at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pmpd.exporter.quantize.anyprecision import AnyPrecision
from pmpd.exporter.quantize.base import NestedCodes
from pmpd.exporter.quantize.descent import Rows
from pmpd.exporter.quantize.moments import damped, one_thread_each
from pmpd.exporter.quantize.native import require_compiled, sums_nbytes
from pmpd.exporter.quantize.tiles import MAX_THREADS, Floats
from pmpd.exporter.quantize.together import Together
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import PmpdError

__all__ = ["Guided"]

TILE = 64
"""Rows that a thread works on at once, at most: they share what is read of H."""

SCRATCH = 1 << 26
"""Bytes that the sums over codes of a thread's rows may take: many codes and columns leave fewer rows."""


@dataclass(frozen=True, kw_only=True)
class Guided:
    """Nested codes and codebooks by joint descent, of rows by themselves (`descent.py`) and together (`together.py`).

    The codes start as those of `AnyPrecision`, with the diagonal of H as sensitivities. Precisions count by how much of
    the start's error is left, so that each is lowered by about the same share. A row that has not become better keeps
    its start; together no step is taken that makes the layer worse.

    Attributes: as those of `AnyPrecision`, with one group a row, and

        damping: share of the mean diagonal of the moments that is added to it. Statistics of few tokens know too little
            of the directions of least energy.
        rounds: how often codes and codebooks of single rows take turns; once before rows are looked at together.
        passes: over the columns, in each round.
        sweeps: over all rows together, in which codes and codebooks take turns tile by tile; 0 for none.

    Raises:
        MissingExtraError: no C compiler is installed.
        PmpdError: as `AnyPrecision`, more than one group, or the compiled code does not run on this machine.
    """

    name: ClassVar[str] = "guided"
    needs: ClassVar[frozenset[str]] = frozenset({"guided"})
    requires: ClassVar[frozenset[str]] = frozenset({"guided"})

    precisions: tuple[int, ...] = (4, 3, 2)
    parent: int = 4
    seed: int = 2
    groups: int = 1
    damping: float = 0.1
    rounds: int = 2
    passes: int = 2
    sweeps: int = 2
    start: AnyPrecision = field(init=False)

    def __post_init__(self) -> None:
        if self.groups != 1:
            raise PmpdError(f"method {self.name} makes one codebook a row, got {self.groups} groups: use --groups 1")
        start = AnyPrecision(precisions=self.precisions, parent=self.parent, seed=self.seed)
        object.__setattr__(self, "start", start)
        require_compiled()

    def quantize(
        self, weight: npt.NDArray[np.floating], statistics: Mapping[str, npt.NDArray[np.floating]]
    ) -> NestedCodes:
        """Quantize one linear layer, on all cores; the result does not depend on how many there are.

        Args:
            weight: ``[N, K]``, any floating dtype; taken as float32.
            statistics: ``guided`` ``[K, K]`` and ``outputs`` ``[N, N]``, as `pmpd.exporter.calibrate.guided` makes
                them. Without ``outputs`` (of wide layers there are none) rows are quantized by themselves; without both
                (those of the output layer), as by `AnyPrecision`.

        Raises:
            PmpdError: as `AnyPrecision.quantize`, or statistics that are not finite.
            ValueError: shapes that do not fit.
        """
        if "guided" not in statistics:
            return self.start.quantize(weight)
        tile = max(1, min(TILE, SCRATCH // sums_nbytes(2**self.parent, weight.shape[1])))
        H = damped(statistics["guided"], weight.shape[1], self.damping)
        sensitivity = np.broadcast_to(H.diagonal(), weight.shape)
        codes = self.start.quantize(weight, {"fisher": sensitivity})
        together = self.sweeps > 0 and "outputs" in statistics
        rounds = 1 if together else self.rounds

        def improved(n: int) -> NestedCodes:
            rows = slice(n, n + tile)
            books = {p: book[rows] for p, book in codes.codebooks.items()}
            return self._improved(weight[rows].astype(np.float32), H, NestedCodes(codes.codes[rows], books), rounds)

        with one_thread_each(min(available_threads(), MAX_THREADS)) as pool:
            nested = NestedCodes.stack(list(pool.map(improved, range(0, len(weight), tile))))
        if not together:
            return nested
        B = damped(statistics["outputs"], len(weight), self.damping)
        with one_thread_each(1) as pool:
            return pool.submit(self._together, weight.astype(np.float32), H, B, nested, tile).result()

    def _together(self, weight: Floats, H: Floats, B: Floats, start: NestedCodes, tile: int) -> NestedCodes:
        rows = Together(weight, H, B, self.parent, start)
        # As above; the errors of a weight that has none cost as much as the whole of it elsewhere.
        importance = (1 / (rows.losses() + 1e-9 * rows.norm + 1e-30)).astype(np.float32)  # [p]
        for _ in range(self.sweeps):
            rows.descend(importance, tile=tile, passes=self.passes)
        return rows.nested

    def _improved(self, weight: Floats, H: Floats, start: NestedCodes, rounds: int) -> NestedCodes:
        books = {p: book[:, 0].astype(np.float32) for p, book in start.codebooks.items()}
        rows = Rows(weight, H, self.parent, start.codes, books)
        before = rows.losses()
        # Of rows without an error at some precision, a change there costs as much as one of a whole weight elsewhere.
        importance = (1 / (before + 1e-9 * rows.norms + 1e-30)).astype(np.float32)  # [p, R]
        rows.descend(importance, rounds=rounds, passes=self.passes)
        better = ((importance * rows.losses()).sum(0) < (importance * before).sum(0))[:, None]  # [R, 1]
        codebooks = {p: np.where(better, book, books[p]).astype(np.float16) for p, book in rows.codebooks.items()}
        codes = np.where(better, rows.codes, start.codes)
        return NestedCodes(codes, {p: book[:, None] for p, book in codebooks.items()})
