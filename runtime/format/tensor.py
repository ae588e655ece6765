"""The tensor table of a bundle: where each tensor is stored, what it is for, and which tensors belong together."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pmpd.runtime.errors import BundleError, unknown_choice
from pmpd.runtime.format.bitplanes import CACHE_LINE, MAX_PRECISION

__all__ = ["DTYPE_SIZES", "ROLES", "Tensor", "check_tensors", "coarse_codebooks"]

DTYPE_SIZES = {"uint8": 1, "float16": 2, "float32": 4, "int64": 8}
# What a tensor is for. The first five belong to a linear layer.
ROLES = ("planes", "codebook", "bias", "basis", "bound", "embedding", "norm", "rotary")
_OF_LAYER = ROLES[:5]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a weight file, an initializer of the graphs under the same name.

    Attributes:
        name: its name in the graphs.
        file: the weight file.
        offset: its first byte there.
        length: its bytes.
        dtype: type of its elements.
        shape: planes ``[P, N, S]``, codebook ``[N, G, 2**bits]``, bias ``[N]`` (see `bitplanes`), basis ``[D, K]``,
            bound ``[B, N]``, embedding ``[V, H]`` (or planes ``[P, V, S]`` and a codebook ``[V, G, 2**P]``), rotary
            cosines and sines ``[positions, pairs]``.
        role: what it is for, one of `ROLES`.
        layer: the linear layer (the name of its node) that planes, codebook, bias, basis or bound belong to.
        bits: how many planes there are, or the precision that a codebook is for; None for other roles.
        nested: planes of which a graph reads as many as its precision says; other planes are read whole.
    """

    name: str
    file: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]
    role: str
    layer: str | None = None
    bits: int | None = None
    nested: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_SIZES:
            raise BundleError(f"tensor {self.name!r}: {unknown_choice('type', self.dtype, DTYPE_SIZES)}")
        if self.role not in ROLES:
            raise BundleError(f"tensor {self.name!r}: {unknown_choice('role', self.role, ROLES)}")
        if len(self.shape) > 4 or not 0 < len(self.name) <= 300:
            raise BundleError(f"tensor {self.name!r:.60} has no name or a very long one, or more than 4 dimensions")
        want = math.prod(self.shape) * DTYPE_SIZES[self.dtype]
        if self.offset < 0 or self.length != want or min(self.shape, default=1) < 1:
            raise BundleError(
                f"tensor {self.name!r} claims {self.length} bytes at {self.offset}, "
                f"but {self.dtype} {list(self.shape)} takes {want}: export the model again"
            )
        if self.offset % CACHE_LINE:
            raise BundleError(
                f"tensor {self.name!r} begins at byte {self.offset}, not at a multiple of {CACHE_LINE}: "
                "export the model again"
            )
        if problem := self._problem():
            raise BundleError(f"tensor {self.name!r} ({self.role}) {problem}: export the model again")

    def _problem(self) -> str | None:
        """Say what contradicts the tensor's role, if something does."""
        if (self.layer is None) == (self.role in _OF_LAYER):
            return "must name its layer" if self.layer is None else f"cannot belong to the layer {self.layer!r}"
        for role, dtype, form in (("basis", "float32", "[D, K]"), ("bound", "float16", "[B, N]")):
            if self.role == role and (self.dtype != dtype or len(self.shape) != 2):
                return f"must be {dtype} {form}, got {self.dtype} {list(self.shape)}"
        if self.role not in ("planes", "codebook"):
            return "has no bits and no planes to be nested" if self.bits is not None or self.nested else None
        if self.bits is None or not 1 <= self.bits <= MAX_PRECISION:
            return f"must have 1 to {MAX_PRECISION} bits, got {self.bits}"
        dtype, place, size = ("uint8", 0, self.bits) if self.role == "planes" else ("float16", 2, 2**self.bits)
        if self.dtype != dtype or len(self.shape) != 3 or self.shape[place] != size:
            form = f"[{size}, N, S]" if self.role == "planes" else f"[N, G, {size}]"
            return f"of {self.bits} bits must be {dtype} {form}, got {self.dtype} {list(self.shape)}"
        return "cannot be nested" if self.nested and self.role != "planes" else None

    def shape_at(self, planes: int) -> tuple[int, ...]:
        """Return the shape that a graph reads that takes so many planes: of nested ones ``[P, N, S]`` the first."""
        return (planes, *self.shape[1:]) if self.nested else self.shape


def coarse_codebooks(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the codebooks for the first planes of layers that are not nested: of fewer bits than the layer has."""
    tensors = tuple(tensors)
    whole = {tensor.layer: tensor.bits or 0 for tensor in tensors if tensor.role == "planes" and not tensor.nested}
    return [
        tensor for tensor in tensors if tensor.role == "codebook" and (tensor.bits or 0) < whole.get(tensor.layer, 0)
    ]


def check_tensors(tensors: Sequence[Tensor], read: Callable[[str], Collection[int]]) -> None:
    """Check that a tensor table is whole: every layer has planes, and a codebook for each number that is read of them.

    `read` says for a nested layer which numbers of its planes graphs read.

    Raises:
        BundleError: a tensor is listed twice, overlaps another, has other rows than its layer's planes or a codebook of
            more bits, or is missing; or a bound stands where there is no coarse codebook.
    """
    names: set[str] = set()
    parts: dict[tuple[str, str, int | None], Tensor] = {}
    for tensor in tensors:
        key = (tensor.layer or "", tensor.role, tensor.bits if tensor.role == "codebook" else None)
        if tensor.name in names or (tensor.layer is not None and key in parts):
            raise BundleError(f"bundle.json lists tensor {tensor.name!r} twice: export the model again")
        names.add(tensor.name)
        parts[key] = tensor
    ordered = sorted(tensors, key=lambda tensor: (tensor.file, tensor.offset))
    for tensor, following in pairwise(ordered):
        if tensor.file == following.file and tensor.offset + tensor.length > following.offset:
            raise BundleError(
                f"tensors {tensor.name!r} and {following.name!r} overlap in {tensor.file}: export the model again"
            )
    _check_embedding([tensor for tensor in tensors if tensor.role == "embedding"])
    planes = {tensor.layer: tensor for tensor in tensors if tensor.role == "planes"}
    for tensor in tensors:
        if tensor.role in ("codebook", "bias", "bound"):
            rows = planes[tensor.layer].shape[1] if tensor.layer in planes else 0
            if (row_count := tensor.shape[tensor.role == "bound"]) != rows:
                raise BundleError(
                    f"tensor {tensor.name!r} has {row_count} rows, the planes of its layer have {rows}: "
                    "export the model again"
                )
    coarse = {tensor.layer for tensor in coarse_codebooks(tensors)}
    for tensor in tensors:
        if tensor.role == "codebook" and (tensor.bits or 0) > (stored := planes[tensor.layer].shape[0]):
            raise BundleError(
                f"tensor {tensor.name!r} is for {tensor.bits} bits, the planes of its layer are {stored}: "
                "export the model again"
            )
        if tensor.role in ("basis", "bound") and tensor.layer not in coarse:
            raise BundleError(
                f"tensor {tensor.name!r} ({tensor.role}) belongs to a layer without a coarse codebook: "
                "export the model again"
            )
    for layer in planes:
        pair = [role for role in ("basis", "bound") if (layer, role, None) in parts]
        if len(pair) == 1:
            raise BundleError(
                f"layer {layer!r} has a {pair[0]} without a {'bound' if pair == ['basis'] else 'basis'}: "
                "export the model again"
            )
    for layer, tensor in planes.items():
        stored = tensor.shape[0]
        for bits in sorted(read(layer or ""), reverse=True) if tensor.nested else (stored,):
            if bits > stored or (layer, "codebook", bits) not in parts:
                raise BundleError(
                    f"layer {layer!r} cannot be read at {bits} bits: it has {stored} planes and "
                    f"no codebook for them, or too few; export the model again"
                )


def _check_embedding(tables: Sequence[Tensor]) -> None:
    """Check that an embedding that is stored in planes ``[P, V, S]`` has a codebook ``[V, G, 2**P]``, and no more."""
    planes = next((tensor for tensor in tables if tensor.dtype == "uint8"), None)
    if planes is None:
        return
    codebook = next((tensor for tensor in tables if tensor.dtype == "float16"), planes)
    P, V = (*planes.shape, 0)[:2]
    shapes = len(planes.shape), len(codebook.shape), codebook.shape[::2]
    if len(tables) != 2 or not 1 <= P <= MAX_PRECISION or shapes != (3, 3, (V, 2**P)):
        forms = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tables[:3])
        raise BundleError(
            f"the embedding {planes.name!r} must be uint8 [P, V, S] and float16 [V, G, 2**P] with P up to "
            f"{MAX_PRECISION}, got {forms}: export the model again"
        )
