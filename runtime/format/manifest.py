"""`bundle.json`: what a bundle holds, as frozen dataclasses that check themselves when they are read.

A reader MUST refuse a manifest whose ``format`` or ``version`` it does not know, a file name that leaves the bundle,
and a tensor that lies outside its file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Self

from pmpd.runtime.errors import BundleError, unknown_choice
from pmpd.runtime.format.tensor import DTYPE_SIZES, Tensor, check_tensors
from pmpd.runtime.format.typed_json import build, parse_object
from pmpd.runtime.format.version1 import upgrade

__all__ = [
    "ACCURACIES",
    "DTYPE_SIZES",
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
VERSION = 2
MANIFEST_NAME = "bundle.json"
# How kernels compute: `exact` in float; `int8` with codebook entries and activations rounded to 8 bits.
ACCURACIES = ("exact", "int8")
PHASES = ("prefill", "decode")
ACTIVATIONS = ("float32", "float16")
DEVICES = ("cpu", "cuda")


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
    """One ONNX graph: ``prefill`` gives the logits of the last position, ``decode`` those of every position.

    Attributes:
        file: its file in the bundle.
        phase: ``prefill`` or ``decode``.
        precision: bits that it reads of every nested layer.
        activations: data type of activations and logits.
        device: where it runs; a graph for one device need not run on another.
    """

    file: str
    phase: str
    precision: int
    activations: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for what, value, choices in (
            ("phase", self.phase, PHASES),
            ("activation type", self.activations, ACTIVATIONS),
            ("device", self.device, DEVICES),
        ):
            if value not in choices:
                raise BundleError(f"graph {self.file!r}: {unknown_choice(what, value, choices)}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of `bundle.json`.

    Attributes:
        producer: the program that wrote the bundle, and its version.
        source: where the weights came from.
        architecture: the shape of the transformer.
        context_length: the longest text in tokens.
        precisions: bits that the bundle decodes at, high to low.
        parent_precision: bits of the nested codes.
        prefill_precision: bits that a prompt is read at.
        schedules: precision-switching schedules by name, as text (``static:3@16,2@32``).
        default_schedule: the name of the one that is used unless another is asked for.
        kv_cache: the key and value buffers.
        graphs: the ONNX graphs: prefill, and decode at every precision.
        tensors: what lies in the weight files.
        files: every file of the bundle except ``bundle.json``.
        configuration: the options of the export.
        verified: whether the export's checks passed; False as well where they were skipped.
        verification: what the checks measured.
        kernels: the file of the operator library for each target that the bundle has one for.
        accuracy: how these kernels compute by default, one of `ACCURACIES`.
        skeleton: a skeleton has the graphs and the tensor table of a bundle without the weight files: it can be studied
            but not run.
    """

    producer: str
    source: Source
    architecture: Architecture
    context_length: int
    precisions: tuple[int, ...]
    parent_precision: int
    prefill_precision: int
    schedules: dict[str, str]
    default_schedule: str
    kv_cache: KvContract
    graphs: tuple[Graph, ...]
    tensors: tuple[Tensor, ...]
    files: dict[str, FileEntry]
    configuration: dict[str, Any]
    verified: bool = False
    verification: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    accuracy: str = "exact"
    skeleton: bool = False

    def __post_init__(self) -> None:
        if not self.precisions or list(self.precisions) != sorted(set(self.precisions), reverse=True):
            raise BundleError(f"precisions must fall from high to low without repeats, got {list(self.precisions)}")
        if self.context_length < 1:
            raise BundleError(f"context length must be 1 or more, got {self.context_length}: export the model again")
        if self.accuracy not in ACCURACIES:
            raise BundleError(f"bundle.json: {unknown_choice('accuracy', self.accuracy, ACCURACIES)}")
        if self.default_schedule not in self.schedules:
            raise BundleError(
                f"bundle.json: {unknown_choice('default schedule', self.default_schedule, self.schedules)}"
            )
        self._check_files()
        self._check_graphs()
        check_tensors(self.tensors, self.precisions)

    def _check_files(self) -> None:
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

    def _check_graphs(self) -> None:
        kinds = [(graph.device, graph.phase, graph.precision) for graph in self.graphs]
        if len(set(kinds)) != len(kinds):
            raise BundleError("bundle.json lists two graphs of one device, phase and precision: export the model again")
        for device in {graph.device for graph in self.graphs} or {"cpu"}:
            self.graph("prefill", self.prefill_precision, device=device)
            for precision in self.precisions:
                self.graph("decode", precision, device=device)

    @property
    def schedule(self) -> str:
        """The text of the default schedule."""
        return self.schedules[self.default_schedule]

    def graph(self, phase: str, precision: int, *, device: str = "cpu") -> Graph:
        """Return the graph of a phase and precision, or raise BundleError."""
        for graph in self.graphs:
            if (graph.phase, graph.precision, graph.device) == (phase, precision, device):
                return graph
        raise BundleError(
            f"the bundle has no {phase} graph at {precision} bits for {device}: it has {list(self.precisions)}"
        )

    def tensors_at(self, precision: int) -> tuple[Tensor, ...]:
        """Return the tensors that a graph of some precision reads: all but the codebooks of other precisions."""
        nested = {tensor.layer for tensor in self.tensors if tensor.nested}
        return tuple(
            tensor
            for tensor in self.tensors
            if tensor.role != "codebook" or tensor.layer not in nested or tensor.bits == precision
        )

    def to_json(self) -> str:
        """Return the text of `bundle.json`, in the newest version."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of `bundle.json`, of version 1 or 2.

        Raises:
            BundleError: it is not JSON, of another format or version, or a field is missing, mistyped or inconsistent.
        """
        document = parse_object(text, "bundle.json")
        if document.pop("format", None) != FORMAT:
            raise BundleError(f"bundle.json does not say format {FORMAT!r}: this is not a PMPD bundle")
        version = document.pop("version", None)
        if type(version) is not int or not 1 <= version <= VERSION:
            raise BundleError(
                f"bundle.json has version {version!r:.60}, this runtime reads versions 1 to {VERSION}: "
                "upgrade pmpd, or export the model with this version"
            )
        manifest: Self = build(cls, upgrade(document) if version == 1 else document, "bundle.json")
        return manifest


def _check_positive(value: Architecture | KvContract) -> None:
    for name, number in asdict(value).items():
        if isinstance(number, int) and number < 1:
            raise BundleError(f"{type(value).__name__}: {name} must be 1 or more, got {number}: export the model again")
