"""Linear layers: bit-plane ones for bundles, floating-point ones for the reference graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.graph.logits import MARGIN
from pmpd.exporter.graph.operators import PMPD_DOMAIN
from pmpd.runtime.format.bitplanes import row_stride

__all__ = [
    "BitplaneLinear",
    "BitplaneLogits",
    "FloatLinear",
    "Index",
    "Linear",
    "LinearFactory",
    "Part",
    "SplitLinear",
    "Stored",
    "apart",
    "fused",
]

# For each place, which row or column of the checkpoint's tensor stands there; -1 for zeros. None: all, in order.
Index = tuple[int, ...] | None


class Stored(nn.Parameter):
    """A parameter that is copied from the checkpoint without quantization.

    `sources` are names of checkpoint tensors, relative to the module, to be stacked along a new first axis when there
    are several; by default the parameter's own name. `columns` selects along the last axis. To what the checkpoint has
    `offset` is added, and the sum is multiplied by `scale`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        dtype: ir.DataType = ir.DataType.FLOAT,
        sources: tuple[str, ...] | None = None,
        columns: Index = None,
        offset: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__(shape, dtype=dtype)
        self.sources = sources
        self.columns = columns
        self.offset = offset
        self.scale = scale


@dataclass(frozen=True)
class Part:
    """Rows of a merged layer that come from one layer of the checkpoint.

    Attributes:
        name: the checkpoint's layer, relative to the module that holds the merged one (``q_proj``).
        rows: rows of the checkpoint's weight.
        index: which of them are taken.
        scale: what they and their bias are multiplied by.
    """

    name: str
    rows: int
    index: Index = None
    scale: float = 1.0

    @property
    def out_rows(self) -> int:
        """Rows it contributes."""
        return self.rows if self.index is None else len(self.index)


class Linear(nn.Module):
    """``y = x Wᵀ + b``: ``[B, S, K] → [B, S, N]``, the rows of W stacked from one or more layers of the checkpoint.

    Layers that share an input are merged: codes are per row, so it costs nothing and halves the number of operators.
    `columns` selects columns of the checkpoint's weight, where the input is laid out differently.

    The names of its parts are relative to the module that it belongs to, `depth` levels up.
    """

    def __init__(self, parts: Sequence[Part], in_features: int, *, bias: bool, columns: Index = None) -> None:
        super().__init__()
        self.depth = 1
        self.parts = tuple(parts)
        self.source_features = in_features
        self.in_features = in_features if columns is None else len(columns)
        self.out_features = sum(part.out_rows for part in parts)
        self.columns = columns
        self.has_bias = bias


class LinearFactory(Protocol):
    """Makes the linear layers of a network; what it makes decides what kind of graph comes out."""

    def __call__(
        self, parts: Sequence[Part], in_features: int, *, bias: bool, columns: Index = None
    ) -> Linear | SplitLinear:
        """Return a layer."""
        ...


class SplitLinear(nn.Module):
    """Linear layers of one input with their outputs side by side: what one merged layer would be, in several products.

    They are named after their parts: ``qk_proj`` of ``q_proj`` and ``k_proj``.
    """

    def __init__(self, pieces: Sequence[Linear]) -> None:
        super().__init__()
        self.names = []
        for piece in pieces:
            piece.depth += 1
            self.names.append("".join(part.name.removesuffix("_proj") for part in piece.parts) + "_proj")
            setattr(self, self.names[-1], piece)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Add the operators of all, and one that joins what they give."""
        return op.Concat(*(getattr(self, name)(op, x) for name in self.names), axis=-1)  # type: ignore[no-any-return]


def apart(linear: Callable[..., Linear], names: Collection[str]) -> LinearFactory:
    """Return a factory that does not merge layers of some names with others.

    Layers that the checkpoint holds stacked stay so: `fused` names them anew.
    """

    def make(parts: Sequence[Part], in_features: int, *, bias: bool, columns: Index = None) -> Linear | SplitLinear:
        runs = [list(run) for _, run in groupby(parts, key=lambda part: part.name in names)]
        pieces = [linear(run, in_features, bias=bias, columns=columns) for run in runs]
        return pieces[0] if len(pieces) == 1 else SplitLinear(pieces)

    return make


def fused(linear: LinearFactory, names: Mapping[tuple[str, ...], str]) -> LinearFactory:
    """Return a factory of layers for checkpoints that hold some of them stacked already.

    Args:
        linear: makes the layers.
        names: what the checkpoint calls a stack, by the names of the layers that it is made of.
    """

    def make(parts: Sequence[Part], in_features: int, *, bias: bool, columns: Index = None) -> Linear | SplitLinear:
        name = names.get(tuple(part.name for part in parts))
        return linear(parts if name is None else [_stack(name, parts)], in_features, bias=bias, columns=columns)

    return make


def _stack(name: str, parts: Sequence[Part]) -> Part:
    """Return the part of a merged layer that one layer of the checkpoint gives, which holds all of `parts` in turn."""
    (scale,) = {part.scale for part in parts}
    rows, index = 0, list[int]()
    for part in parts:
        index += [-1 if row < 0 else rows + row for row in part.index or range(part.rows)]
        rows += part.rows
    return Part(name, rows, None if all(part.index is None for part in parts) else tuple(index), scale)


class BitplaneLinear(Linear):
    """A linear layer over nested bit-planes: one ``pmpd::BitplaneMatMul``.

    A `nested` layer holds `parent` planes in the bundle and takes the first `precision` of them; the others (the head)
    have one precision, whatever the graph's.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        in_features: int,
        *,
        bias: bool,
        columns: Index = None,
        precision: int,
        groups: int = 1,
        nested: bool = True,
    ) -> None:
        super().__init__(parts, in_features, bias=bias, columns=columns)
        self.groups = groups
        self.nested = nested
        self.read(precision)
        self.bias = nn.Parameter([self.out_features]) if bias else None

    def read(self, precision: int) -> None:
        """Take so many planes, and the codebook for them; before any graph has the layer."""
        N, K = self.out_features, self.in_features
        self.precision = precision
        self.planes = nn.Parameter([precision, N, row_stride(K)], dtype=ir.DataType.UINT8)
        codes = [N, self.groups, 2**precision]
        self.codebook = nn.Parameter(codes, dtype=ir.DataType.FLOAT16, name=f"codebook.{precision}")

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Add the operator."""
        return op.BitplaneMatMul(  # type: ignore[no-any-return]  # (B, S, N)
            x, self.planes, self.codebook, self.bias, K=self.in_features, _domain=PMPD_DOMAIN
        )

    def rows(self, op: Any, ids: ir.Value) -> ir.Value:
        """Add a ``pmpd::BitplaneGather`` of rows of the weight: ``ids [B, S] → [B, S, K]``."""
        return op.BitplaneGather(  # type: ignore[no-any-return]
            ids, self.planes, self.codebook, K=self.in_features, _domain=PMPD_DOMAIN
        )


class BitplaneLogits(BitplaneLinear):
    """An output layer that is computed coarse to fine: one ``pmpd::BitplaneLogits``.

    Its first `coarse` planes have a codebook of their own; `basis` and `bound` limit what the others change.
    """

    DIRECTIONS = 64

    def __init__(
        self,
        parts: Sequence[Part],
        in_features: int,
        *,
        bias: bool,
        columns: Index = None,
        precision: int,
        coarse: int,
    ) -> None:
        super().__init__(parts, in_features, bias=bias, columns=columns, precision=precision, nested=False)
        N, K = self.out_features, self.in_features
        self.coarse = coarse
        directions = min(self.DIRECTIONS, K)
        groups = 2 + math.ceil(math.log(directions, 4))
        self.coarse_codebook = nn.Parameter([N, 1, 2**coarse], dtype=ir.DataType.FLOAT16, name=f"codebook.{coarse}")
        self.basis = nn.Parameter([directions, K])
        self.bound = nn.Parameter([groups, N], dtype=ir.DataType.FLOAT16)
        self.margin = nn.Parameter([1], name=MARGIN)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Add the operator."""
        weights = self.planes, self.codebook, self.coarse_codebook, self.basis, self.bound
        return op.BitplaneLogits(  # type: ignore[no-any-return]  # (B, S, N)
            x, *weights, self.margin, self.bias, K=self.in_features, _domain=PMPD_DOMAIN
        )


class FloatLinear(Linear):
    """A linear layer over the checkpoint's own tensors, in their own type, computed in float32."""

    def __init__(
        self, parts: Sequence[Part], in_features: int, *, bias: bool, columns: Index = None, dtype: ir.DataType
    ) -> None:
        super().__init__(parts, in_features, bias=bias, columns=columns)
        for part in self.parts:
            name = part.name.replace(".", "_")
            setattr(
                self, f"{name}_weight", Stored([part.rows, in_features], dtype=dtype, sources=(f"{part.name}.weight",))
            )
            if bias:
                setattr(self, f"{name}_bias", Stored([part.rows], dtype=dtype, sources=(f"{part.name}.bias",)))

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Add the operators: cast, select, stack, multiply."""

        def stacked(kind: str) -> ir.Value:
            pieces = []
            for part in self.parts:
                value = op.Cast(getattr(self, f"{part.name.replace('.', '_')}_{kind}"), to=ir.DataType.FLOAT)
                if part.scale != 1.0:
                    value = op.Mul(value, part.scale)
                pieces.append(_select(op, value, part.index, size=part.rows, axis=0))
            return pieces[0] if len(pieces) == 1 else op.Concat(*pieces, axis=0)

        weight = _select(op, stacked("weight"), self.columns, size=self.source_features, axis=1)
        y = op.FusedMatMul(x, weight, transB=1, _domain="com.microsoft")  # (B, S, N)
        return op.Add(y, stacked("bias")) if self.has_bias else y  # type: ignore[no-any-return]


def _select(op: Any, value: ir.Value, index: Index, *, size: int, axis: int) -> ir.Value:
    """Take rows or columns by index, -1 meaning zeros: a slice of zeros is put behind the last one."""
    if index is None:
        return value
    behind = [0, 1] if value.shape is None or len(value.shape) == 1 else [0, 0, 0, 0]
    behind[len(behind) // 2 + axis] = 1
    padded = op.Pad(value, behind)
    return op.Gather(padded, [size if i < 0 else i for i in index], axis=axis)  # type: ignore[no-any-return]
