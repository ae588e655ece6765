"""What an error of a linear layer costs: second moments of its inputs and of the gradients at its outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from pmpd.exporter.bundle.layers import LinearLayer, select_both
from pmpd.exporter.calibrate.products import SecondMoments
from pmpd.exporter.calibrate.sweep import Progress, Visit, fast_dtype, sweep

__all__ = ["Guided", "packed", "unpacked"]

BATCH = 8
"""Sequences that run side by side."""

WIDEST = 5120
"""Outputs whose gradients' moments are kept with each other's: twice as many take four times the room, and the time."""


class Guided:
    """Two factors of the Hessian of a layer's weight, whose Kronecker product stands for it.

    - ``guided`` ``[K, K]``: the sum over tokens of ``s x xᵀ``, where x is the layer's input and s the mean square of
      the loss's gradients at its outputs (*GuidedQuant*, Kim et al., ICML 2025).
    - ``outputs`` ``[blocks, n, n]``: the sum over tokens of ``g gᵀ``, where g are these gradients (K-FAC, Martens and
      Grosse, ICML 2015); of wide layers the blocks on its diagonal, of up to `WIDEST` outputs each.

    The first token of a sequence is left out: most models put their attention sink there, whose activations are far
    larger than any others.
    """

    name: ClassVar[str] = "guided"

    def nbytes(self, weight: str, rows: int, columns: int) -> int:
        """Return what it takes on disk for a weight."""
        return 2 * (columns**2 + rows**2 // _blocks(rows)) if weight.startswith("model.layers.") else 0

    def compute(
        self,
        model: torch.nn.Module,
        batches: Sequence[torch.Tensor],
        weights: Collection[str],
        write: Callable[[str, npt.NDArray[np.generic]], None],
        progress: Progress,
    ) -> None:
        """Write the moments of each weight's layer, packed, one after the other.

        Of layers outside of the blocks there are none.
        """
        # Sequences side by side, as long as they are of one length.
        together = [torch.cat(list(group)) for _, group in groupby(batches, key=lambda ids: ids.shape[1])]
        runs = [run for group in together for run in torch.split(group, BATCH)]
        moments: dict[str, list[SecondMoments]] = {}

        def finish() -> None:
            for name, factors in moments.items():
                write(name, np.concatenate([packed(factor.total()).reshape(-1) for factor in factors]))
            moments.clear()

        def visit(index: int) -> Visit:
            finish()  # those of the block before

            def add(layer: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
                name = f"model.layers.{index}.{layer}.weight"
                if name not in weights:
                    return
                gradients = gradients[:, 1:].flatten(0, 1)  # [B (T - 1), N]
                root = gradients.float().square().mean(-1, keepdim=True).sqrt()
                factors = [(inputs[:, 1:].flatten(0, 1) * root).to(inputs.dtype)]
                factors += gradients.chunk(_blocks(gradients.shape[1]), dim=1)
                if name not in moments:
                    moments[name] = [SecondMoments(x.shape[1]) for x in factors]
                for total, x in zip(moments[name], factors, strict=True):
                    total.add(x)

            return add

        sweep(model, runs, visit, dtype=fast_dtype(), progress=progress)
        finish()

    def select(
        self, layer: LinearLayer, part: int, array: npt.NDArray[np.generic]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Unpack the moments, of the layer's columns and the part's rows."""
        columns, rows = layer.module.source_features, layer.module.parts[part].rows
        inputs, outputs = array[: columns**2].reshape(columns, columns), array[columns**2 :]
        blocks, index = _blocks(rows), layer.module.parts[part].index
        known = {self.name: select_both(unpacked(inputs), layer.module.columns)}
        if blocks == 1:
            known["outputs"] = select_both(unpacked(outputs.reshape(rows, rows)), index)[None]
        elif index is None:
            known["outputs"] = np.stack([unpacked(b) for b in outputs.reshape(blocks, rows // blocks, rows // blocks)])
        return known


def _blocks(rows: int) -> int:
    """Return how many blocks of the same size the outputs of a layer are in."""
    return next(n for n in range(-(-rows // WIDEST), rows + 1) if rows % n == 0)


def packed(moments: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Return second moments ``[K, K]`` in half the bytes: correlations, and standard deviations on the diagonal."""
    deviations = np.sqrt(moments.diagonal())
    inverse = np.divide(1, deviations, out=np.zeros_like(deviations), where=deviations > 0)
    correlations = moments * inverse[:, None] * inverse
    np.fill_diagonal(correlations, deviations)
    return correlations.astype(np.float16)


def unpacked(array: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Undo `packed`."""
    moments = array.astype(np.float32)
    deviations = moments.diagonal().copy()
    np.fill_diagonal(moments, 1.0)
    moments *= deviations[:, None]
    moments *= deviations
    return moments
