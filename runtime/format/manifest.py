"""`bundle.json`: what a bundle holds, as frozen dataclasses that check themselves when they are read.

A reader MUST refuse a manifest whose ``format`` or ``version`` it does not know, a file name that leaves the bundle,
and a tensor that lies outside its file. Everything an application needs is here; ONNX files are not parsed.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import PurePosixPath
from typing import Any, Self

from pmpd.runtime.errors import BundleError, unknown_choice

__all__ = [
    "ACCURACIES",
    "Architecture",
    "FileEntry",
    "Graph",
    "KvContract",
    "Manifest",
    "Source",
    "Tensor",
    "contained_name",
]

FORMAT = "pmpd-bundle"
VERSION = 1
MANIFEST_NAME = "bundle.json"
DTYPE_SIZES = {"uint8": 1, "float16": 2, "float32": 4, "int64": 8}
# How kernels compute: `exact` in float; `int8` with codebook entries and activations rounded to 8 bits.
ACCURACIES = ("exact", "int8")


def contained_name(name: str) -> str:
    """Return `name` if it is a plain relative path inside a bundle.

    Raises:
        BundleError: the name is absolute, empty, has control characters, or climbs out of the bundle.
    """
    path = PurePosixPath(name)
    plain = name.isprintable() and not {"\\", ":"} & set(name) and str(path) == name != "."
    if not plain or path.is_absolute() or ".." in path.parts:
        raise BundleError(f"bundle.json names the file {name!r}, which lies outside the bundle: do not use this bundle")
    return name


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights came from: hub id, alias or folder as the user gave it; revision and licence when known."""

    model: str
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of the transformer, for planning memory and for tools that read bundles."""

    family: str
    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    parameters: int

    def __post_init__(self) -> None:
        _check_positive(self)


@dataclass(frozen=True, kw_only=True)
class KvContract:
    """One key and one value buffer per layer: `dtype` ``[1, heads, positions, head_dim]``, past and present the same.

    ``past`` and ``present`` are the graphs' input and output names, with ``{layer}`` and ``{part}`` (key or value).
    """

    layers: int
    heads: int
    head_dim: int
    dtype: str = "float32"
    past: str = "past_key_values.{layer}.{part}"
    present: str = "present.{layer}.{part}"

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.dtype not in DTYPE_SIZES:
            raise BundleError(f"KvContract has the unknown type {self.dtype!r}: choose of {list(DTYPE_SIZES)}")
        try:
            self.past.format(layer=0, part="key"), self.present.format(layer=0, part="key")
        except (ValueError, LookupError, AttributeError):
            raise BundleError(
                f"KvContract names buffers {self.past!r} and {self.present!r}: only {{layer}} and {{part}} may vary"
            ) from None


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One ONNX graph: ``prefill`` gives the logits of the last position, ``decode`` those of every position."""

    file: str
    phase: str
    precision: int


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where one initializer lies. Of a `nested` one, planes ``[P, N, S]``, a p-bit graph takes the first p."""

    name: str
    file: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]
    nested: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_SIZES:
            raise BundleError(
                f"tensor {self.name!r} has the unknown type {self.dtype!r}: choose of {list(DTYPE_SIZES)}"
            )
        want = math.prod(self.shape) * DTYPE_SIZES[self.dtype]
        if self.offset < 0 or self.length != want or min(self.shape, default=1) < 1:
            raise BundleError(
                f"tensor {self.name!r} claims {self.length} bytes at {self.offset}, "
                f"but {self.dtype} {list(self.shape)} takes {want}: export the model again"
            )


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of `bundle.json`.

    `kernels` names the operator library of each target that the bundle has one for; they compute at `accuracy`.
    A `skeleton` has graphs and tensor table as any bundle, and none of the files that the tensors lie in: it can be
    studied and not run.
    """

    producer: str
    source: Source
    architecture: Architecture
    context_length: int
    precisions: tuple[int, ...]
    parent_precision: int
    prefill_precision: int
    schedule: str
    kv_cache: KvContract
    graphs: tuple[Graph, ...]
    tensors: tuple[Tensor, ...]
    files: dict[str, FileEntry]
    configuration: dict[str, Any]
    verification: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    accuracy: str = "exact"
    skeleton: bool = False

    def __post_init__(self) -> None:
        if not self.precisions or list(self.precisions) != sorted(set(self.precisions), reverse=True):
            raise BundleError(f"precisions must fall from high to low without repeats, got {list(self.precisions)}")
        if self.context_length < 1:
            raise BundleError(f"context length must be 1 or more, got {self.context_length}: export the model again")
        for name in self.files:
            contained_name(name)
        weights = {contained_name(tensor.file) for tensor in self.tensors}
        if self.skeleton and (listed := sorted(weights & self.files.keys())):
            raise BundleError(f"bundle.json is of a skeleton but lists {listed[0]!r}: export the model again")
        named = (*(graph.file for graph in self.graphs), *self.kernels.values(), *(() if self.skeleton else weights))
        for file in named:
            if contained_name(file) not in self.files:
                raise BundleError(f"bundle.json refers to {file!r} but does not list it: export the model again")
        for tensor in () if self.skeleton else self.tensors:
            if tensor.offset + tensor.length > self.files[tensor.file].size:
                raise BundleError(
                    f"tensor {tensor.name!r} ends at byte {tensor.offset + tensor.length} of {tensor.file}, "
                    f"which has {self.files[tensor.file].size}: export the model again"
                )
        if self.accuracy not in ACCURACIES:
            raise BundleError(f"bundle.json: {unknown_choice('accuracy', self.accuracy, ACCURACIES)}")
        self.graph("prefill", self.prefill_precision)
        for precision in self.precisions:
            self.graph("decode", precision)

    def graph(self, phase: str, precision: int) -> Graph:
        """Return the graph of a phase and precision, or raise BundleError."""
        for graph in self.graphs:
            if (graph.phase, graph.precision) == (phase, precision):
                return graph
        raise BundleError(f"the bundle has no {phase} graph at {precision} bits: it has {list(self.precisions)}")

    def to_json(self) -> str:
        """Return the text of `bundle.json`."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        if not self.skeleton:
            del document["skeleton"]  # runtimes that do not know the field read every bundle that they can run
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of `bundle.json`.

        Raises:
            BundleError: it is no JSON, of another format or version, or a field is missing, mistyped or inconsistent.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"bundle.json is not valid JSON ({error}): the bundle is damaged, export again") from None
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise BundleError(f"bundle.json does not say format {FORMAT!r}: this is not a PMPD bundle")
        version = document.pop("version", None)
        if version != VERSION:
            raise BundleError(
                f"bundle.json has version {version!r}, this runtime reads version {VERSION}: "
                "upgrade pmpd, or export the model with this version"
            )
        manifest: Self = _read(cls, document, "bundle.json")
        return manifest


def _check_positive(value: Architecture | KvContract) -> None:
    for name, number in asdict(value).items():
        if isinstance(number, int) and number < 1:
            raise BundleError(f"{type(value).__name__}: {name} must be 1 or more, got {number}: export the model again")


def _read(kind: Any, value: Any, where: str) -> Any:
    """Build a value of the annotated type `kind` from parsed JSON, naming the place of whatever does not fit."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType:  # X | None
        return None if value is None else _read(args[0], value, where)
    if is_dataclass(kind):
        _expect(value, dict, where)
        hints = typing.get_type_hints(kind)
        known = {f.name for f in fields(kind)}
        if unknown := sorted(value.keys() - known):
            raise BundleError(f"{where} has the unknown field {unknown[0]!r}: upgrade pmpd, or export again")
        values = {name: _read(hints[name], item, f"{where}: {name}") for name, item in value.items()}
        try:
            return kind(**values)  # type: ignore[operator]
        except TypeError as error:
            raise BundleError(f"{where} is incomplete ({error}): the bundle is damaged, export again") from None
    if origin is tuple:
        _expect(value, list, where)
        return tuple(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping):
        _expect(value, dict, where)
        return {name: _read(args[1], item, f"{where}: {name}") for name, item in value.items()}
    _expect(value, kind, where)
    return value


def _expect(value: Any, kind: type, where: str) -> None:
    if type(value) is not kind:
        raise BundleError(f"{where} must be {kind.__name__}, got {value!r:.60}: the bundle is damaged, export again")
