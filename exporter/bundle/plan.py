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
from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.exporter.nn import (
    BitplaneEmbedding,
    BitplaneLinear,
    BitplaneLogits,
    Embedding,
    HeadNorm,
    JointRMSHeadNorm,
    Norm,
    RMSHeadNorm,
    RotaryTables,
)
from pmpd.runtime.format.bitplanes import CACHE_LINE
from pmpd.runtime.format.manifest import DTYPE_SIZES, Tensor

__all__ = ["WEIGHTS_FILE", "WeightPlan", "external_tensor", "plan_weights"]

WEIGHTS_FILE = "weights.bin"


@dataclass(frozen=True)
class WeightPlan:
    """Where every tensor of a bundle lies, and what of it is quantized.

    Attributes:
        tensors: by name.
        linears: the linear layers.
        embedding: the table of an embedding of its own; None: it is tied to the output layer.
        size: bytes of the weight file.
    """

    tensors: Mapping[str, Tensor]
    linears: tuple[LinearLayer, ...]
    embedding: LinearLayer | None
    size: int

    @property
    def layers(self) -> tuple[LinearLayer, ...]:
        """All that is quantized, in the order of the weight file."""
        return self.linears if self.embedding is None else (self.embedding, *self.linears)

    def nbytes(self, role: str) -> int:
        """Bytes of all tensors of a role."""
        return sum(tensor.length for tensor in self.tensors.values() if tensor.role == role)

    def planes(self, layer: str) -> Tensor:
        """Return the planes of a quantized layer."""
        return self.tensors[f"{layer}.planes"]

    def codebook(self, layer: str, bits: int) -> Tensor:
        """Return the codebook of a quantized layer at a precision that it has one for."""
        return self.tensors[f"{layer}.codebook.{bits}"]


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

    linears, embedding = [], None
    for scope, module in decoder.named_modules():
        if not isinstance(module, BitplaneLinear):
            for name, parameter in module.named_parameters(prefix=scope, recurse=False):
                add(name, parameter.dtype.numpy().name, parameter.shape, role=_role(module))
            continue
        bits = parent if module.nested else module.precision
        coarse = (module.coarse,) if isinstance(module, BitplaneLogits) else ()
        offered = tuple(precisions) if module.nested else (module.precision, *coarse)
        N, stride = module.planes.shape[1:]
        if isinstance(module, BitplaneEmbedding):
            add(f"{scope}.planes", "uint8", (bits, N, stride), role="embedding")
            add(f"{scope}.codebook.{bits}", "float16", (N, module.groups, 2**bits), role="embedding")
            embedding = LinearLayer(scope, module, bits, offered)
            continue
        add(f"{scope}.planes", "uint8", (bits, N, stride), role="planes", layer=scope, bits=bits, nested=module.nested)
        for p in offered:
            add(f"{scope}.codebook.{p}", "float16", (N, module.groups, 2**p), role="codebook", layer=scope, bits=p)
        if isinstance(module, BitplaneLogits):
            add(f"{scope}.basis", "float32", module.basis.shape, role="basis", layer=scope)
            add(f"{scope}.bound", "float16", module.bound.shape, role="bound", layer=scope)
        if module.has_bias:
            add(f"{scope}.bias", "float32", (N,), role="bias", layer=scope)
        linears.append(LinearLayer(scope, module, bits, offered))
    return WeightPlan(tensors, tuple(linears), embedding, end)


def _role(module: nn.Module) -> str:
    """Return the role of a module's parameters that are not quantized."""
    norms = (Norm, HeadNorm, RMSHeadNorm, JointRMSHeadNorm)
    for kinds, role in ((norms, "norm"), (Embedding, "embedding"), (RotaryTables, "rotary")):
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
