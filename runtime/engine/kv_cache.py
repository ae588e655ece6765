"""The key/value cache: buffers allocated once, which every graph reads and extends in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.runtime.engine.device import Buffer, Cpu, Device
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.manifest import KvContract

__all__ = ["KvCache", "KvView"]


class KvCache:
    """Keys and values of up to `capacity` positions, for all layers.

    The buffers are bound as past and present of every session at once, so attention appends in place and a precision
    switch moves nothing. `length` positions hold tokens: `extend` before a run that writes more, `truncate` to forget
    the last ones. Only the sequence that has the cache calls these.

    Attributes:
        buffers: by layer and part (``key``, ``value``), ``[1, heads, capacity, head_dim]`` each.
        mask: int64 ``[1, capacity]``, 1 where a token stands. GroupQueryAttention takes its length from the sum.

    Raises:
        PmpdError: there is not enough memory for this capacity.
    """

    def __init__(self, contract: KvContract, capacity: int, *, device: Device | None = None) -> None:
        device = Cpu() if device is None else device
        self.contract = contract
        self.capacity = capacity
        self.length = 0
        self._device = device
        shape = (1, contract.heads, capacity, contract.head_dim)
        # Thousands of buffers that fit one by one can leave no memory even for the message: asked for together first.
        shortage = PmpdError(
            f"no memory for a KV cache of {capacity} positions ({self.nbytes / 1e9:,.1f} GB): "
            "choose a smaller context_length"
        )
        try:
            device.reserve(self.nbytes)
            self.buffers: dict[tuple[int, str], Buffer] = {
                (layer, part): device.allocate(shape, contract.dtype)
                for layer in range(contract.layers)
                for part in ("key", "value")
            }
            self._mask = device.allocate((1, capacity), np.int64)
        except MemoryError:
            raise shortage from None
        self.mask = self._mask.array

    def bind(self, binding: Any) -> None:
        """Bind the mask and all buffers, each as past and present, to an IOBinding."""
        past, present = (
            {name(layer, part): buffer for (layer, part), buffer in self.buffers.items()}
            for name in (self.contract.past_name, self.contract.present_name)
        )
        self._device.bind(binding, inputs={"attention_mask": self._mask, **past}, outputs=present)

    def extend(self, count: int) -> None:
        """Make room in the mask for `count` more tokens, which the next run writes."""
        self.mask[0, self.length : self.length + count] = 1
        self.length += count

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions."""
        self.mask[0, length:] = 0  # all of it: `extend` may have been interrupted half-way
        self.length = length

    def view(self) -> KvView:
        """Return what the cache holds now, without copying it."""
        return KvView(self, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers at full capacity."""
        c = self.contract
        return 2 * c.layers * c.heads * self.capacity * c.head_dim * np.dtype(c.dtype).itemsize


@dataclass(frozen=True)
class KvView:
    """The keys and values of the first `tokens` positions of a cache: read-only views, valid until it is truncated.

    Keys are stored after the rotary embedding.
    """

    _cache: KvCache
    tokens: int

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self._cache.contract.layers

    def keys(self, layer: int) -> npt.NDArray[Any]:
        """Return the keys of a layer, from 0: ``[kv_heads, tokens, head_dim]``, in the cache's type."""
        return self._part(layer, "key")

    def values(self, layer: int) -> npt.NDArray[Any]:
        """Return the values of a layer, from 0: ``[kv_heads, tokens, head_dim]``, in the cache's type."""
        return self._part(layer, "value")

    def _part(self, layer: int, part: str) -> npt.NDArray[Any]:
        view = self._cache.buffers[layer, part].array[0, :, : self.tokens]
        view.flags.writeable = False
        return view
