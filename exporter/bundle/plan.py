"""The layout of `weights.bin`: where every tensor lies.

The plan follows from the network alone, so the file has its full size from the start and each tensor is written to its
place as soon as it is computed. Tensors start at multiples of 64 bytes, in the order in which a token visits them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pmpd.exporter.arch import Decoder
from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.exporter.nn import BitplaneLinear
from pmpd.runtime.format.bitplanes import CACHE_LINE
from pmpd.runtime.format.manifest import DTYPE_SIZES, Tensor

__all__ = ["WEIGHTS_FILE", "WeightPlan", "external_tensor", "plan_weights"]

WEIGHTS_FILE = "weights.bin"


@dataclass(frozen=True)
class WeightPlan:
    """Where every tensor of a bundle lies, which layers are quantized, and the file's size in bytes."""

    tensors: Mapping[str, Tensor]
    linears: tuple[LinearLayer, ...]
    size: int

    @property
    def plane_bytes(self) -> int:
        """Bytes of all bit-planes."""
        return sum(tensor.length for name, tensor in self.tensors.items() if name.endswith(".planes"))

    @property
    def codebook_bytes(self) -> int:
        """Bytes of all codebooks."""
        return sum(tensor.length for name, tensor in self.tensors.items() if ".codebook." in name)


def plan_weights(decoder: Decoder, precisions: Sequence[int], parent: int) -> WeightPlan:
    """Lay out the tensors of a network whose nested layers hold `parent` planes and offer `precisions`."""
    shapes: dict[str, tuple[str, tuple[int, ...], bool]] = {}
    linears = []
    for scope, module in decoder.named_modules():
        for name, parameter in module.named_parameters(prefix=scope, recurse=False):
            if not isinstance(module, BitplaneLinear):
                shapes[name] = (parameter.dtype.numpy().name, tuple(parameter.shape), False)
        if isinstance(module, BitplaneLinear):
            bits = parent if module.nested else module.precision
            offered = tuple(precisions) if module.nested else (module.precision,)
            N, stride = module.planes.shape[1], module.planes.shape[2]
            shapes[f"{scope}.planes"] = ("uint8", (bits, N, stride), module.nested)
            for precision in offered:
                shapes[f"{scope}.codebook.{precision}"] = ("float16", (N, module.groups, 2**precision), False)
            if module.has_bias:
                shapes[f"{scope}.bias"] = ("float32", (N,), False)
            linears.append(LinearLayer(scope, module, bits, offered))
    tensors, end = {}, 0
    for name, (dtype, shape, nested) in shapes.items():
        offset = -(-end // CACHE_LINE) * CACHE_LINE
        length = math.prod(shape) * DTYPE_SIZES[dtype]
        tensors[name] = Tensor(
            name=name, file=WEIGHTS_FILE, offset=offset, length=length, dtype=dtype, shape=shape, nested=nested
        )
        end = offset + length
    return WeightPlan(tensors, tuple(linears), end)


def external_tensor(tensor: Tensor, *, planes: int) -> ir.ExternalTensor:
    """Return an initializer's value that lies in the weight file; of a nested tensor, its first `planes` planes."""
    shape = (planes, *tensor.shape[1:]) if tensor.nested else tensor.shape
    return ir.ExternalTensor(
        tensor.file,
        tensor.offset,
        math.prod(shape) * DTYPE_SIZES[tensor.dtype],
        ir.DataType.from_numpy(np.dtype(tensor.dtype)),
        shape=ir.Shape(shape),
        name=tensor.name,
    )
