"""`bundle.json`: what a bundle holds, as frozen dataclasses that check themselves.

What a reader has to refuse is listed in README.md of this folder.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Self

from pmpd.runtime.errors import BundleError, one_line, unknown_choice
from pmpd.runtime.format.bitplanes import MAX_PRECISION
from pmpd.runtime.format.precision import check_mixes, is_precision, planes_read
from pmpd.runtime.format.quality import Quality
from pmpd.runtime.format.tensor import DTYPE_SIZES, Tensor, check_tensors, coarse_codebooks
from pmpd.runtime.format.typed_json import build, parse_object
from pmpd.runtime.format.version1 import upgrade as upgrade_1
from pmpd.runtime.format.version2 import upgrade as upgrade_2
from pmpd.runtime.format.version3 import upgrade as upgrade_3

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
VERSION = 4
MANIFEST_NAME = "bundle.json"
# How kernels compute: `exact` in float; `int8` with codebook entries and activations rounded to 8 bits.
ACCURACIES = ("exact", "int8")
PHASES = ("prefill", "decode")
ACTIVATIONS = ("float32", "float16")
_KV_DTYPES = ("float16", "float32")
DEVICES = ("cpu", "cuda")
_UPGRADES = (upgrade_1, upgrade_2, upgrade_3)  # from each version to the next
# A reader's memory and time must not depend on what a manifest claims. Each limit is far above any model of today.
MAX_MANIFEST_BYTES = 64 << 20  # one of 40 layers has 200 kB
MAX_HASHED_BYTES = 1 << 30  # of all files but weights, which are hashed at every opening: a tokenizer has up to 40 MB
MAX_GRAPH_BYTES = 64 << 20
_MAX_LAYERS = 10_000
_MAX_NUMBER = 2**31 - 1
_MAX_ENTRIES = 1000  # schedules, kernel libraries, graphs
_MAX_NAME = 300  # characters
_PLAIN_NAME = r"[\w.-]{1,60}"


def contained_name(name: str) -> str:
    """Return `name` if it is a plain relative path inside a bundle.

    Raises:
        BundleError: the name is absolute, empty, very long, has control characters, or climbs out of the bundle.
    """
    path = PurePosixPath(name[: _MAX_NAME + 1])
    plain = name.isprintable() and not {"\\", ":"} & set(name) and str(path) == name != "."
    if not plain or path.is_absolute() or ".." in path.parts or len(name) > _MAX_NAME:
        raise BundleError(
            f"bundle.json names the file {name[:_MAX_NAME]!r}, which lies outside the bundle or is not a plain name: "
            "do not use this bundle"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights came from. A bundle is published, so nothing here names a place on the exporter's machine.

    Attributes:
        model: hub id or alias; of a local folder only its last part.
        revision: commit on the hub, if known.
        license: licence of the weights, if known.
    """

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
        _check_numbers(self)
        if self.attention_heads % self.kv_heads:
            raise BundleError(
                f"Architecture: {self.attention_heads} attention heads cannot share {self.kv_heads} key and value "
                "heads: export the model again"
            )


@dataclass(frozen=True, kw_only=True)
class KvContract:
    """One key and one value buffer per layer: `dtype` ``[1, heads, positions, head_dim]``, past and present the same.

    `heads` are the model's key and value heads; `head_dim` is that of the cache, which may be padded. ``past`` and
    ``present`` are the graphs' input and output names, in which ``{layer}`` (from 0) and ``{part}`` (``key`` or
    ``value``) are replaced.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: str = "float32"
    past: str = "past_key_values.{layer}.{part}"
    present: str = "present.{layer}.{part}"

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.dtype not in _KV_DTYPES:
            raise BundleError(f"KvContract: {unknown_choice('type', self.dtype, _KV_DTYPES)}")
        for pattern in (self.past, self.present):
            fixed = pattern.replace("{layer}", "", 1).replace("{part}", "", 1)
            if len(fixed) != len(pattern) - len("{layer}{part}") or {"{", "}"} & set(fixed) or len(pattern) > _MAX_NAME:
                raise BundleError(
                    f"KvContract names buffers {pattern!r:.60}: {{layer}} and {{part}} must each appear once, and no "
                    "other braces"
                )

    def past_name(self, layer: int, part: str) -> str:
        """Return the name of the input that takes a layer's ``key`` or ``value`` buffer."""
        return _fill(self.past, layer, part)

    def present_name(self, layer: int, part: str) -> str:
        """Return the name of the output that is written to a layer's ``key`` or ``value`` buffer."""
        return _fill(self.present, layer, part)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One ONNX graph: ``prefill`` gives the logits of the last position, ``decode`` those of every position.

    Attributes:
        file: its file in the bundle.
        phase: ``prefill`` or ``decode``.
        precision: bits that it reads of every nested layer, or a mix.
        activations: data type of activations and logits.
        device: where it runs; a graph for one device need not run on another.
    """

    file: str
    phase: str
    precision: int | float
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

    def __post_init__(self) -> None:
        if self.size < 0:
            raise BundleError(f"bundle.json lists a file of {self.size} bytes: the bundle is damaged, export again")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of `bundle.json`.

    Attributes:
        producer: the program that wrote the bundle, and its version.
        source: where the weights came from.
        architecture: the shape of the transformer.
        context_length: the longest text in tokens.
        precisions: bits that the bundle decodes at, high to low; one with decimals is a mix.
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
        quality: what each precision costs; None where it was not measured.
        mixes: for each precision that is a mix, as text, how many planes it reads of each nested layer.
    """

    producer: str
    source: Source
    architecture: Architecture
    context_length: int
    precisions: tuple[int | float, ...]
    parent_precision: int
    prefill_precision: int | float
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
    quality: Quality | None = None
    mixes: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read = {*self.precisions, self.prefill_precision, *(graph.precision for graph in self.graphs)}
        if not all(map(is_precision, (*read, self.parent_precision))):
            raise BundleError(
                f"bundle.json: precisions must be 1 to {MAX_PRECISION} bits, with two decimals at most: "
                "export the model again"
            )
        if not self.precisions or list(self.precisions) != sorted(set(self.precisions), reverse=True):
            raise BundleError(f"precisions must fall from high to low without repeats, got {list(self.precisions)}")
        if not 1 <= self.context_length <= _MAX_NUMBER:
            raise BundleError(
                f"context length must be 1 to {_MAX_NUMBER:,}, got {self.context_length!s:.30}: export the model again"
            )
        if self.accuracy not in ACCURACIES:
            raise BundleError(f"bundle.json: {unknown_choice('accuracy', self.accuracy, ACCURACIES)}")
        for what, entries in (("schedules", self.schedules), ("kernels", self.kernels), ("graphs", self.graphs)):
            if len(entries) > _MAX_ENTRIES:
                raise BundleError(f"bundle.json lists {len(entries):,} {what}: this is more than {_MAX_ENTRIES:,}")
        self._check_schedules()
        self._check_files()
        check_mixes(self.mixes, read, self.tensors)
        self._check_graphs()
        self._check_cache()
        self._check_quality()
        check_tensors(self.tensors, lambda layer: {self.planes(layer, precision) for precision in read})

    def _check_schedules(self) -> None:
        """Check the form only; what a schedule means is checked where one is used (`pmpd.runtime.schedule`)."""
        for name, text in self.schedules.items():
            plain = re.fullmatch(_PLAIN_NAME, name) and len(text) <= _MAX_NAME
            if not plain or not re.fullmatch(r"[a-z][a-z0-9_-]*:[!-~]+", text):
                raise BundleError(
                    f"bundle.json: schedule {name!r:.60} is {text!r:.60}, which does not have the form KIND:ARGUMENTS: "
                    "export the model again"
                )
        if self.default_schedule not in self.schedules:
            raise BundleError(
                f"bundle.json: {unknown_choice('default schedule', self.default_schedule, self.schedules)}"
            )

    def _check_cache(self) -> None:
        cache, model = self.kv_cache, self.architecture
        if (cache.layers, cache.heads) != (model.layers, model.kv_heads) or cache.head_dim < model.head_dim:
            raise BundleError(
                f"bundle.json: the KV cache of {cache.layers} layers and {cache.heads} heads of {cache.head_dim} does "
                f"not fit the architecture, {model.layers} layers and {model.kv_heads} heads of {model.head_dim}: "
                "export the model again"
            )

    def _check_quality(self) -> None:
        if self.quality is None:
            return
        measured = [quality.precision for quality in self.quality.precisions]
        if measured != list(self.precisions):
            raise BundleError(
                f"bundle.json: quality was measured at {measured!s:.60} bits, the bundle has {list(self.precisions)}: "
                "export the model again"
            )

    def _check_files(self) -> None:
        for name in self.files:
            contained_name(name)
        for target in self.kernels:
            if not re.fullmatch(_PLAIN_NAME, target):
                raise BundleError(f"bundle.json has kernels for {target!r:.60}, which is not a name: export again")
        weights = {contained_name(tensor.file) for tensor in self.tensors}
        others = sum(entry.size for name, entry in self.files.items() if name not in self.weight_files)
        if others > MAX_HASHED_BYTES:
            raise BundleError(f"bundle.json lists {others:,} bytes besides the weights: do not use this bundle")
        if self.skeleton and (listed := sorted(weights & self.files.keys())):
            raise BundleError(f"bundle.json is of a skeleton but lists {listed[0]!r}: export the model again")
        named = (*(graph.file for graph in self.graphs), *self.kernels.values(), *(() if self.skeleton else weights))
        for file in named:
            if contained_name(file) not in self.files:
                raise BundleError(f"bundle.json refers to {file!r} but does not list it: export the model again")
        for graph in self.graphs:
            if self.files[graph.file].size > MAX_GRAPH_BYTES:
                raise BundleError(f"{graph.file} is larger than {MAX_GRAPH_BYTES:,} bytes: do not use this bundle")
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

    @cached_property
    def weight_files(self) -> frozenset[str]:
        """The files that hold tensors and nothing else."""
        others = {graph.file for graph in self.graphs} | set(self.kernels.values())
        return frozenset(tensor.file for tensor in self.tensors) - others

    @cached_property
    def reports(self) -> dict[str, str]:
        """The file that says how a schedule was found, by the schedule's name: ``schedules/NAME-HASH.json``."""
        matches = (re.fullmatch(rf"schedules/({_PLAIN_NAME})-[0-9a-f]{{8}}\.json", file) for file in self.files)
        return {match[1]: match[0] for match in matches if match}

    @property
    def schedule(self) -> str:
        """The text of the default schedule."""
        return self.schedules[self.default_schedule]

    def graph(self, phase: str, precision: float, *, device: str = "cpu") -> Graph:
        """Return the graph of a phase and precision, or raise BundleError."""
        for graph in self.graphs:
            if (graph.phase, graph.precision, graph.device) == (phase, precision, device):
                return graph
        raise BundleError(
            f"the bundle has no {phase} graph at {precision} bits for {device}: it has {list(self.precisions)}"
        )

    def planes(self, layer: str, precision: float) -> int:
        """Return how many planes a graph of some precision reads of a nested layer."""
        return planes_read(self.mixes, precision, layer)

    def shape_at(self, tensor: Tensor, precision: float) -> tuple[int, ...]:
        """Return the shape that a graph of some precision reads of a tensor: of nested planes the first ones."""
        return tensor.shape_at(self.planes(tensor.layer or "", precision)) if tensor.nested else tensor.shape

    def tensors_at(self, precision: float) -> tuple[Tensor, ...]:
        """Return the tensors that a graph of some precision reads: all but codebooks for other numbers of planes."""
        nested = {tensor.layer or "" for tensor in self.tensors if tensor.nested}
        read = {layer: self.planes(layer, precision) for layer in nested}
        return tuple(
            tensor
            for tensor in self.tensors
            if tensor.role != "codebook" or read.get(tensor.layer or "", tensor.bits) == tensor.bits
        )

    @cached_property
    def optional_tensors(self) -> frozenset[str]:
        """The names of the tensors that a graph may leave out: coarse codebooks, and basis and bound."""
        bounds = [tensor.name for tensor in self.tensors if tensor.role in ("basis", "bound")]
        return frozenset([*bounds, *(tensor.name for tensor in coarse_codebooks(self.tensors))])

    def to_json(self) -> str:
        """Return the text of `bundle.json`, in the newest version."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        if self.quality is None:
            del document["quality"]  # readers that do not know the field refuse it
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of `bundle.json`, of any version so far.

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
        try:
            for upgrade in _UPGRADES[version - 1 :]:
                document = upgrade(document)
            manifest: Self = build(cls, document, "bundle.json")
        except BundleError as error:  # it may quote the manifest
            raise BundleError(one_line(error, 500)) from None
        return manifest


def _check_numbers(value: Architecture | KvContract) -> None:
    for name, number in asdict(value).items():
        limit = {"layers": _MAX_LAYERS, "parameters": 2**63 - 1}.get(name, _MAX_NUMBER)
        if isinstance(number, int) and not 1 <= number <= limit:
            size = "1 or more" if number < 1 else f"at most {limit:,}"
            raise BundleError(
                f"{type(value).__name__}: {name} must be {size}, got {number!s:.30}: export the model again"
            )


def _fill(pattern: str, layer: int, part: str) -> str:
    return pattern.replace("{layer}", str(layer)).replace("{part}", part)
