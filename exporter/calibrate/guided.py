"""Second moments of the inputs of linear layers, each token weighted by how much an error of its output matters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from pmpd.exporter.bundle.layers import LinearLayer, select
from pmpd.exporter.calibrate.sweep import Progress, Visit, fast_dtype, sweep

__all__ = ["Guided", "packed", "unpacked"]

BATCH = 8
"""Sequences that run side by side."""


class Guided:
    """The guided Hessian of *GuidedQuant* (Kim et al., ICML 2025): for a layer, ``[K, K]``.

    H is the sum over tokens of ``s x xᵀ``, where x is the layer's input and s the mean square of the loss's gradients
    at its outputs. The first token of a sequence is left out: most models put their attention sink there, whose
    activations are far larger than any others.
    """

    name: ClassVar[str] = "guided"

    def nbytes(self, rows: int, columns: int) -> int:
        """Return what it takes on disk for a weight."""
        return 2 * columns**2

    def compute(
        self,
        model: torch.nn.Module,
        batches: Sequence[torch.Tensor],
        weights: Collection[str],
        write: Callable[[str, npt.NDArray[np.generic]], None],
        progress: Progress,
    ) -> None:
        """Write the moments of each weight's layer, packed; of layers outside of the blocks there are none."""
        # Sequences side by side, as long as they are of one length.
        together = [torch.cat(list(group)) for _, group in groupby(batches, key=lambda ids: ids.shape[1])]
        runs = [run for group in together for run in torch.split(group, BATCH)]
        moments: dict[str, torch.Tensor] = {}

        def finish() -> None:
            for name, total in moments.items():
                write(name, packed(total.numpy()))
            moments.clear()

        def visit(index: int) -> Visit:
            finish()  # those of the block before

            def add(layer: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
                name = f"model.layers.{index}.{layer}.weight"
                if name not in weights:
                    return
                mean_square = gradients.float().square().mean(-1, keepdim=True)  # [B, T, 1]
                scaled = (inputs.float() * mean_square.sqrt())[:, 1:].flatten(0, 1)  # [B (T - 1), K]
                total = moments.setdefault(name, torch.zeros(scaled.shape[1], scaled.shape[1]))
                total.addmm_(scaled.T, scaled)

            return add

        sweep(model, runs, visit, dtype=fast_dtype(), progress=progress)
        finish()

    def select(self, layer: LinearLayer, part: int, array: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        """Unpack the moments, of the layer's columns: ``[K, K]``."""
        moments = unpacked(array)
        columns = layer.module.columns
        return moments if columns is None else select(select(moments, columns, axis=0), columns, axis=1)


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
