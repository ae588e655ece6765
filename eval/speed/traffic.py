"""How many bytes a decode step must read, from the manifest alone: what achieved bandwidth is measured by."""

from __future__ import annotations

from pmpd.runtime.format.manifest import DTYPE_SIZES, Manifest, Tensor

__all__ = ["step_bytes"]

# Tables of which a step reads one row.
_GATHERED = ("embed_tokens.weight", "rotary.cos", "rotary.sin")


def step_bytes(manifest: Manifest, *, precision: int, positions: float) -> float:
    """Return the bytes that a decode step at `precision` bits reads with `positions` tokens in the KV cache.

    These are the planes and codebooks of that precision, the head, norms and biases, one row of the embedding, and the
    keys and values.
    """
    nested = {tensor.name.removesuffix(".planes") for tensor in manifest.tensors if tensor.nested}

    def read(tensor: Tensor) -> float:
        layer, codebook, bits = tensor.name.partition(".codebook.")
        if tensor.nested:
            return tensor.length * precision / tensor.shape[0]
        if codebook and layer in nested and int(bits) != precision:
            return 0
        return tensor.length / tensor.shape[0] if tensor.name.endswith(_GATHERED) else tensor.length

    kv = manifest.kv_cache
    cached = 2 * kv.layers * kv.heads * kv.head_dim * DTYPE_SIZES[kv.dtype] * positions
    return sum(map(read, manifest.tensors)) + cached
