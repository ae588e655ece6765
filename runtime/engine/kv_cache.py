"""The key/value cache: buffers allocated once, which every graph reads and extends in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from pmpd.runtime.engine.onnxruntime import onnxruntime
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.manifest import KvContract

__all__ = ["KvCache"]


class KvCache:
    """Keys and values of up to `capacity` positions, for all layers.

    The buffers are bound as past and present of every session at once, so attention appends in place and a precision
    switch moves nothing. `length` positions hold tokens; `truncate` forgets the later ones.

    Raises:
        PmpdError: there is no memory for so many positions.
    """

    def __init__(self, contract: KvContract, capacity: int) -> None:
        self.contract = contract
        self.capacity = capacity
        self.length = 0
        shape = (1, contract.heads, capacity, contract.head_dim)
        try:
            # np.zeros maps pages lazily: memory grows with the positions that are used.
            self.buffers = {
                (layer, part): onnxruntime().OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=contract.dtype))
                for layer in range(contract.layers)
                for part in ("key", "value")
            }
        except (MemoryError, ValueError):  # ValueError: more than numpy can address
            raise PmpdError(
                f"no memory for a KV cache of {capacity} positions ({self.nbytes / 1e9:,.1f} GB): "
                "choose a smaller context_length"
            ) from None
        # One mask over the whole capacity, 1 where a token stands: GroupQueryAttention takes its length from the sum.
        self.mask = np.zeros((1, capacity), dtype=np.int64)
        self._mask_value = onnxruntime().OrtValue.ortvalue_from_numpy(self.mask)

    def bind(self, binding: Any) -> None:
        """Bind the mask and all buffers, each as past and present, to an IOBinding."""
        binding.bind_ortvalue_input("attention_mask", self._mask_value)
        for (layer, part), buffer in self.buffers.items():
            binding.bind_ortvalue_input(self.contract.past.format(layer=layer, part=part), buffer)
            binding.bind_ortvalue_output(self.contract.present.format(layer=layer, part=part), buffer)

    def extend(self, count: int) -> None:
        """Make room in the mask for `count` more tokens, which the next run writes."""
        self.mask[0, self.length : self.length + count] = 1
        self.length += count

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions."""
        self.mask[0, length : self.length] = 0
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers at full capacity."""
        c = self.contract
        return 2 * c.layers * c.heads * self.capacity * c.head_dim * np.dtype(c.dtype).itemsize
