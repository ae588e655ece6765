"""An exported graph as the lowering reads it: nodes in order, and what each initializer takes of the weight file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pmpd.runtime.errors import BundleError, MissingExtraError

if TYPE_CHECKING:
    import onnx

__all__ = ["LOGITS", "Initializer", "Node", "OnnxGraph", "read_graph"]


LOGITS = "logits"  # what the output layer makes
_PRODUCTS = ("pmpd::BitplaneMatMul", "pmpd::BitplaneLogits")


@dataclass(frozen=True)
class Initializer:
    """A constant of the graph. `nbytes` is what it references in ``weights.bin``; whole numbers in it have `values`."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    values: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Node:
    """One operator: ``domain::op_type`` outside of the standard domain. Absent optional inputs are empty names."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class OnnxGraph:
    """The nodes of one ONNX file, in the order they run, its initializers by name, and its inputs."""

    path: Path
    nodes: tuple[Node, ...]
    initializers: Mapping[str, Initializer]
    inputs: tuple[str, ...]

    @cached_property
    def output_layer(self) -> tuple[Node, ...]:
        """The product that gives the logits and a softcap behind it, last first; empty if the host computes them."""
        nodes: list[Node] = []
        wanted = LOGITS
        for node in reversed(self.nodes):
            if wanted in node.outputs:
                nodes.append(node)
                if node.op in _PRODUCTS:
                    break
                wanted = node.inputs[0]
        return tuple(nodes)

    def without_output_layer(self) -> OnnxGraph:
        """Return the graph without its output layer."""
        return replace(self, nodes=tuple(node for node in self.nodes if node not in self.output_layer))


def read_graph(path: Path) -> OnnxGraph:
    """Read an ONNX file without its weights, which need not exist.

    Raises:
        BundleError: the file is not an ONNX model.
        MissingExtraError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise MissingExtraError("onnx", "npu") from None
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's own errors have no common base
        raise BundleError(f"{path} is not an ONNX model ({error}): export again") from None
    return OnnxGraph(
        path=path,
        nodes=tuple(_node(node, number) for number, node in enumerate(graph.node)),
        initializers={tensor.name: _initializer(tensor) for tensor in graph.initializer},
        inputs=tuple(value.name for value in graph.input),
    )


def _node(node: onnx.NodeProto, number: int) -> Node:
    from onnx.helper import get_attribute_value

    op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    attributes = {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}
    return Node(node.name or f"node {number} ({op})", op, tuple(node.input), tuple(node.output), attributes)


def _initializer(tensor: onnx.TensorProto) -> Initializer:
    from onnx.numpy_helper import to_array

    external = {entry.key: entry.value for entry in tensor.external_data}
    shape = tuple(tensor.dims)
    if external:
        return Initializer(tensor.name, shape, int(external["length"]))
    array = to_array(tensor)
    values = tuple(int(value) for value in np.ravel(array)) if array.dtype.kind in "iu" else None
    return Initializer(tensor.name, shape, 0, values)
