"""The layout of `weights.bin`: where every tensor lies.

The plan follows from the network alone, so the file has its full size from the start and each tensor is written to its
place as soon as it is computed. Tensors start at multiples of 64 bytes, in the order in which a token visits them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.arch import Decoder
from pmpd.exporter.arch.decoder import Embedding
from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.exporter.nn import BitplaneLinear, BitplaneLogits, HeadNorm, Norm, RMSHeadNorm, RotaryTables
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
        return sum(tensor.length for tensor in self.tensors.values() if tensor.role == "planes")

    @property
    def codebook_bytes(self) -> int:
        """Bytes of all codebooks."""
        return sum(tensor.length for tensor in self.tensors.values() if tensor.role == "codebook")

    def planes(self, layer: str) -> Tensor:
        """Return the planes of a quantized layer."""
        return next(tensor for tensor in self.tensors.values() if (tensor.layer, tensor.role) == (layer, "planes"))

    def codebook(self, layer: str, bits: int) -> Tensor:
        """Return the codebook of a quantized layer at a precision that it has one for."""
        wanted = (layer, "codebook", bits)
        return next(tensor for tensor in self.tensors.values() if (tensor.layer, tensor.role, tensor.bits) == wanted)


def plan_weights(decoder: Decoder, precisions: Sequence[int], parent: int) -> WeightPlan:
    """Lay out the tensors of a network whose nested layers hold `parent` planes and offer `precisions`."""
    tensors: dict[str, Tensor] = {}
    end = 0

    def add(name: str, dtype: str, shape: Sequence[int], **fields: Any) -> None:
        nonlocal end
        offset = -(-end // CACHE_LINE) * CACHE_LINE
        end = offset + math.prod(shape) * DTYPE_SIZES[dtype]
        tensors[name] = Tensor(
            name=name, file=WEIGHTS_FILE, offset=offset, length=end - offset, dtype=dtype, shape=tuple(shape), **fields
        )

    linears = []
    for scope, module in decoder.named_modules():
        if not isinstance(module, BitplaneLinear):
            for name, parameter in module.named_parameters(prefix=scope, recurse=False):
                add(name, parameter.dtype.numpy().name, parameter.shape, role=_role(module))
            continue
        bits = parent if module.nested else module.precision
        coarse = (module.coarse,) if isinstance(module, BitplaneLogits) else ()
        offered = tuple(precisions) if module.nested else (module.precision, *coarse)
        N, stride = module.planes.shape[1:]
        add(f"{scope}.planes", "uint8", (bits, N, stride), role="planes", layer=scope, bits=bits, nested=module.nested)
        for p in offered:
            add(f"{scope}.codebook.{p}", "float16", (N, module.groups, 2**p), role="codebook", layer=scope, bits=p)
        if isinstance(module, BitplaneLogits):
            add(f"{scope}.basis", "float32", module.basis.shape, role="basis", layer=scope)
            add(f"{scope}.bound", "float16", module.bound.shape, role="bound", layer=scope)
        if module.has_bias:
            add(f"{scope}.bias", "float32", (N,), role="bias", layer=scope)
        linears.append(LinearLayer(scope, module, bits, offered))
    return WeightPlan(tensors, tuple(linears), end)


def _role(module: nn.Module) -> str:
    """Return the role of a module's parameters that are not quantized."""
    for kinds, role in (((Norm, HeadNorm, RMSHeadNorm), "norm"), (Embedding, "embedding"), (RotaryTables, "rotary")):
        if isinstance(module, kinds):
            return role
    raise TypeError(f"the parameters of {type(module).__name__} have no role in a bundle: give them one here")


def external_tensor(tensor: Tensor, *, planes: int) -> ir.ExternalTensor:
    """Return an initializer's value that lies in the weight file; of a nested tensor, its first `planes` planes."""
    shape = tensor.shape_at(planes)
    return ir.ExternalTensor(
        tensor.file,
        tensor.offset,
        math.prod(shape) * DTYPE_SIZES[tensor.dtype],
        ir.DataType.from_numpy(np.dtype(tensor.dtype)),
        shape=ir.Shape(shape),
        name=tensor.name,
    )
