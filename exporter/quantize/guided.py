"""What the errors of a layer cost the model, foretold from statistics and lowered at all precisions at once."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
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
            statistics: ``guided`` ``[K, K]`` and ``outputs`` ``[blocks, N / blocks, N / blocks]``, as
                `pmpd.exporter.calibrate.guided` makes them. Without ``outputs`` rows are quantized by themselves;
                without both (the output layer has none), as by `AnyPrecision`.

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
        layer, size = weight.astype(np.float32), len(weight)
        outputs = statistics.get("outputs") if self.sweeps else None
        blocks = np.array_split(np.arange(size), 1 if outputs is None else len(outputs))

        def improved(rows: npt.NDArray[np.intp]) -> Rows:
            books = {p: book[rows] for p, book in codes.codebooks.items()}
            start = Rows(layer[rows], H, self.parent, NestedCodes(codes.codes[rows], books))
            return self._improved(start, together=outputs is not None)

        parts: list[NestedCodes] = []
        for number, block in enumerate(blocks):
            with one_thread_each(min(available_threads(), MAX_THREADS)) as pool:
                tiles = list(pool.map(improved, [block[n : n + tile] for n in range(0, len(block), tile)]))
                if outputs is None:
                    parts += [rows.nested for rows in tiles]
                else:
                    B = damped(outputs[number], len(block), self.damping)
                    parts.append(pool.submit(self._together, Rows.joined(tiles), B, tile).result())
        return NestedCodes.stack(parts)

    def _together(self, rows: Rows, B: Floats, tile: int) -> NestedCodes:
        layer = Together(rows, B)
        # As below, and of rows as if they were by themselves.
        total = (rows.losses() + 1e-9 * rows.norms) @ B.diagonal()  # [p]
        importance = (1 / (total + 1e-30)).astype(np.float32)
        for _ in range(self.sweeps):
            layer.descend(importance, tile=tile, passes=self.passes)
        return rows.nested

    def _improved(self, rows: Rows, *, together: bool) -> Rows:
        start, before = copy(rows), rows.losses()
        # Of rows without an error at some precision, a change there costs as much as one of a whole weight elsewhere.
        importance = (1 / (before + 1e-9 * rows.norms + 1e-30)).astype(np.float32)  # [p, R]
        for _ in range(1 if together else self.rounds):
            rows.fit()
            rows.descend(importance, passes=self.passes)
        if not together:  # where codebooks follow
            rows.fit()
        rows.keep(start, (importance * rows.losses()).sum(0) >= (importance * before).sum(0))
        return rows
