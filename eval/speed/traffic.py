"""How many bytes a decode step must read, from the manifest alone: what achieved bandwidth is measured by."""

from __future__ import annotations

from pmpd.runtime.format.manifest import DTYPE_SIZES, Manifest
from pmpd.runtime.format.tensor import Tensor, coarse_codebooks

__all__ = ["step_bytes"]


def step_bytes(manifest: Manifest, *, precision: float, positions: float) -> float:
    """Return the bytes that a decode step at `precision` bits reads with `positions` tokens in the KV cache.

    These are the planes that it reads of each layer and the codebooks for them, the head, norms and biases, one row of
    the embedding (a tied one is in the head), and the keys and values. Of a head that is computed coarse to fine it is
    what is read of every row; the few rows that a greedy step reads whole are not counted.
    """
    coarse = {tensor.layer: tensor.bits or 0 for tensor in coarse_codebooks(manifest.tensors)}

    def read(tensor: Tensor) -> float:
        if tensor.role == "embedding":  # a table, or its planes or codebook: one row of each
            return tensor.length / manifest.architecture.vocab_size
        if tensor.role == "rotary":
            return tensor.length / tensor.shape[0]
        if tensor.layer in coarse and tensor.role == "planes":
            return tensor.length * coarse[tensor.layer] / tensor.shape[0]
        if tensor.layer in coarse and tensor.role == "codebook" and tensor.bits != coarse[tensor.layer]:
            return 0.0
        return tensor.length * manifest.shape_at(tensor, precision)[0] / tensor.shape[0]

    kv = manifest.kv_cache
    cached = 2 * kv.layers * kv.heads * kv.head_dim * DTYPE_SIZES[kv.dtype] * positions
    return sum(map(read, manifest.tensors_at(precision))) + cached
