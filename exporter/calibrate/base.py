"""The interface of a statistic of calibration text, which quantization methods need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import ClassVar, Protocol

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
        batches: Iterable[torch.Tensor],
        weights: Collection[str],
        write: Callable[[str, npt.NDArray[np.float32]], None],
    ) -> None:
        """Run a model over a text, and hand the result for each weight to `write`, in any order.

        Args:
            model: a causal language model of transformers in float32.
            batches: token ids, int64 ``[B, T]`` with T >= 2, no padding.
            weights: names of the checkpoint's weights that will be quantized.
            write: takes a weight's name and its array, which may be forgotten after that.

        Raises:
            pmpd.runtime.errors.PmpdError: the model and the text do not give the statistic.
        """

    def merge(self, layer: LinearLayer, arrays: Mapping[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """Return the statistic of a merged layer from those of the checkpoint's weights that it is made of.

        Args:
            layer: says which rows and columns of which weights it takes.
            arrays: what was written for each of ``layer.weight_names``.
        """
        ...
