"""A GGUF file as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.source.gguf.architectures import Architecture, read_architecture
from pmpd.exporter.source.gguf.header import GgufTensor
from pmpd.exporter.source.gguf.parts import FLOATS, GgufParts, dequantized, rows, type_name
from pmpd.exporter.source.gguf.rope import llama3_scaling
from pmpd.exporter.source.gguf.tokenizer import read_tokenizer, stop_ids
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.format.manifest import Source

if TYPE_CHECKING:
    import torch

__all__ = ["GgufCheckpoint"]

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_STACKED = ("q_proj", "k_proj", "v_proj")
_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
# Tensors of a block that are part of others, or that nobody needs.
_OPTIONAL = ("attn_qkv", "attn_rot_embd")
# Above this a weight may well be the original one, rounded.
_FEW_BITS = 8.0


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A model in a GGUF file, or in several parts of one. Use `GgufCheckpoint.open`."""

    path: Path
    source: Source
    config: Mapping[str, Any]
    parts: GgufParts
    architecture: Architecture

    @classmethod
    def open(cls, path: Path, *, name: str) -> Self:
        """Open a file; `name` is what a bundle calls the model.

        Raises:
            MissingExtraError: the package `gguf` is not installed.
            PmpdError: it is damaged, or has an architecture or a type of tensor that cannot be read.
        """
        parts = GgufParts.open(path)
        try:
            architecture, config = _read_config(parts)
        except PmpdError as error:
            raise PmpdError(f"{path}: {error}") from None
        name_of_license = parts.metadata.get("general.license")
        license_name = name_of_license if isinstance(name_of_license, str) and name_of_license else None
        return cls(path, Source(model=name, revision=None, license=license_name), config, parts, architecture)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Return a tensor with its rows and values as transformers has them.

        A matrix has the type that all matrices of the file have here: bfloat16 or float32 where they are stored so, and
        float16 otherwise, to which quantized values are rounded (half of what they take in float32, at 2^-11). Vectors
        keep their stored type, which is float32. Raises as `Checkpoint.tensor`.
        """
        import torch

        stored = self._stored(name)
        if shape is not None:
            self._require_shape(name, stored.shape, shape)
        values = dequantized(stored)
        tensor = torch.from_numpy(values)
        if values.dtype == np.uint16:
            tensor = tensor.view(torch.bfloat16)
        if tensor.ndim > 1:
            tensor = tensor.to(getattr(torch, self.matrix_type))
        if self.architecture.norm_offset and name.endswith("norm.weight"):
            tensor = tensor - self.architecture.norm_offset
        if self.architecture.halves and name.rpartition(".")[0].endswith(_ROTATED):
            tensor = _in_halves(tensor, int(self.config["head_dim"]))
        return tensor

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Check a tensor by the header, which was compared with the size of the file."""
        self._require_shape(name, self._stored(name).shape, shape)

    def _stored(self, name: str) -> GgufTensor:
        stored_name = self.architecture.stored_name(name)
        if (part := self._part_of_stack(name)) is not None:
            return part
        if stored_name is None or stored_name not in self.parts.tensors:
            raise PmpdError(
                f"{self.path} has no tensor {stored_name or name!r} ({name}): the file does not fit its metadata"
            )
        return self.parts.tensors[stored_name]

    def _part_of_stack(self, name: str) -> GgufTensor | None:
        """Return queries, keys or values of a tensor that holds all of them: old files of phi-2 have such."""
        layer, _, last = name.partition(".self_attn.")
        part, _, suffix = last.partition(".")
        stack = self.parts.tensors.get(f"blk.{layer.removeprefix('model.layers.')}.attn_qkv.{suffix}")
        if stack is None or part not in _STACKED:
            return None
        heads, kv_heads = int(self.config["num_attention_heads"]), int(self.config["num_key_value_heads"])
        size = int(self.config["hidden_size"]) // heads
        counts = [heads * size, kv_heads * size, kv_heads * size]
        if stack.shape[0] != sum(counts):
            raise PmpdError(
                f"{self.path}: tensor {stack.name} has {stack.shape[0]} rows instead of the {sum(counts)} of queries, "
                "keys and values: the file does not fit its metadata"
            )
        number = _STACKED.index(part)
        return rows(stack, sum(counts[:number]), counts[number])

    @property
    def matrix_type(self) -> str:
        """Name of the type in which `tensor` returns matrices."""
        types = set(self.parts.types)
        if "F32" in types:
            return "float32"
        return "bfloat16" if types == {"BF16"} else "float16"

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.parts.files)

    @property
    def tensor_nbytes(self) -> int:
        """Bytes of its tensors in the types in which `tensor` returns them."""
        size = 4 if self.matrix_type == "float32" else 2
        return sum(tensor.elements * size for tensor in self.parts.tensors.values())

    def identity(self) -> dict[str, Any]:
        """Return its configuration, and sizes and dates of its files."""
        stats = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in self.parts.files}
        return {"config": dict(self.config), "files": stats}

    def tokenizer(self) -> Any:
        """Return the tokenizer that the metadata describes, None if there is none."""
        try:
            return read_tokenizer(self.parts.metadata)
        except PmpdError as error:
            raise PmpdError(f"{self.path}: {error}") from None

    def generation_config(self) -> dict[str, Any]:
        """Return the tokens that begin and end a text; every token that ends a turn is among the latter."""
        ends = stop_ids(self.parts.metadata)
        return {"eos_token_id": ends} if ends else {}

    def describe(self) -> list[str]:
        """Say how many bits the weights had before."""
        bits, types = self.parts.bits, "/".join(self.parts.types)
        line = f"source    {types}, {bits:.1f} bits a weight"
        if bits > _FEW_BITS or set(self.parts.types) <= set(FLOATS):
            return [line]
        return [f"{line}: it was quantized before; give the original checkpoint for the best quality"]


def _read_config(parts: GgufParts) -> tuple[Architecture, dict[str, Any]]:
    embedding = parts.tensors.get(_EMBEDDING)
    # An unknown architecture is the better news, so the metadata goes first.
    rows = 0 if embedding is None else embedding.shape[0]
    architecture, config = read_architecture(parts.metadata, rows, tied=_OUTPUT not in parts.tensors)
    if embedding is None:
        raise PmpdError(f"no tensor {_EMBEDDING}: the file is not a complete model")
    places = {*architecture.places.values(), *_OPTIONAL}
    for tensor in parts.tensors:
        if tensor.startswith("blk.0.") and tensor.removeprefix("blk.0.").rpartition(".")[0] not in places:
            raise PmpdError(f"tensor {tensor} has no place in the model: give the original checkpoint")
    if "blk.0.attn_q.bias" in parts.tensors:
        config |= {"attention_bias": True, "use_qkv_bias": True}  # of Llama and its kin, and of StableLM
    if "blk.0.ffn_up.bias" in parts.tensors:
        config["mlp_bias"] = True
    if (factors := parts.tensors.get("rope_freqs.weight")) is not None:
        scaling = llama3_scaling(_vector(factors), config["rope_theta"])
        if scaling is not None:
            config["rope_scaling"] = scaling
    long, short = (parts.tensors.get(f"rope_factors_{kind}.weight") for kind in ("long", "short"))
    if long is not None and short is not None:
        config["rope_scaling"] = {
            "type": "longrope",
            "long_factor": _vector(long).tolist(),
            "short_factor": _vector(short).tolist(),
        }
    return architecture, config


def _vector(tensor: GgufTensor) -> npt.NDArray[np.float32]:
    if type_name(tensor.type) != "F32" or len(tensor.shape) != 1:
        raise PmpdError(f"tensor {tensor.name} is not a vector of F32: convert the model again")
    return dequantized(tensor)


def _in_halves(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Put rows of heads ``[heads * head_dim, …]`` that lie in pairs, as GGUF has them, into halves."""
    pairs = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])  # [heads, head_dim / 2, 2, …]
    return pairs.transpose(1, 2).reshape(tensor.shape)
