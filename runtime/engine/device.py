"""Where tensors live and sessions run.

One class per device, listed in `DEVICES`; so far there is `Cpu`. A CUDA device goes here too: `providers` names its
provider, `allocate` takes memory on the GPU (``OrtValue.ortvalue_from_shape_and_type``), `Buffer.array` becomes a copy
on the host, and the graphs are those that the manifest lists for it (float16 activations). Its kernels take their
stream from ONNX Runtime's context.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pmpd.runtime.engine.onnxruntime import onnxruntime
from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["DEVICES", "Buffer", "Cpu", "Device", "open_device"]


@dataclass(frozen=True)
class Buffer:
    """Memory that graphs read and write in place.

    Attributes:
        array: its contents; on the CPU the memory itself.
        value: ONNX Runtime's tensor over that memory (`onnxruntime.OrtValue`).
    """

    array: npt.NDArray[Any]
    value: Any


class Device(Protocol):
    """What sessions and the KV cache need of a device."""

    @property
    def name(self) -> str:
        """The name that the manifest's graphs give it."""
        ...

    @property
    def providers(self) -> list[str]:
        """ONNX Runtime's execution providers, first choice first."""
        ...

    def reserve(self, nbytes: int) -> None:
        """Raise MemoryError if `nbytes` cannot be had at once. Nothing is kept."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        """Return a buffer of zeros. Raises MemoryError."""
        ...

    def wrap(self, array: npt.NDArray[Any]) -> Buffer:
        """Return a buffer for an array, on the CPU over the same memory; the caller keeps the buffer alive."""
        ...

    def bind(self, binding: Any, *, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Bind buffers to an IOBinding, by the graph's names."""
        ...


class Cpu:
    """The host's processors and memory."""

    name = "cpu"

    @property
    def providers(self) -> list[str]:
        """ONNX Runtime's CPU provider."""
        return ["CPUExecutionProvider"]

    def reserve(self, nbytes: int) -> None:
        """Map memory, which costs nothing while it is untouched, and give it back.

        Not through numpy: a large block that is freed makes glibc take smaller ones from its heap from then on, where
        they are not mapped lazily.
        """
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        try:
            mmap.mmap(-1, nbytes, **private).close()
        except (OSError, OverflowError):
            raise MemoryError from None

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        """Return zeros. The system maps pages when they are first written, so memory grows with use."""
        return self.wrap(np.zeros(shape, dtype=dtype))

    def wrap(self, array: npt.NDArray[Any]) -> Buffer:
        """Return a buffer over the array's memory."""
        return Buffer(array, onnxruntime().OrtValue.ortvalue_from_numpy(array))

    def bind(self, binding: Any, *, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Bind buffers to an IOBinding, by the graph's names."""
        for name, buffer in inputs.items():
            binding.bind_ortvalue_input(name, buffer.value)
        for name, buffer in outputs.items():
            binding.bind_ortvalue_output(name, buffer.value)


DEVICES = {"cpu": Cpu}


def open_device(name: str) -> Device:
    """Return the device of a name, or raise PmpdError."""
    if name not in DEVICES:
        raise PmpdError(unknown_choice("device", name, DEVICES))
    return DEVICES[name]()
