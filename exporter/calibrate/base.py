"""The interface of a statistic of calibration text, which quantization methods need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pmpd.exporter.bundle.layers import LinearLayer

__all__ = ["Statistic"]


class Statistic(Protocol):
    """What a model does on a text, as far as it tells how weights should be quantized.

    Attributes:
        name: as in `Method.needs`.
    """

    name: ClassVar[str]

    def compute(
        self,
        model: torch.nn.Module,
        batches: Sequence[torch.Tensor],
        weights: Collection[str],
        write: Callable[[str, npt.NDArray[np.generic]], None],
        progress: Callable[..., Iterable[Any]],
    ) -> None:
        """Run a model over a text, and hand the result for each weight to `write`, in any order.

        Args:
            model: a causal language model of transformers in float32, but for its blocks, which are as stored.
            batches: token ids, int64 ``[B, T]`` with T >= 2, no padding.
            weights: names of the checkpoint's weights that will be quantized.
            write: takes a weight's name and its array, which may be forgotten after that. A weight that the statistic
                says nothing about has none.
            progress: shows how much is done: ``for item in progress(items, number of items)``.

        Raises:
            pmpd.runtime.errors.PmpdError: the model and the text do not give the statistic.
        """

    def nbytes(self, weight: str, rows: int, columns: int) -> int:
        """Return what it takes on disk for a weight of so many rows and columns."""
        ...

    def select(
        self, layer: LinearLayer, part: int, array: npt.NDArray[np.generic]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return what is known of one part of a layer, under the names that methods know it by.

        Args:
            layer: says which rows and columns its parts take of the checkpoint's weights.
            part: number of the part.
            array: what was written for the checkpoint's weight.
        """
        ...
