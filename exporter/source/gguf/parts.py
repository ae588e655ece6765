"""A GGUF model of one file or of several parts, and the types of its tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pmpd.exporter.source.gguf.header import GgufHeader, GgufTensor
from pmpd.runtime.errors import MissingExtraError, PmpdError

__all__ = ["FLOATS", "SUPPORTED", "GgufParts", "dequantized", "rows", "type_name"]

FLOATS = ("F32", "F16", "BF16")
# Dequantization of all of these is checked against the format's definition, value by value.
SUPPORTED = (*FLOATS, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufParts:
    """The headers of a model's files as one. Use `GgufParts.open`.

    Attributes:
        files: the files, the first one first.
        metadata: that of the first file, which has all of it.
        tensors: those of all files, by name.
    """

    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file, and the other parts of a model that was split (``-00001-of-00003.gguf``).

        Raises:
            MissingExtraError: the package `gguf` is not installed.
            PmpdError: a file is missing, damaged, or has a tensor of a type that cannot be read.
        """
        first = GgufHeader.read(path)
        headers = [first, *map(GgufHeader.read, _other_parts(first))]
        tensors: dict[str, GgufTensor] = {}
        for number, header in enumerate(headers):
            if len(headers) > 1 and header.metadata.get("split.no") != number:
                raise PmpdError(f"{header.file} is not part {number + 1} of the model of {path.name}: fetch it again")
            for tensor in header.tensors.values():
                if tensor.name in tensors:
                    raise PmpdError(f"{header.file} repeats the tensor {tensor.name}: fetch all parts again")
                _require_readable(tensor)
                tensors[tensor.name] = tensor
        announced = first.metadata.get("split.tensors.count", len(tensors))
        if announced != len(tensors):
            raise PmpdError(f"{path} has {len(tensors)} tensors of {announced} in its parts: fetch all parts again")
        return cls(tuple(header.file for header in headers), first.metadata, tensors)

    @cached_property
    def bits(self) -> float:
        """Average bits of a weight, of matrices alone."""
        matrices = [tensor for tensor in self.tensors.values() if len(tensor.shape) > 1]
        return 8 * sum(map(_stored_nbytes, matrices)) / max(1, sum(tensor.elements for tensor in matrices))

    @cached_property
    def types(self) -> list[str]:
        """Types of its matrices by the weights they hold, the most common first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if len(tensor.shape) > 1:
                counts[type_name(tensor.type)] += tensor.elements
        return [name for name, _ in counts.most_common()]


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(error.name or "gguf", "export") from None
    return gguf


def type_name(kind: int) -> str:
    """Return ggml's name of a tensor type, or its number."""
    try:
        name: str = _package().GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"
    return name


def _stored_nbytes(tensor: GgufTensor) -> int:
    """Return the bytes of a tensor in its file."""
    package = _package()
    block, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType(tensor.type)]
    return tensor.elements // int(block) * int(size)


def rows(tensor: GgufTensor, first: int, count: int) -> GgufTensor:
    """Return some rows of a tensor as one of their own; blocks of quantized types lie within a row."""
    nbytes = _stored_nbytes(tensor) // tensor.shape[0]
    return replace(tensor, shape=(count, *tensor.shape[1:]), offset=tensor.offset + first * nbytes)


def dequantized(tensor: GgufTensor) -> npt.NDArray[Any]:
    """Return a tensor's values in its shape: float32, or float16 mapped from the file; bfloat16 as its bits (uint16).

    Raises:
        PmpdError: the file cannot be read.
    """
    package = _package()
    kind = package.GGMLQuantizationType(tensor.type)
    try:
        # A private mapping of the file: torch takes it without a copy and without a warning that it is read-only.
        data = np.memmap(tensor.file, np.uint8, "c", tensor.offset, (_stored_nbytes(tensor),))
    except (OSError, ValueError) as error:
        raise PmpdError(f"tensor {tensor.name} cannot be read from {tensor.file} ({error}): fetch it again") from None
    if kind.name in FLOATS:
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[kind.name]
        if tensor.offset % np.dtype(dtype).itemsize == 0:
            return data.view(dtype).reshape(tensor.shape)
        return np.frombuffer(bytearray(data), dtype).reshape(tensor.shape)
    rows = data.reshape(*tensor.shape[:-1], -1)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is found, and named, where it is used
        values: npt.NDArray[np.float32] = package.quants.dequantize(rows, kind)
    return values


def _require_readable(tensor: GgufTensor) -> None:
    name = type_name(tensor.type)
    if name not in SUPPORTED:
        raise PmpdError(
            f"tensor {tensor.name} of {tensor.file} has the type {name}, which cannot be read: give a file of "
            f"{', '.join(SUPPORTED)}, or the original checkpoint"
        )
    package = _package()
    block = int(package.GGML_QUANT_SIZES[package.GGMLQuantizationType(tensor.type)][0])
    if not tensor.elements or tensor.shape[-1] % block:
        raise PmpdError(f"tensor {tensor.name} of {tensor.file} is {list(tensor.shape)} in blocks of {block}: damaged")
    end, size = tensor.offset + _stored_nbytes(tensor), tensor.file.stat().st_size
    if end > size:
        raise PmpdError(
            f"{tensor.file} is cut short: tensor {tensor.name} ends at byte {end}, the file at {size}: fetch it again"
        )


def _other_parts(first: GgufHeader) -> list[Path]:
    count, file = first.metadata.get("split.count", 1), first.file
    if type(count) is not int or not 1 <= count < 100_000:
        raise PmpdError(f"{file} says that it is one of {count!r} parts: fetch it again")
    if count == 1:
        return []
    match = _PART.fullmatch(file.name)
    if match is None or int(match[3]) != count:
        raise PmpdError(
            f"{file} is one of {count} parts, and its name does not end in -00001-of-{count:05}.gguf: rename it"
        )
    if int(match[2]) != 1 or first.metadata.get("split.no") != 0:
        raise PmpdError(f"{file} is not the first of {count} parts: give {match[1]}-00001-of-{match[3]}.gguf")
    parts = [file.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(2, count + 1)]
    for part in parts:
        if not part.is_file():
            raise PmpdError(f"{part} is missing: {file.name} is one of {count} parts, fetch all of them")
    return parts
