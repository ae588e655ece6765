"""Layers of the checkpoint and layers of the bundle: which tensors a merged layer is made of, and how.

A network's linear layers stack rows of several layers of the checkpoint (q, k and v; gate and up), and may select or
reorder rows and columns. Everything that converts between the two is here.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.nn import BitplaneLinear, Index, Linear, Stored
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.bitplanes import pack

if TYPE_CHECKING:
    from pmpd.exporter.quantize import NestedCodes
    from pmpd.exporter.source.checkpoint import Checkpoint

__all__ = ["LinearLayer", "checkpoint_scope", "checkpoint_shapes", "parent_scope", "plain_tensors", "select_both"]

Places = slice | npt.NDArray[np.intp]


@dataclass(frozen=True)
class LinearLayer:
    """One quantized layer: how it is put together from the checkpoint.

    Attributes:
        name: its name in the network.
        module: the network's module.
        parent: bits of its codes.
        precisions: those that the bundle has codebooks for, high to low.
    """

    name: str
    module: BitplaneLinear
    parent: int
    precisions: tuple[int, ...]

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The checkpoint's weights whose rows it stacks."""
        scope = checkpoint_scope(self.name, self.module)
        return tuple(f"{scope}{part.name}.weight" for part in self.module.parts)

    def part_weight(self, part: int, tensor: Any) -> npt.NDArray[np.float32]:
        """Return the rows that one part contributes, of the checkpoint's weight: float32 ``[n, K]``."""
        weight, scale = self.select(part, _to_numpy(tensor)), self.module.parts[part].scale
        return weight if scale == 1.0 else weight * np.float32(scale)

    def select(self, part: int, matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Take the rows and columns of a part from a matrix of the shape of the checkpoint's weight."""
        return _select(_select(matrix, self.module.parts[part].index, axis=0), self.module.columns, axis=1)

    def places(self, part: int) -> tuple[Places, Places]:
        """Return where the merged matrix holds the rows and the columns of a part's weight in the checkpoint."""
        module = self.module
        columns: Places = slice(None)
        if module.columns is not None:
            columns = _inverse(module.columns, module.source_features)
        first, rows = sum(before.out_rows for before in module.parts[:part]), module.parts[part]
        if rows.index is None:
            return slice(first, first + rows.out_rows), columns
        return first + _inverse(rows.index, rows.rows), columns

    def unstack(self, weight: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
        """Return the checkpoint's tensors that a merged matrix ``[N, K]`` stands for: the inverse of `part_weight`."""
        tensors = {}
        for part, name in enumerate(self.weight_names):
            (rows, columns), scale = self.places(part), self.module.parts[part].scale
            tensor = weight[rows][:, columns]
            tensors[name] = tensor if scale == 1.0 else tensor / np.float32(scale)
        return tensors

    def bias(self, checkpoint: Checkpoint) -> npt.NDArray[np.float32]:
        """Stack the biases: float32 ``[N]``."""
        scope = checkpoint_scope(self.name, self.module)
        return np.concatenate(
            [
                _select(_to_numpy(checkpoint.tensor(f"{scope}{part.name}.bias")), part.index, axis=0) * part.scale
                for part in self.module.parts
            ]
        )

    def tensors(self, quantized: NestedCodes, checkpoint: Checkpoint) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield the tensors of the quantized layer under their names in the graphs."""
        yield f"{self.name}.planes", pack(quantized.codes, self.parent)
        for precision in self.precisions:
            yield f"{self.name}.codebook.{precision}", quantized.codebooks[precision]
        if self.module.has_bias:
            yield f"{self.name}.bias", self.bias(checkpoint)


def checkpoint_shapes(network: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor that a network takes from its checkpoint, with the shape it must have there."""
    for scope, module in network.named_modules():
        if isinstance(module, Linear):
            parts = checkpoint_scope(scope, module)
            for part in module.parts:
                yield f"{parts}{part.name}.weight", (part.rows, module.source_features)
                if module.has_bias:
                    yield f"{parts}{part.name}.bias", (part.rows,)
        for name, parameter in module.named_parameters(prefix=scope, recurse=False):
            if isinstance(parameter, Stored):
                sources = parameter.sources or (name.removeprefix(f"{scope}."),)
                shape = tuple(parameter.shape) if len(sources) == 1 else tuple(parameter.shape)[1:]
                if parameter.columns is not None:
                    shape = (*shape[:-1], max(parameter.columns) + 1)
                yield from ((f"{scope}.{source}", shape) for source in sources)


def plain_tensors(
    network: nn.Module, checkpoint: Checkpoint, *, skip: Container[str] = ()
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the network's parameters that are not quantized: those of the checkpoint, and those computed (rotary)."""
    for scope, module in network.named_modules():
        for name, parameter in module.named_parameters(prefix=scope, recurse=False):
            if name in skip:
                continue
            if isinstance(parameter, Stored):
                sources = parameter.sources or (name.removeprefix(f"{scope}."),)
                arrays = [_to_numpy(checkpoint.tensor(f"{scope}.{source}"), parameter.dtype) for source in sources]
                array = arrays[0] if len(arrays) == 1 else np.stack(arrays)
                array = _select(array, parameter.columns, axis=-1).reshape(tuple(parameter.shape))
                if parameter.offset != 0.0:
                    array = array + np.float32(parameter.offset)
                if parameter.scale != 1.0:
                    array = array * np.float32(parameter.scale)
                if not np.isfinite(array).all():
                    place = np.argwhere(~np.isfinite(array))[0]
                    raise PmpdError(
                        f"tensor {name!r} {place.tolist()} is {array[tuple(place)]} in {array.dtype}: "
                        "check where the checkpoint comes from"
                    )
                yield name, array
            elif parameter.const_value is not None:
                yield name, parameter.const_value.numpy()


def checkpoint_scope(name: str, module: Linear) -> str:
    """Return what the checkpoint puts before the names of a layer's parts."""
    for _ in range(module.depth):
        scope = parent_scope(name)
        name = scope.removesuffix(".")
    return scope


def parent_scope(name: str) -> str:
    """Return what a module's name puts before those of its siblings: ``model.layers.0.`` of ``model.layers.0.mlp``."""
    parent = name.rpartition(".")[0]
    return f"{parent}." if parent else ""


def _to_numpy(tensor: Any, dtype: ir.DataType = ir.DataType.FLOAT) -> npt.NDArray[Any]:
    if isinstance(tensor, np.ndarray):
        return tensor
    import torch  # not at the top: a skeleton needs the plan alone, and no torch

    array: npt.NDArray[Any] = tensor.to(getattr(torch, dtype.numpy().name)).numpy()
    return array


def _select(array: npt.NDArray[Any], index: Index, *, axis: int) -> npt.NDArray[Any]:
    """Take along an axis by index; -1 gives zeros."""
    if index is None:
        return array
    taken = np.take(array, np.maximum(index, 0), axis=axis)
    np.moveaxis(taken, axis, 0)[np.asarray(index) < 0] = 0
    return taken


def select_both(matrix: npt.NDArray[Any], index: Index) -> npt.NDArray[Any]:
    """Take rows and columns of a square matrix by the same index; -1 gives zeros."""
    return matrix if index is None else _select(_select(matrix, index, axis=0), index, axis=1)


def _inverse(index: Sequence[int], size: int) -> npt.NDArray[np.intp]:
    """Return where each of `size` elements went when they were selected by an index."""
    places = np.asarray(index)
    back = np.empty(size, dtype=np.intp)
    back[places[places >= 0]] = np.flatnonzero(places >= 0)
    return back
