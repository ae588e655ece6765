"""An attention node against float64, from its own queries, keys and values and the cache it wrote.

Kernels compute in float32; the portable graph rounds queries, rotary tables and results to float16, which is the noise
that its comparison with anything else has. Keys and values in the cache are float16 in both. Attention is recomputed
from the cache as the run left it, so that an error of one step of float16 in a key, which either side of the middle
between two steps may have, is checked by itself and does not blur the rest.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pmpd.exporter.verify.probe import Node, Run
from pmpd.exporter.verify.rounding import HALF_U, LAMBDA, U

__all__ = ["attention_error"]

Doubles = npt.NDArray[np.float64]

TANH = 4e-7  # relative error of the kernels' softcaps
LEAST_HALF = 2.0**-24  # one step of subnormal float16 numbers


def attention_error(node: Node, run: Run, cos: Doubles, sin: Doubles, *, portable: bool) -> float:
    """Return the largest error of a `GroupQueryAttention` node in units of what rounding may do.

    Args:
        node: the node.
        run: a run from an empty cache, T tokens in all.
        cos: rotary table ``[positions, pairs]``.
        sin: rotary table ``[positions, pairs]``.
        portable: the node's portable body ran, not a kernel.
    """
    heads, kv_heads = int(node.attributes["num_heads"]), int(node.attributes["kv_num_heads"])
    qkv = run.values[node.inputs[0]].astype(np.float64)
    T = len(qkv)
    y = run.values[node.outputs[0]].astype(np.float64).reshape(T, heads, -1)  # (T, H, D)
    D = y.shape[2]
    q, k, v = np.split(qkv.reshape(T, heads + 2 * kv_heads, D), [heads, heads + kv_heads], axis=1)
    cos, sin = cos[:T, None], sin[:T, None]  # (T, 1, pairs)
    # Float16: the number, the table, their product and the sum are rounded.
    unit = HALF_U if portable else U
    keys, values = (run.cache[name].astype(np.float64).swapaxes(0, 1) for name in node.inputs[1:3])  # (T, G, D)

    rotated, reach = _rotate(k, cos, sin), _reach(k, cos.shape[2])
    step = 2 * HALF_U  # of float16: half of it for a number rounded to nearest
    key_error = np.abs(keys - rotated) / (step * np.abs(rotated) + 4 * unit * reach + LEAST_HALF)
    value_error = np.abs(values - v) / (step * np.abs(v) + LEAST_HALF)

    q = _rotate(q, cos, sin)
    keys, values = (np.repeat(cache, heads // kv_heads, axis=1) for cache in (keys, values))  # (T, H, D)
    scale = float(node.attributes["scale"])
    scores = scale * np.einsum("thd,phd->htp", q, keys)  # (H, T, P)
    if portable:  # each element of a query is rounded, then the score
        spread = np.sqrt(np.einsum("thd,phd->htp", q**2, keys**2))
        off = LAMBDA * 2 * unit * scale * spread + 4 * unit * np.abs(scores)
    else:
        norms = np.einsum("th,ph->htp", np.linalg.norm(q, axis=2), np.linalg.norm(keys, axis=2))
        off = LAMBDA * np.sqrt(D) * unit * scale * norms
    softcap = float(node.attributes.get("softcap", 0))
    if softcap:  # no error of a score grows by it
        scores = softcap * np.tanh(scores / softcap)
        off = off + (4 * unit + TANH) * np.abs(scores)
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = (distance >= 0) & (distance < (int(node.attributes.get("window", 0)) or T))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    result = np.einsum("htp,phd->thd", weights, values)
    magnitude = np.einsum("htp,phd->thd", weights, np.abs(values))
    # A weight changes by at most twice the error of a score; exponentials, sums and the result are rounded.
    change = 2 * np.where(seen, off, 0).max(axis=2).T[..., None] + (4 if portable else 32) * unit
    error = np.abs(y - result) / (change * magnitude + LEAST_HALF * unit)
    return _largest(key_error, value_error, error)


def _largest(*arrays: Doubles) -> float:
    """Return the largest number in all arrays; NaN if there is one."""
    return float(np.max([array.max() for array in arrays]))


def _rotate(x: Doubles, cos: Doubles, sin: Doubles) -> Doubles:
    """Rotate ``x [T, heads, D]``: element i < pairs with element pairs + i."""
    pairs = cos.shape[2]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., 2 * pairs :]], axis=2)


def _reach(x: Doubles, pairs: int) -> Doubles:
    """Return the magnitudes that each rotated element is summed from."""
    first, second = np.abs(x[..., :pairs]), np.abs(x[..., pairs : 2 * pairs])
    return np.concatenate([first + second, first + second, np.abs(x[..., 2 * pairs :])], axis=2)
