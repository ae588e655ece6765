"""Second moments of the inputs of linear layers, all tokens alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from pmpd.exporter.bundle.layers import LinearLayer, select_both
from pmpd.exporter.calibrate.products import SecondMoments
from pmpd.exporter.calibrate.sweep import Progress, VisitInputs, fast_dtype, sweep_inputs

__all__ = ["Moments"]


class Moments:
    """The sum over tokens of ``x xᵀ``, where x is a layer's input in the unquantized model: for a layer, ``[K, K]``.

    Twice that is the Hessian of each row's squared output error, as in GPTQ (Frantar et al., ICLR 2023).
    """

    name: ClassVar[str] = "moments"

    def nbytes(self, weight: str, rows: int, columns: int) -> int:
        """Return what it takes on disk for a weight."""
        return 4 * columns**2 if weight.startswith("model.layers.") else 0

    def compute(
        self,
        model: torch.nn.Module,
        batches: Sequence[torch.Tensor],
        weights: Collection[str],
        write: Callable[[str, npt.NDArray[np.generic]], None],
        progress: Progress,
    ) -> None:
        """Write the moments of each weight's layer; of layers outside of the blocks there are none."""
        moments: dict[str, SecondMoments] = {}

        def finish() -> None:
            for name, sums in moments.items():
                write(name, sums.total())
            moments.clear()

        def visit(index: int) -> VisitInputs:
            finish()  # those of the block before

            def add(layer: str, inputs: torch.Tensor) -> None:
                name = f"model.layers.{index}.{layer}.weight"
                if name not in weights:
                    return
                tokens = inputs.flatten(0, 1)  # [B T, K]
                if name not in moments:
                    moments[name] = SecondMoments(tokens.shape[1])
                moments[name].add(tokens)

            return add

        sweep_inputs(model, batches, visit, dtype=fast_dtype(), progress=progress)
        finish()

    def select(
        self, layer: LinearLayer, part: int, array: npt.NDArray[np.generic]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Take the moments of the layer's columns: ``[K, K]``."""
        return {self.name: select_both(array.astype(np.float32), layer.module.columns)}
