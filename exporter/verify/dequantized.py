"""A bundle's weights at one precision as a source of parameters for transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from pmpd.exporter.arch import Family
from pmpd.exporter.bundle.layers import LinearLayer
from pmpd.exporter.bundle.plan import WeightPlan
from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.runtime import Bundle, PmpdError
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.format.bitplanes import dequantize

__all__ = ["DequantizedWeights", "checkpoint_weights"]

# What a thread decodes or compares at once: temporaries of 2 MB stay in its cache.
_TILE_WEIGHTS = 1 << 18
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


class DequantizedWeights:
    """The parameters of a checkpoint as a bundle's graph of one precision sees them, by their names in transformers.

    A merged layer is decoded when the first of its parts is asked for, and each part is handed out once: memory is
    that of the parts that nobody has asked for yet. A tied embedding is what the output layer is, and decoded twice.
    """

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, plan: WeightPlan, precision: float) -> None:
        self._bundle, self._checkpoint, self._plan, self._precision = bundle, checkpoint, plan, precision
        self._tied = plan.embedding is None
        self._layers: dict[str, LinearLayer] = {}  # by the names of their parts
        for layer in plan.layers:
            self._layers |= dict.fromkeys(map(self._part_name, layer.weight_names), layer)
        self._parts: dict[str, npt.NDArray[np.float32]] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """Return a parameter.

        Raises:
            PmpdError: it is further from the checkpoint's than zeros would be.
        """
        if self._tied and name == _EMBEDDING:
            return self(_HEAD)
        if name in self._layers:
            if name not in self._parts:
                self._parts |= self._decode(self._layers[name])
            weight = torch.from_numpy(self._parts.pop(name))
            source = name if name in self._layers[name].weight_names else _EMBEDDING
            _require_likeness(weight, self._checkpoint.tensor(source), f"{source} at {self._precision} bits")
            return weight
        return self._checkpoint.tensor(name)

    def _part_name(self, name: str) -> str:
        """Return the name under which a weight of the checkpoint is handed out: a tied one is the output layer's."""
        return _HEAD if self._tied and name == _EMBEDDING else name

    def _decode(self, layer: LinearLayer) -> dict[str, npt.NDArray[np.float32]]:
        read = self._bundle.manifest.planes
        bits = read(layer.name, self._precision) if layer.module.nested else layer.parent
        planes = self._bundle.tensor(self._plan.planes(layer.name), planes=bits)
        codebook = self._bundle.tensor(self._plan.codebook(layer.name, bits))
        N, K = layer.module.out_features, layer.module.in_features
        weight = np.empty((N, K), dtype=np.float32)

        def decode(rows: slice) -> None:
            weight[rows] = dequantize(planes[:, rows], codebook[rows], K)

        with ThreadPoolExecutor(available_threads()) as pool:
            list(pool.map(decode, _tiles(N, K)))
        return {self._part_name(name): part for name, part in layer.unstack(weight).items()}


def checkpoint_weights(checkpoint: Checkpoint, family: Family) -> Callable[[str], torch.Tensor]:
    """Return the checkpoint itself as a source of parameters: a tied output layer is the embedding's table."""
    if not family.shape.tied_embeddings:
        return checkpoint.tensor
    return lambda name: checkpoint.tensor(_EMBEDDING if name == _HEAD else name)


def _require_likeness(weight: torch.Tensor, original: torch.Tensor, name: str) -> None:
    error = norm = 0.0
    for rows in _tiles(*original.shape):
        want = original[rows].float().flatten()
        off = weight[rows].flatten() - want
        error += float(off @ off)
        norm += float(want @ want)
    if error > norm:
        raise PmpdError(
            f"verification failed, {name}: squared error {error:.3g} of a squared norm of {norm:.3g}; "
            "nothing was published: delete the partial folder and export again"
        )


def _tiles(N: int, K: int) -> Iterator[slice]:
    """Yield runs of the rows of a matrix ``[N, K]``."""
    rows = max(1, _TILE_WEIGHTS // K)
    yield from (slice(at, at + rows) for at in range(0, N, rows))
