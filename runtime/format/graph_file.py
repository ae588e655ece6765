"""An ONNX file as far as its weights go, and whether it agrees with the manifest.

ONNX Runtime takes the weights of a session from us and does not compare them with the graph: a tensor that the
manifest gives another type or shape than the graph would be read beyond its end. So `check_graph` comes before every
session.
The file is read without the package `onnx`, as the runtime does not depend on it.

What ONNX calls an initializer is a named constant of a graph (onnx.proto, ``GraphProto.initializer``): its elements
stand in the ONNX file, or in an external file that it names with an offset and a length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pmpd.runtime.errors import BundleError
from pmpd.runtime.format.manifest import Graph, Manifest
from pmpd.runtime.format.protobuf import read_fields, read_varints
from pmpd.runtime.format.tensor import Tensor

__all__ = ["External", "GraphFile", "Initializer", "check_graph", "read_graph_file"]

# onnx.proto, TensorProto.DataType: the types that a bundle's tensors have, and others by number.
_DTYPES = {1: "float32", 2: "uint8", 7: "int64", 10: "float16"}
_MAX_FIELDS = 1_000_000  # a graph of 40 layers has 30,000
_MAX_DEPTH = 16  # of graphs inside nodes (Loop, If)


@dataclass(frozen=True)
class External:
    """Where the elements of an initializer lie: a file beside the ONNX file, and bytes of it."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Initializer:
    """A named constant of the main graph; `external` is None if its elements stand in the ONNX file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    external: External | None


@dataclass
class GraphFile:
    """What an ONNX file defines by name.

    Attributes:
        initializers: the constants of the main graph.
        others: every other name that a graph in the file gives to a value: outputs of nodes, and the constants and
            inputs of graphs inside nodes and functions.
    """

    initializers: dict[str, Initializer] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)


def read_graph_file(data: bytes, path: Path) -> GraphFile:
    """Read the bytes of an ONNX file; `path` is what messages call it.

    Raises:
        BundleError: the bytes are not an ONNX model, or it has constants that this reader does not understand.
    """
    try:
        return _Reader().model(memoryview(data))
    except ValueError as error:
        raise BundleError(f"{path} is not an ONNX model of a bundle ({error}): export the model again") from None


def check_graph(manifest: Manifest, graph: Graph, path: Path) -> None:
    """Check that the ONNX file at `path` reads the tensors that the manifest lists for `graph`, and no others.

    Bounds and coarse codebooks may be left out: a graph that computes all logits alike has no use for them.

    Raises:
        BundleError: a tensor is missing in the file or in the manifest, or they differ in its type, its shape or its
            place in the weight file; or the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}): copy the bundle again") from None
    content = read_graph_file(data, path)
    listed = {tensor.name: tensor for tensor in manifest.tensors}
    wanted = {
        tensor.name: _initializer(tensor, manifest.shape_at(tensor, graph.precision))
        for tensor in manifest.tensors_at(graph.precision)
    }
    for name in sorted(listed.keys() & content.others):
        raise _disagreement(path, name, "an initializer of bundle.json and another value of the graph have this name")
    for name, initializer in content.initializers.items():
        if name in wanted:
            if initializer != wanted[name]:
                raise _disagreement(
                    path, name, f"{_text(initializer)} in the graph, {_text(wanted[name])} in bundle.json"
                )
        elif initializer.external is not None or name in listed:
            raise _disagreement(path, name, f"bundle.json lists no such tensor for {graph.precision} bits")
    for name in wanted.keys() - content.initializers.keys() - manifest.optional_tensors:
        raise _disagreement(path, name, "the graph does not read it")


def _initializer(tensor: Tensor, shape: tuple[int, ...]) -> Initializer:
    """Return a tensor as a graph that reads `shape` of it has to name it."""
    length = tensor.length // tensor.shape[0] * shape[0]
    return Initializer(tensor.name, tensor.dtype, shape, External(tensor.file, tensor.offset, length))


def _text(initializer: Initializer) -> str:
    external = initializer.external
    place = f"at byte {external.offset} of {external.file!r:.60}" if external else "inside the ONNX file"
    return f"{initializer.dtype} {list(initializer.shape)!s:.60} {place}"


def _disagreement(path: Path, name: str, reason: str) -> BundleError:
    return BundleError(
        f"{path} and bundle.json disagree about tensor {name!r:.80}: {reason}; the bundle is damaged, export again"
    )


Fields = Mapping[int, list[int | memoryview]]


class _Reader:
    """Walks the messages of an ONNX file. Field numbers are those of onnx.proto."""

    def __init__(self) -> None:
        self.file = GraphFile()
        self.count = 0

    def model(self, message: memoryview) -> GraphFile:
        fields = self.fields(message)
        graphs = fields.get(7, [])
        if len(graphs) != 1:  # protobuf would merge several
            raise ValueError(f"it has {len(graphs)} graphs")
        self.graph(_bytes(graphs[0]), depth=0)
        for function in fields.get(25, []):
            for node in self.fields(_bytes(function)).get(7, []):
                self.node(_bytes(node), depth=1)
        return self.file

    def graph(self, message: memoryview, *, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("its graphs are nested too deeply")
        fields = self.fields(message)
        if 15 in fields:
            raise ValueError("it has sparse initializers")
        for tensor in fields.get(5, []):
            initializer = self.initializer(_bytes(tensor))
            if depth:
                if initializer.external is not None:
                    raise ValueError(f"the constant {initializer.name!r:.60} of a nested graph is external")
                self.file.others.add(initializer.name)
            elif initializer.name in self.file.initializers:
                raise ValueError(f"it has two initializers {initializer.name!r:.60}")
            else:
                self.file.initializers[initializer.name] = initializer
        if depth:  # inputs of the main graph may repeat its initializers
            for value in fields.get(11, []):
                self.file.others.update(map(_string, self.fields(_bytes(value)).get(1, [])))
        for node in fields.get(1, []):
            self.node(_bytes(node), depth=depth)

    def node(self, message: memoryview, *, depth: int) -> None:
        fields = self.fields(message)
        for number in (1, 3, 4, 7):  # inputs, name, operator, domain: messages and reports of kernels quote them
            for text in fields.get(number, []):
                _string(text)
        self.file.others.update(map(_string, fields.get(2, [])))
        for attribute in fields.get(5, []):
            values = self.fields(_bytes(attribute))
            _string(_single(values, 1, default=memoryview(b"")))
            for graph in (*values.get(6, []), *values.get(11, [])):
                self.graph(_bytes(graph), depth=depth + 1)

    def initializer(self, message: memoryview) -> Initializer:
        fields = self.fields(message)
        dims: list[int] = []
        for value in fields.get(1, []):  # one by one, or packed
            dims += [value] if isinstance(value, int) else read_varints(value)
        number = _single(fields, 2, default=0)
        location = _single(fields, 14, default=0)
        name = _string(_single(fields, 8, default=memoryview(b"")))
        if not isinstance(number, int) or not name:
            raise ValueError("it has an initializer without name or type")
        dtype = _DTYPES.get(number, f"type {number}")
        if location not in (0, 1) or (location == 0 and 13 in fields):
            raise ValueError(f"the initializer {name!r:.60} is neither external nor in the file")
        return Initializer(name, dtype, tuple(dims), self.external(fields) if location else None)

    def external(self, fields: Fields) -> External:
        entries: dict[str, str] = {}
        for entry in fields.get(13, []):
            pair = self.fields(_bytes(entry))
            key = _string(_single(pair, 1, default=memoryview(b"")))
            if key in entries:
                raise ValueError(f"external data with two {key!r:.60}")
            entries[key] = _string(_single(pair, 2, default=memoryview(b"")))
        offset, length = (entries.get(key, "") for key in ("offset", "length"))
        if not all(text.isascii() and text.isdecimal() and len(text) < 20 for text in (offset, length)):
            raise ValueError("external data without offset or length")
        return External(entries.get("location", ""), int(offset), int(length))

    def fields(self, message: memoryview) -> Fields:
        """Return the values of a message's fields by number, in order."""
        fields: dict[int, list[int | memoryview]] = {}
        for number, value in read_fields(message):
            fields.setdefault(number, []).append(value)
            self.count += 1
            if self.count > _MAX_FIELDS:
                raise ValueError(f"it has more than {_MAX_FIELDS:,} fields")
        return fields


def _single(fields: Fields, number: int, *, default: int | memoryview) -> int | memoryview:
    values = fields.get(number, [default])
    if len(values) > 1:  # protobuf would take the last one
        raise ValueError(f"field {number} appears {len(values)} times")
    return values[0]


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message or a text belongs")
    return value


def _string(value: int | memoryview) -> str:
    return str(_bytes(value), "utf-8")
